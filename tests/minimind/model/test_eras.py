"""Weights, configurations and adapters of every era, told apart and run as the original did."""

from __future__ import annotations

import pytest
import torch
import transformers
from places import GOLDEN
from safetensors.torch import load_file
from tiny_minimind import (
    assert_same_gradients,
    gradients,
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)

from lora_kernels import AdapterMismatchError, apply_lora
from minimind.model.checkpoint import CheckpointError, load_adapter, load_model
from minimind.model.config import LMConfig
from minimind.model.eras import ERAS, adapter_eras, infer_arguments, recognise_era, untraceable
from minimind.model.transformer import MiniMindLM

KINDS = [(era, kind) for era in ERAS for kind in ("dense", "moe")]
LATER = ["2025-04", "2026-03"]


def golden(era, kind, part="weights.safetensors"):
    return GOLDEN / f"minimind-{era}-{kind}.{part}"


def golden_model(era, kind="dense"):
    return load_model(golden(era, kind), golden(era, kind, "config.json"))


def shapes_of(model):
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


# --- the original's numbers -----------------------------------------------------------------------


@pytest.mark.parametrize(("era", "kind"), KINDS)
def test_logits_and_loss_are_those_of_the_original(era, kind):
    model, expected = golden_model(era, kind), load_file(golden(era, kind, "expected.safetensors"))
    assert model.config.era == era
    tokens = expected["input_ids"]
    with torch.no_grad():
        out = model(input_ids=tokens, labels=tokens)
    torch.testing.assert_close(out.logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss[None], expected["next_token_loss"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("era", "kind"), KINDS)
def test_names_are_those_of_the_original_to_the_last(era, kind):
    file = load_file(golden(era, kind))
    model = golden_model(era, kind)
    assert model.state_dict().keys() == file.keys()
    assert all(torch.equal(t, file[name]) for name, t in model.state_dict().items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("era", LATER)
def test_targets_are_named_as_that_era_names_them(era):
    model = golden_model(era)
    names = apply_lora(model, 4, target_modules=["k_proj", "up_proj"], verbose=False)
    parts = [(n, part) for n in (0, 1) for part in ("self_attn.k_proj", "mlp.up_proj")]
    assert names == [f"model.layers.{n}.{part}" for n, part in parts]
    everything = apply_lora(golden_model(era), 4, target_modules="all-linear", verbose=False)
    assert len(everything) == 14 and "lm_head" not in everything


# --- against transformers' own models -------------------------------------------------------------


@pytest.mark.parametrize(
    ("era", "kind", "twin"),
    [
        ("2025-04", "dense", "Llama"),
        ("2026-03", "dense", "Qwen3"),
        ("2026-03", "moe", "Qwen3Moe"),
    ],
)
def test_gradients_are_those_of_transformers_own_model(tmp_path, era, kind, twin):
    """Of every parameter, norms and router included; its experts are stacked, ours are not."""
    model = golden_model(era, kind).train()
    c = model.config
    sizes = {
        "hidden_size": c.dim, "num_hidden_layers": c.n_layers, "num_attention_heads": c.n_heads,
        "num_key_value_heads": c.n_kv_heads, "head_dim": c.head_dim, "vocab_size": c.vocab_size,
        "intermediate_size": c.hidden_dim, "rms_norm_eps": c.norm_eps, "rope_theta": c.rope_theta,
        "tie_word_embeddings": True, "attn_implementation": "eager",
    }  # fmt: skip
    if kind == "moe":
        sizes |= {
            "moe_intermediate_size": c.hidden_dim, "num_experts": 4, "num_experts_per_tok": 1,
            "norm_topk_prob": True,
        }  # fmt: skip
    config = getattr(transformers, f"{twin}Config")(**sizes)
    other = getattr(transformers, f"{twin}ForCausalLM")(config).train()
    state = model.state_dict()
    if "model.layers.0.mlp.experts.gate_up_proj" in other.state_dict():
        state = stacked(state)
    other.load_state_dict(state)
    tokens = ids(2, 9, vocab=c.vocab_size)
    model(input_ids=tokens, labels=tokens).loss.backward()
    other(input_ids=tokens, labels=tokens).loss.backward()
    ours, theirs = gradients(model), gradients(other)
    if kind == "moe":
        ours = stacked(ours) if len(theirs) != len(ours) else ours
        # One expert's score is rescaled to 1: nothing flows back into the router.
        assert not any(ours[f"model.layers.{n}.mlp.gate.weight"].abs().max() > 1e-7 for n in (0, 1))
    assert_same_gradients(ours, theirs, atol=1e-5, rtol=1e-4)


def stacked(named):
    """Experts' tensors as transformers 5 keeps them: all of a layer's in one."""
    rest = {name: t for name, t in named.items() if ".experts." not in name}
    for layer in (0, 1):
        at = f"model.layers.{layer}.mlp.experts"
        gate, up, down = (
            torch.stack([named[f"{at}.{e}.{part}_proj.weight"] for e in range(4)])
            for part in ("gate", "up", "down")
        )
        rest |= {f"{at}.gate_up_proj": torch.cat([gate, up], 1), f"{at}.down_proj": down}
    return rest


# --- told from names and shapes -------------------------------------------------------------------

FIRST = {
    "tok_embeddings.weight": (128, 64),
    "layers.0.attention.wq.weight": (64, 64),
}
SECOND = {
    "model.embed_tokens.weight": (128, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.gate_proj.weight": (192, 64),
    "lm_head.weight": (128, 64),
}
NORMED = {**SECOND, "model.layers.0.self_attn.q_norm.weight": (16,)}


def test_eras_are_told_from_names_and_shapes():
    for era, kind in KINDS:
        shapes = {name: t.shape for name, t in load_file(golden(era, kind)).items()}
        assert recognise_era(shapes) == era
    assert recognise_era(FIRST) == "2025-02"
    assert recognise_era(SECOND) == "2025-04"
    assert recognise_era(NORMED) == "2026-03"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ({"wte.weight": (8, 8)}, "fit none .*wte.weight"),
        ({}, "no tensors at all"),
        ({**SECOND, **FIRST}, "several: 2025-02, 2025-04"),
        ({**NORMED, **FIRST}, "several: 2025-02, 2026-03"),
        ({"layers.0.attention.wq.lora.A.weight": (8, 64)}, "LoRA adapter.*load_lora"),
    ],
)
def test_what_is_of_no_era_is_refused(names, words):
    with pytest.raises(CheckpointError, match=words):
        recognise_era(names)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 128, "n_layers": 3},
        {"dim": 96, "hidden_dim": 40, "vocab_size": 77},
        {"dim": 64, "use_moe": True, "n_routed_experts": 3, "hidden_dim": 48, "n_layers": 1},
    ],
)
def test_sizes_are_inferred_for_the_usual_heads(tmp_path, era, sizes):
    model = MiniMindLM(LMConfig(era=era, **{"n_layers": 2, "vocab_size": 61, **sizes})).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    torch.testing.assert_close(loaded(ids(2, 7)).logits, model(ids(2, 7)).logits)


