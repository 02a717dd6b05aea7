"""Models and adapters in the layouts of transformers, against transformers and PEFT themselves."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from places import GOLDEN
from safetensors.torch import load_file, save_file
from tiny_minimind import ids, one_thread, tiny  # noqa: F401 - one_thread acts by itself

from lora_kernels import AdapterMismatchError, apply_lora, load_lora, merge_lora, save_lora
from minimind.model.checkpoint import load_model
from minimind.model.config import LMConfig
from minimind.model.eras import ERAS
from minimind.model.hub_format import config_json, copy_adapter, exact_layout, hub_name, hub_tensors
from minimind.model.transformer import MiniMindLM

ARCHITECTURES = {
    ("2025-02", "dense"): "LlamaForCausalLM",
    ("2025-02", "moe"): "Ernie4_5_MoeForCausalLM",
    ("2025-04", "dense"): "LlamaForCausalLM",
    ("2025-04", "moe"): "Ernie4_5_MoeForCausalLM",
    ("2026-03", "dense"): "Qwen3ForCausalLM",
    ("2026-03", "moe"): "Qwen3MoeForCausalLM",
}


def written(model, folder, dtype=torch.float32):
    """The model's weights and config as a directory; transformers' model from it."""
    layout = exact_layout(model.config)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model.config, layout, dtype)))
    save_file(hub_tensors(model, layout, dtype), folder / "model.safetensors", {"format": "pt"})
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.no_grad()
def assert_same_logits(ours, theirs, tokens=None):
    tokens = ids(2, 11) if tokens is None else tokens
    expected = ours(input_ids=tokens).logits
    # Some float32 roundings of the largest logit: the sums are taken in another order.
    torch.testing.assert_close(
        theirs(input_ids=tokens).logits, expected, atol=5e-6 * expected.abs().max(), rtol=1e-5
    )


@pytest.mark.parametrize(("era", "kind"), ARCHITECTURES)
def test_transformers_gives_the_originals_logits(tmp_path, era, kind):
    golden = GOLDEN / f"minimind-{era}-{kind}"
    model = load_model(f"{golden}.weights.safetensors", f"{golden}.config.json")
    twin = written(model, tmp_path)
    assert type(twin).__name__ == ARCHITECTURES[era, kind]
    expected = load_file(f"{golden}.expected.safetensors")
    with torch.no_grad():
        logits = twin(expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)


CASES = {
    "2025-02": {"era": "2025-02", "n_kv_heads": 1},
    "2025-04 untied": {"era": "2025-04", "tie_word_embeddings": False},
    "2026-03 wide heads": {"era": "2026-03", "head_dim": 12},
    "2025-02 top 3 of 5": {"use_moe": True, "n_routed_experts": 5, "num_experts_per_tok": 3},
    "2025-02 none shared": {"use_moe": True, "n_shared_experts": 0},
    "2025-04 none shared": {"era": "2025-04", "use_moe": True, "n_shared_experts": 0},
    "2025-04 three shared": {"era": "2025-04", "use_moe": True, "n_shared_experts": 3},
    "2026-03 top 2": {"era": "2026-03", "use_moe": True, "num_experts_per_tok": 2},
    "2026-03 raw score": {"era": "2026-03", "use_moe": True, "norm_topk_prob": False},
}


@pytest.mark.parametrize("case", CASES)
def test_other_shapes_are_exact_too(tmp_path, case):
    model = tiny(rope_theta=100.0, hidden_dim=24, **CASES[case])
    assert_same_logits(model, written(model, tmp_path))


@pytest.mark.parametrize(
    "changes", [{"norm_topk_prob": False}, {"num_experts_per_tok": 1}, {"era": "2025-04",
                "norm_topk_prob": False}]
)  # fmt: skip
def test_experts_whose_scores_are_not_rescaled_have_no_counterpart(changes):
    with pytest.raises(ValueError, match="no exact counterpart .*ERNIE 4.5 and Mixtral.*--to pth"):
        exact_layout(LMConfig(use_moe=True, **changes))


def test_a_permutation_rounds_nothing():
    model = tiny()
    tensors = hub_tensors(model, exact_layout(model.config), torch.float32)
    q, moved = (
        model.layers[0].attention.wq.weight,
        tensors["model.layers.0.self_attn.q_proj.weight"],
    )
    assert not torch.equal(q, moved)
    assert sorted(map(tuple, q.tolist())) == sorted(map(tuple, moved.tolist()))
    assert torch.equal(
        model.layers[0].attention.wv.weight, tensors["model.layers.0.self_attn.v_proj.weight"]
    )


@pytest.mark.parametrize("era", ["2025-04", "2026-03"])
def test_later_eras_keep_every_name_and_value(era):
    model = tiny(era=era)
    layout, state = exact_layout(model.config), model.state_dict()
    tensors = hub_tensors(model, layout, torch.float32)
    assert set(state) - set(tensors) == {"lm_head.weight"}
    assert all(torch.equal(tensors[name], state[name]) for name in tensors)


def test_a_weight_too_large_for_the_dtype_is_named():
    model = tiny()
    with torch.no_grad():
        model.layers[1].attention.wo.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match="layers.1.self_attn.o_proj.weight is too large for .*16"):
        hub_tensors(model, exact_layout(model.config), torch.float16)


def test_written_directories_load_back_here(tmp_path):
    for era in ERAS:
        model = tiny(era=era)
        written(model, tmp_path / era)
        again = load_model(tmp_path / era)
        assert again.config.era == ("2025-04" if era == "2025-02" else era)
        assert_same_logits(model, again)


# --- adapters -------------------------------------------------------------------------------------


def adapted(era, **changes):
    """A tiny model with an adapter that matters, on every linear it may be on."""
    model = tiny(era=era, **changes)
    apply_lora(model, 3, alpha=5, target_modules="all-linear", verbose=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." in name:
                parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in PEFT
def test_peft_reads_the_translated_adapter_on_the_written_model(tmp_path, era):
    peft = pytest.importorskip("peft")
    model = adapted(era)
    twin = written(model, tmp_path / "model")
    names = copy_adapter(model, exact_layout(model.config), twin)
    assert len(names) == 14 and "model.layers.0.self_attn.q_proj" in names
    save_lora(twin, tmp_path / "adapter")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    theirs = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval()
    assert_same_logits(model, theirs)
    merge_lora(model)
    assert_same_logits(model, theirs)


@pytest.mark.parametrize("era", ["2025-04", "2026-03"])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in PEFT
def test_a_later_eras_own_adapter_fits_the_written_model_as_it_is(tmp_path, era):
    peft = pytest.importorskip("peft")
    model = adapted(era)
    save_lora(model, tmp_path / "adapter")
    written(model, tmp_path / "model")
    fresh = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert_same_logits(model, peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").eval())


def test_an_untranslated_adapter_of_2025_02_is_refused_on_the_written_model(tmp_path):
    model = adapted("2025-02")
    save_lora(model, tmp_path / "adapter")
    twin = written(model, tmp_path / "model")
    with pytest.raises(AdapterMismatchError, match="the model has no module 'layers.0.attention"):
        load_lora(twin, tmp_path / "adapter")
    peft = pytest.importorskip("peft")
    with pytest.raises(ValueError, match="[Tt]arget modules .* not found"):
        peft.PeftModel.from_pretrained(twin, tmp_path / "adapter")


def test_an_adapter_on_attention_stays_apart_from_experts(tmp_path):
    model = tiny(use_moe=True)
    apply_lora(model, 2, target_modules=["wq", "wo"], verbose=False)
    with torch.no_grad():
        for block in model.layers:
            block.attention.wq.lora.B.weight.normal_()
    twin = written(model, tmp_path)
    copy_adapter(model, exact_layout(model.config), twin)
    assert_same_logits(model, twin)


@pytest.mark.parametrize("era", ["2025-02", "2026-03"])
def test_an_adapter_on_stacked_experts_must_be_merged(tmp_path, era):
    if transformers.__version__ < "5":
        pytest.skip("transformers stacks experts from version 5 on")
    model = adapted(era, use_moe=True)
    twin = written(model, tmp_path)
    with pytest.raises(AdapterMismatchError, match="experts.0.*fold it in by --merge"):
        copy_adapter(model, exact_layout(model.config), twin)


def test_an_adapter_on_several_shared_experts_must_be_merged(tmp_path):
    model = tiny(era="2025-04", use_moe=True, n_shared_experts=2)
    apply_lora(model, 2, target_modules=r".*shared_experts.*", verbose=False)
    twin = written(model, tmp_path)
    with pytest.raises(AdapterMismatchError, match="shared_experts.*fold it in by --merge"):
        copy_adapter(model, exact_layout(model.config), twin)


def test_names_are_translated_both_ways():
    config = LMConfig(use_moe=True)
    layout = exact_layout(config)
    first, second = ERAS["2025-02"].names, ERAS["2025-04"].names
    for name in MiniMindLM(LMConfig(dim=32, n_layers=1, use_moe=True)).state_dict():
        assert second.translate(first.translate(name, second), first) == name
    assert hub_name("output", config, layout) == "lm_head"
    assert hub_name("norm.weight", config, layout) == "model.norm.weight"
