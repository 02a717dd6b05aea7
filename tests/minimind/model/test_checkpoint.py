"""Weights in and out: eras, round trips, and files that must be refused."""

from __future__ import annotations

import json
import os

import pytest
import torch
from places import GOLDEN
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_minimind import (
    SIZES,
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)
from torch import nn

from minimind.model.checkpoint import CheckpointError, load_model, save_model
from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM


def weights(**changes):
    """A small model's state dict, as a plain dictionary of its own tensors."""
    return {name: t.clone() for name, t in tiny(**changes).state_dict().items()}


def stored(path, **extra):
    """Write a small model's weights, changed by ``extra`` (None removes), to a .pth file."""
    state = {**weights(), **extra}
    torch.save({name: t for name, t in state.items() if t is not None}, path)
    return path


# --- reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("form", ["path", "dictionary", "object"])
def test_golden_weights_give_the_golden_logits(kind, form):
    config_path = GOLDEN / f"minimind-2025-02-{kind}.config.json"
    sizes = json.loads(config_path.read_text())
    config = {"path": config_path, "dictionary": sizes, "object": LMConfig(**sizes)}[form]
    model = load_model(GOLDEN / f"minimind-2025-02-{kind}.weights.safetensors", config)
    expected = load_file(GOLDEN / f"minimind-2025-02-{kind}.expected.safetensors")
    assert not model.training and model.output.weight is model.tok_embeddings.weight
    with torch.no_grad():
        logits = model(input_ids=expected["input_ids"]).logits
    torch.testing.assert_close(logits, expected["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_wrapper_prefixes_and_old_tables_are_dropped(tmp_path, suffix, prefix):
    state = weights()
    old = {"pos_cis": torch.zeros(5, 4), "layers.0.attention.mask": torch.full((1, 3), -torch.inf)}
    content = {prefix + name: t for name, t in {**state, **old}.items()}
    path = tmp_path / f"full_sft{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(content, path)
    model = load_model(path, SIZES)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_a_compiled_layer_inside_the_model_loads_too(tmp_path):
    state = {n.replace("layers.0.", "layers.0._orig_mod."): t for n, t in weights().items()}
    torch.save(state, tmp_path / "a.pth")
    assert torch.equal(load_model(tmp_path / "a.pth", SIZES).norm.weight, state["norm.weight"])


@pytest.mark.parametrize("absent", ["output.weight", "tok_embeddings.weight"])
def test_one_of_two_tied_names_is_enough(tmp_path, absent):
    model = load_model(stored(tmp_path / "a.pth", **{absent: None}), SIZES)
    assert model.output.weight is model.tok_embeddings.weight
    assert torch.equal(model.output.weight, weights()["output.weight"])


def test_dtype_is_float32_unless_asked(tmp_path):
    half = {name: t.half() for name, t in weights().items()}
    torch.save(half, tmp_path / "a.pth")
    assert {p.dtype for p in load_model(tmp_path / "a.pth", SIZES).parameters()} == {torch.float32}
    narrow = load_model(tmp_path / "a.pth", SIZES, dtype=torch.bfloat16)
    assert {p.dtype for p in narrow.parameters()} == {torch.bfloat16}
    assert torch.equal(narrow.norm.weight, half["norm.weight"].bfloat16())


def test_loading_leaves_the_random_state_alone(tmp_path):
    path = stored(tmp_path / "a.pth")
    before = torch.get_rng_state()
    load_model(path, SIZES)
    assert torch.equal(torch.get_rng_state(), before)


def test_neighbouring_configuration_is_found_the_nearer_name_first(tmp_path):
    path = stored(tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "rope_theta": 5.0}))
    assert load_model(path).config.rope_theta == 5.0
    old = {**SIZES, "rope_theta": 7.0, "model_type": "minimind", "flash_attn": True}
    (tmp_path / "a.config.json").write_text(json.dumps(old))
    model = load_model(path)
    assert (model.config.rope_theta, model.config.model_type) == (7.0, "minimind")