def test_shared_experts_are_counted():
    for era, count in (("2025-02", 0), ("2025-02", 1), ("2025-04", 0), ("2025-04", 3)):
        model = MiniMindLM(
            LMConfig(era=era, dim=32, n_layers=1, use_moe=True, n_shared_experts=count)
        )
        assert infer_arguments(era, shapes_of(model))["n_shared_experts"] == count


def test_heads_of_any_number_are_inferred_where_they_have_a_norm(tmp_path):
    sizes = {"dim": 64, "n_heads": 6, "n_kv_heads": 3, "head_dim": 10, "n_layers": 1}
    model = MiniMindLM(LMConfig(era="2026-03", vocab_size=61, **sizes)).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    torch.testing.assert_close(loaded(ids(2, 7)).logits, model(ids(2, 7)).logits)


@pytest.mark.parametrize(("era", "key"), [("2025-02", "wk"), ("2025-04", "k_proj")])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_unusual_heads_are_asked_for_where_nothing_tells_them(era, key, kind):
    with pytest.raises(CheckpointError, match=f"number of heads .*{key}.* pass config with n_head"):
        load_model(golden(era, kind))


def test_the_golden_weights_of_2026_03_need_no_configuration():
    for kind in ("dense", "moe"):
        expected = load_file(golden("2026-03", kind, "expected.safetensors"))
        model = load_model(golden("2026-03", kind), infer_from(golden("2026-03", kind)))
        with torch.no_grad():
            logits = model(expected["input_ids"]).logits
        torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)


