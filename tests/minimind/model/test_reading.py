"""Weights and configurations that once hung, filled the memory or raised what is none of ours."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tiny_minimind import one_thread, tiny  # noqa: F401 - one_thread acts by itself

from minimind import load_model
from minimind.model import reading
from minimind.model.eras import CheckpointError


def refused(path, match):
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path)
    text = str(caught.value)
    assert len(text) <= 2000 and len(text.splitlines()) <= 30


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


@pytest.mark.filterwarnings("ignore:.*Sparse.*:UserWarning")
@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda t: torch.ones(1, 1).expand(2**24, 2**20), "an expanded view"),
        (lambda t: t[:1, :1].clone().expand(t.shape), "an expanded view"),
        (lambda t: t.to("meta"), "meta device"),
        (lambda t: nested(), "a nested one"),
        (lambda t: t.to_sparse(), "sparse_coo"),
    ],
)
def test_a_tensor_that_is_not_plain(tmp_path, make, why):
    state = tiny().state_dict()
    name = "layers.0.attention.wq.weight"
    state[name] = make(state[name])
    torch.save(state, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", f"{name}: .*{why}")


def test_many_views_of_the_same_bytes(tmp_path):
    one = torch.ones(64, 2**12)
    torch.save({f"layers.{n}.attention.wq.weight": one for n in range(40)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "tensors of .* bytes together in a file of")


@pytest.mark.parametrize("number", ["999999999", "3", "9" * 5000])
def test_a_layer_of_a_far_number(tmp_path, number):
    state = tiny().state_dict()
    state[f"layers.{number}.attention.wq.weight"] = torch.ones(2, 2)
    save_file({k: t.clone() for k, t in state.items()}, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "expected the layers 0 to|integer string conversion")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"n_layers": 10**5}, "expected 100000 layers, the file has"),
        ({"n_layers": 10**400}, "expected 1000"),
        ({"use_moe": True, "n_routed_experts": 10**8}, "layers of 100000001 experts"),
        ({"use_moe": True, "n_shared_experts": 10**8}, "n_shared_experts must be"),
        ({"dim": 2**62}, "no model can be made|must be"),
        ({"hidden_dim": 2**63}, "no model can be made"),
        ({"vocab_size": 10**30}, "no model can be made"),
        ({"max_seq_len": "long"}, "max_seq_len must be an integer"),
        ({"rope_theta": []}, ""),
        ({"dtype": "nonsense"}, ""),
        ({"torch_dtype": "nonsense"}, ""),
        ({"norm_eps": {}}, ""),
    ],
)
def test_a_configuration_of_no_model(tmp_path, change, why):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    config = {"dim": model.config.dim, "n_layers": model.config.n_layers, **_heads(model), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if why:
        refused(tmp_path / "a.pth", why)
        return
    try:  # what is left of it may do, and nothing else than a CheckpointError says that it does not
        load_model(tmp_path / "a.pth")
    except CheckpointError as error:
        assert len(str(error)) <= 2000


def _heads(model):
    names = ("n_heads", "n_kv_heads", "vocab_size", "hidden_dim", "max_seq_len")
    return {name: getattr(model.config, name) for name in names}


def deep(depth):
    value = {}
    for _ in range(depth):
        value = {"x": value}
    return value


@pytest.mark.parametrize(
    "change",
    [
        {"num_labels": 10**9},
        {"id2label": [1, 2]},
        {"id2label": {"x": 1}},
        {"label2id": 3},
        {"layer_types": 3},
        {"layer_types": ["strange"]},
        {"unknown": deep(300)},
        {"rope_scaling": deep(300)},
    ],
)
def test_what_only_transformers_would_read_is_left_out(tmp_path, change):
    model = tiny()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    config = {"dim": model.config.dim, "n_layers": model.config.n_layers, **_heads(model), **change}
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_model(tmp_path / "a.pth")
    assert torch.equal(loaded.state_dict()["layers.0.attention.wq.weight"],
                       model.state_dict()["layers.0.attention.wq.weight"])  # fmt: skip


def test_names_of_any_length_make_a_short_message(tmp_path):
    state = {f"{n}" + "x" * 20_000: torch.ones(1) for n in range(50)}
    save_file(state, tmp_path / "a.safetensors")
    refused(tmp_path / "a.safetensors", "expected the weights of one MiniMind")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (MemoryError(), MemoryError),
        (RuntimeError("can't allocate memory: you tried to allocate 64 bytes."), MemoryError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (type("PanicException", (BaseException,), {})("slice"), CheckpointError),
    ],
)
def test_what_is_damage_and_what_is_not(tmp_path, monkeypatch, suffix, raised, expected):
    (tmp_path / f"a{suffix}").write_bytes(b"0" * 100)

    def reader(*args, **kwargs):
        raise raised

    monkeypatch.setattr(reading.torch, "load", reader)
    monkeypatch.setattr(reading, "load_file", reader)
    with pytest.raises(expected):
        load_model(tmp_path / f"a{suffix}")