@pytest.mark.parametrize(
    "sizes",
    [
        {"dim": 128, "n_layers": 3},
        {"dim": 96, "hidden_dim": 40, "vocab_size": 77},
        {"dim": 64, "use_moe": True, "n_routed_experts": 3, "n_shared_experts": 0},
        {"dim": 64, "use_moe": True, "hidden_dim": 48, "n_layers": 1},
    ],
)
def test_sizes_are_inferred_for_the_usual_heads(tmp_path, sizes):
    model = MiniMindLM(LMConfig(**{"n_layers": 2, "vocab_size": 61, **sizes})).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    loaded = load_model(tmp_path / "a.pth")
    assert torch.equal(loaded(input_ids=ids(2, 7)).logits, model(input_ids=ids(2, 7)).logits)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_unusual_heads_are_asked_for(kind):
    with pytest.raises(CheckpointError, match="number of heads .* pass config with n_heads"):
        load_model(GOLDEN / f"minimind-2025-02-{kind}.weights.safetensors")


def test_config_of_another_type_is_named(tmp_path):
    with pytest.raises(TypeError, match="config must be .* got int"):
        load_model(stored(tmp_path / "a.pth"), 512)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"norm.weight": None}, r"missing: norm.weight \[32\]; pass the config"),
        ({"layers.7.extra": torch.zeros(3)}, r"unexpected: layers.7.extra \[3\]"),
        (
            {"layers.1.attention.wk.weight": torch.zeros(8, 32)},
            r"layers.1.attention.wk.weight expected \[16, 32\] found \[8, 32\]",
        ),
        (
            {"output.weight": None, "tok_embeddings.weight": None},
            "missing: tok_embeddings.weight .*output.weight",
        ),
        ({"output.weight": torch.zeros(61, 32)}, "differ.*tie_word_embeddings=False"),
        ({"norm.weight": torch.full((32,), torch.nan)}, "NaN or infinite .* norm.weight"),
        ({"output.weight": None, "tok_embeddings.weight": torch.full((61, 32), torch.inf)}, "NaN"),
        ({"norm.weight": torch.ones(32, dtype=torch.int8)}, "norm.weight must be floating point"),
        ({"module.norm.weight": torch.ones(32)}, "norm.weight is there twice"),
    ],
)
def test_tensors_that_do_not_fit_are_listed(tmp_path, extra, words):
    path = stored(tmp_path / "a.pth", **extra)
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(path, SIZES)
    assert str(path) in str(caught.value)


def test_a_configuration_that_does_not_fit_is_named_as_the_source(tmp_path):
    path = stored(tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(json.dumps({**SIZES, "n_layers": 3}))
    with pytest.raises(CheckpointError, match=r"config.json; missing: layers.2.* and \d+ more"):
        load_model(path)


def test_a_value_too_large_for_the_dtype_is_refused(tmp_path):
    path = stored(tmp_path / "a.pth", **{"norm.weight": torch.full((32,), 1e5)})
    assert load_model(path, SIZES).norm.weight[0] == 1e5
    with pytest.raises(CheckpointError, match="infinite values as torch.float16"):
        load_model(path, SIZES, dtype=torch.float16)


@pytest.mark.parametrize("name", ["a.pth", "a.pt", "a.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a weight file, whatever its name says", None])
def test_garbled_files_are_refused(tmp_path, name, content):
    path = tmp_path / name
    if content is None:  # cut off in the middle
        (save_file if name.endswith("safetensors") else torch.save)(weights(), path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} could not be read"):
        load_model(path, SIZES)


class Trap:
    def __reduce__(self):
        return (os.mkdir, (os.environ["MINIMIND_TEST_TRAP"],))


def test_code_in_a_file_is_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_TEST_TRAP", str(tmp_path / "sprung"))
    torch.save({"norm.weight": Trap()}, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="could not be read as plain tensors"):
        load_model(tmp_path / "a.pth", SIZES)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"model": {"norm.weight": torch.ones(3)}, "step": 3}, "a dictionary with model, step"),
        ([torch.ones(3)], "a list"),
    ],
)
def test_content_that_is_no_state_dict_is_described(tmp_path, content, words):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=f"expected a dictionary .* got {words}"):
        load_model(tmp_path / "a.pth", SIZES)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no weight file at .*a.pth"):
        load_model(tmp_path / "a.pth")
    with pytest.raises(FileNotFoundError, match=r"has no model.safetensors"):
        load_model(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no configuration file at .*b.json"):
        load_model(stored(tmp_path / "a.pth"), tmp_path / "b.json")
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"expected a .pth, .* got '.gguf'"):
        load_model(tmp_path / "a.gguf")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not valid JSON"),
        ("[1, 2]", "expected a JSON object .* got a list"),
        ('{"dim": 30, "n_heads": 4}', "dim must be divisible by n_heads"),
        ('{"dim": "wide"}', "dim must be an integer"),
        ('{"hidden_size": 64}', "LMConfig calls this 'dim'"),
    ],
)
def test_bad_configuration_files_are_named(tmp_path, text, words):
    path = stored(tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=f"config.json.*{words}"):
        load_model(path)