def infer_from(path):
    shapes = {name: tuple(t.shape) for name, t in load_file(path).items()}
    return infer_arguments(recognise_era(shapes), shapes)


def test_what_shapes_cannot_tell_is_listed():
    assert untraceable("2025-04", False)[:2] == ["n_heads", "n_kv_heads"]
    assert "n_heads" not in untraceable("2026-03", False)
    assert "num_experts_per_tok" in untraceable("2026-03", True)


# --- configurations -------------------------------------------------------------------------------


def test_an_era_brings_its_usual_values():
    first, second, third = (LMConfig(era=era) for era in ERAS)
    assert (first.dim, second.dim, third.dim) == (512, 512, 768)
    assert (first.hidden_dim, second.hidden_dim, third.hidden_dim) == (1408, 1408, 2432)
    assert (first.n_kv_heads, second.n_kv_heads, third.n_kv_heads) == (2, 2, 4)
    assert (first.norm_eps, second.norm_eps, third.norm_eps) == (1e-5, 1e-5, 1e-6)
    assert (second.num_experts_per_tok, third.num_experts_per_tok) == (2, 1)
    assert (second.n_shared_experts, third.n_shared_experts) == (1, 0)
    assert LMConfig(era="2026-03", n_kv_heads=None).n_kv_heads == 8
    assert LMConfig(era="2025-04", n_shared_experts=None).n_shared_experts == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"era": "2024-09"}, "era must be one of 2025-02, .* got '2024-09'"),
        ({"era": "2026-03", "n_shared_experts": 1}, "must be 0, got 1; the weights of 2026-03"),
        ({"era": "2025-04", "n_shared_experts": -1}, "must be at least 0, got -1"),
        ({"head_dim": 7}, "head_dim .* must be even.* got 7"),
    ],
)
def test_what_an_era_has_no_room_for_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        LMConfig(dim=32, n_layers=1, **changes)


# --- a wrong era is said --------------------------------------------------------------------------


def test_a_configuration_of_another_era_is_said():
    for config in (LMConfig(era="2026-03"), {"era": "2026-03", "dim": 64}):
        with pytest.raises(CheckpointError, match="2026-03") as caught:
            load_model(golden("2025-04", "dense"), config)
        assert "2025-04" in str(caught.value)


def test_weights_between_two_eras_are_refused_with_the_names(tmp_path):
    config = golden("2026-03", "dense", "config.json")
    state = load_file(golden("2026-03", "dense"))
    del state["model.layers.1.self_attn.q_norm.weight"]
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="missing: model.layers.1.self_attn.q_norm.weight"):
        load_model(tmp_path / "a.pth", config)
    state = load_file(golden("2026-03", "dense"))
    state |= load_file(golden("2025-02", "dense"))
    torch.save(state, tmp_path / "b.pth")
    with pytest.raises(CheckpointError, match="several: 2025-02, 2026-03"):
        load_model(tmp_path / "b.pth", config)


@pytest.mark.parametrize(("adapter", "base"), [("2025-02", "2026-03"), ("2026-03", "2025-02")])
def test_an_adapter_of_another_era_is_said_and_changes_nothing(adapter, base):
    model = golden_model(base)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(AdapterMismatchError, match=f"{adapter}, the base is of {base}"):
        load_adapter(model, golden(adapter, "dense", "lora.pth"))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_an_adapter_of_the_same_names_but_other_sizes_keeps_its_own_message():
    model = tiny(era="2025-04")  # narrower than the file's model
    with pytest.raises(AdapterMismatchError, match=r"expected \[8, 32\], found \[8, 64\]"):
        load_adapter(model, golden("2026-03", "dense", "lora.pth"))


def test_eras_of_an_adapter():
    assert adapter_eras(["layers.0.attention.wq", "layers.3.feed_forward.w1"]) == ("2025-02",)
    assert adapter_eras(["model.layers.0.self_attn.q_proj"]) == ("2025-04", "2026-03")
    assert adapter_eras(["model.layers.0.self_attn.q_proj", "layers.0.attention.wq"]) == ()
    assert adapter_eras(["h.0.attn"]) == adapter_eras([]) == ()
