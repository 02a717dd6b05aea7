"""Adapters of experts as PEFT's files, both ways, against the PEFT that is installed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_experts import FAMILIES, PARAMETERS, by_peft, fill, mixture, our_factors, with_experts
from tiny_peft import CONFIG, TENSORS, TOKENS

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    load_lora,
    lora_layers,
    lora_state_dict,
    save_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT
EVERY = pytest.mark.parametrize("family", FAMILIES)
TARGETS = pytest.mark.parametrize(
    "parameters", [PARAMETERS, ["gate_up_proj"], ["down_proj"]], ids="+".join
)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


def written_by_peft(directory, family, parameters=PARAMETERS, targets=()):
    """PEFT's adapter of random factors, saved; the logits it gives."""
    model = by_peft(family, parameters=parameters, targets=targets)
    torch.manual_seed(9)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2)
    model.save_pretrained(directory)
    return logits(model)


def read_by_peft(directory, family):
    peft = pytest.importorskip("peft", minversion="0.18")
    return logits(peft.PeftModel.from_pretrained(mixture(family), directory).eval())


@TARGETS
@EVERY
def test_pefts_files_are_read(family, parameters, tmp_path):
    expected = written_by_peft(tmp_path, family, parameters)
    model = mixture(family)
    names = load_lora(model, tmp_path)
    assert names and all(name.endswith(tuple(parameters)) for name in names)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, logits(mixture(family)), atol=1e-2)


@TARGETS
@EVERY
def test_peft_reads_ours(family, parameters, tmp_path):
    model = with_experts(family, parameters=parameters, target_modules=["o_proj"])
    save_lora(model, tmp_path)
    torch.testing.assert_close(read_by_peft(tmp_path, family), logits(model), rtol=1e-4, atol=1e-4)
    again = mixture(family)
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# PEFT follows patterns of parameters, and warns all the same: it asks its modules alone.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_layers_and_ranks_of_their_own(tmp_path):
    patterns = {"layers.1.mlp.experts.down_proj": 5, "layers.0.self_attn.q_proj": 2}
    model = mixture("qwen3_moe")
    apply_lora(
        model,
        3,
        alpha=6,
        target_modules=["q_proj"],
        target_parameters=["layers.1.mlp.experts.gate_up_proj", "down_proj"],
        rank_pattern=patterns,
        alpha_pattern={"layers.0.mlp.experts.down_proj": 4},
        verbose=False,
    )
    fill(model)
    for folded in (False, True):
        directory = tmp_path / str(folded)
        save_lora(model, directory, fold_scale=folded)
        found = read_by_peft(directory, "qwen3_moe")
        torch.testing.assert_close(found, logits(model), rtol=1e-4, atol=1e-4)
        again = mixture("qwen3_moe")
        load_lora(again, directory)
        torch.testing.assert_close(logits(again), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("suffix", ["a.safetensors", "a.pth", ""])
def test_our_own_files(suffix, tmp_path):
    model = with_experts("gpt_oss", target_modules=["q_proj"], rank=3)
    path = tmp_path / (suffix or "directory")
    save_lora(model, path)
    for prepared in (False, True):
        again = mixture("gpt_oss")
        if prepared or suffix == "a.pth":  # which says nothing of alpha
            wanted = {"target_parameters": PARAMETERS, "target_modules": ["q_proj"]}
            apply_lora(again, 3, alpha=6, verbose=False, **wanted)
        names = load_lora(again, path)
        assert set(names) == {n.replace("lora_of_", "") for n in lora_layers(model)}
        assert torch.equal(logits(again), logits(model))
        for key, value in lora_state_dict(model).items():
            assert torch.equal(lora_state_dict(again)[key], value)


def test_a_checkpoint_of_the_whole_model(tmp_path):
    model = with_experts("mixtral", alpha=None)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = mixture("mixtral")
    with pytest.warns(UserWarning, match="checkpoint of the whole model"):
        load_lora(again, tmp_path / "model.safetensors")
    assert torch.equal(logits(again), logits(model))


def test_a_named_adapter_beside_another(tmp_path):
    written_by_peft(tmp_path / "peft", "mixtral")
    model = with_experts("mixtral")
    expected = logits(model)
    load_lora(model, tmp_path / "peft", name="other")
    assert torch.equal(logits(model), expected)
    assert sorted(
        lora_layers(model)["model.layers.0.mlp.experts.lora_of_down_proj"].adapters()
    ) == [
        "default",
        "other",
    ]


def test_inputs_and_outputs_that_have_changed_places(tmp_path):
    """As PEFT kept experts that are not transposed before it knew how they are kept."""
    expected = written_by_peft(tmp_path, "qwen3_moe")
    tensors = load_file(tmp_path / TENSORS)
    ranks = 4, 3
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        other = key.replace("lora_A", "lora_B")
        a = tensors[key].view(*ranks, -1)
        b = tensors[other].view(-1, ranks[1], ranks[0]).permute(2, 0, 1)
        tensors[key] = b.mT.flatten(0, 1).contiguous()
        tensors[other] = a.mT.permute(1, 2, 0).flatten(1).contiguous()
    save_file(tensors, tmp_path / TENSORS, {"format": "pt"})
    model = mixture("qwen3_moe")
    load_lora(model, tmp_path)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)


def edited(directory, change):
    """Change the tensors and the config of a directory."""
    tensors = load_file(directory / TENSORS)
    config = json.loads((directory / CONFIG).read_text())
    change(tensors, config)
    save_file(tensors, directory / TENSORS, {"format": "pt"})
    (directory / CONFIG).write_text(json.dumps(config))


INNER = "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight"


def of_each_expert(tensors, config):
    for name in ("lora_A", "lora_B"):
        tensors[f"base_model.model.model.layers.0.mlp.experts.2.up_proj.{name}.weight"] = (
            torch.ones(3, 3)
        )


DAMAGED = {
    "another rank": (lambda t, c: c.update(r=2), "expected .* for 4 experts of rank 2"),
    "fewer rows": (
        lambda t, c: t.update({INNER: t[INNER][:5].clone()}),
        "lora_A of .*gate_up_proj",
    ),
    "one parameter named": (
        lambda t, c: c.update(target_parameters=["down_proj"]),
        "adapts 2 parameters of .*name 1",
    ),
    "none named": (lambda t, c: c.update(target_parameters=None), "rank 3, found shape"),
    "no list": (lambda t, c: c.update(target_parameters="down_proj"), "expected a list of names"),
    "each expert by itself": (of_each_expert, "each expert by itself"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_what_does_not_fit_is_refused_and_nothing_changed(case, tmp_path):
    change, message = DAMAGED[case]
    written_by_peft(tmp_path, "qwen3_moe")
    edited(tmp_path, change)
    model = mixture("qwen3_moe")
    with pytest.raises(AdapterMismatchError, match=message):
        load_lora(model, tmp_path)
    assert not lora_layers(model) and torch.equal(logits(model), logits(mixture("qwen3_moe")))


def test_dropout_is_not_written_for_peft(tmp_path):
    model = with_experts("qwen3_moe", dropout=0.1)
    with pytest.raises(ValueError, match=r"no dropout on parameters.*\.safetensors"):
        save_lora(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    save_lora(model, tmp_path / "a.safetensors")
    again = mixture("qwen3_moe")
    load_lora(again, tmp_path / "a.safetensors")
    assert {layer.dropout for layer in lora_layers(again).values()} == {0.1}
    assert list(our_factors(again)) == list(our_factors(model))