# --- writing --------------------------------------------------------------------------------------


def round_trips(folder):
    return {"ours": load_model(folder), "transformers": MiniMindLM.from_pretrained(folder).eval()}


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("writer", ["save_model", "save_pretrained"])
def test_round_trip_through_both_readers(tmp_path, use_moe, writer):
    model = tiny(use_moe=use_moe, hidden_dim=24)
    if writer == "save_model":
        save_model(model, tmp_path / "new" / "folder")
    else:
        model.save_pretrained(tmp_path / "new" / "folder")
    with safe_open(tmp_path / "new" / "folder" / "model.safetensors", "pt") as file:
        assert set(model.state_dict()) - set(file.keys()) == {"output.weight"}
    for reader, loaded in round_trips(tmp_path / "new" / "folder").items():
        assert loaded.output.weight is loaded.tok_embeddings.weight, reader
        for name, t in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[name], t), f"{reader}: {name}"
        assert torch.equal(loaded(input_ids=ids(2, 5)).logits, model(input_ids=ids(2, 5)).logits)
        assert loaded.config.hidden_dim == 24 and loaded.config.eos_token_id == 2


def test_untied_weights_survive_the_round_trip(tmp_path):
    model = tiny(tie_word_embeddings=False)
    save_model(model, tmp_path)
    for reader, loaded in round_trips(tmp_path).items():
        assert torch.equal(loaded.output.weight, model.output.weight), reader
        assert torch.equal(loaded.tok_embeddings.weight, model.tok_embeddings.weight), reader


def test_a_missing_tensor_is_drawn_and_loaded_ones_are_left_alone(tmp_path):
    model = tiny()
    save_model(model, tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["layers.0.attention.wq.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    loaded = MiniMindLM.from_pretrained(tmp_path)
    for name, t in loaded.state_dict().items():
        assert torch.equal(t, model.state_dict()[name]) == (name != "layers.0.attention.wq.weight")
    assert 0.01 < loaded.layers[0].attention.wq.weight.std() < 0.03


def test_saving_in_another_dtype_leaves_the_model_alone(tmp_path):
    model = tiny()
    save_model(model, tmp_path, dtype=torch.bfloat16)
    stored_dtypes = {t.dtype for t in load_file(tmp_path / "model.safetensors").values()}
    assert stored_dtypes == {torch.bfloat16}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model.config.dtype is not torch.bfloat16
    assert torch.equal(load_model(tmp_path).norm.weight, model.norm.weight.bfloat16().float())


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    first, second = tiny(), tiny(seed=1)
    save_model(first, tmp_path)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(second, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert torch.equal(load_model(tmp_path).norm.weight, first.norm.weight)


def test_a_model_with_foreign_tensors_is_not_saved(tmp_path):
    model = tiny()
    model.layers[0].attention.wq.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"wq.extra.weight; merge or remove adapters"):
        save_model(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()
