"""Files that once hung, filled the memory or raised what is none of ours."""

from __future__ import annotations

import json
import warnings

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import Model, assert_untouched, snapshot, trained

from lora_kernels import AdapterMismatchError, LoRAConfig, load_lora, save_lora
from lora_kernels.adapters import tensor_files

A, B = "gate.lora.A.weight", "gate.lora.B.weight"


def refused(path, match):
    model = Model()
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match=match) as caught:
        load_lora(model, path)
    assert_untouched(model, before)
    text = str(caught.value)
    assert len(text) <= 2000 and len(text.splitlines()) <= 30


def nested():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


STRANGE = {
    "expanded": (lambda: torch.ones(1, 1).expand(2**24, 2**20), "an expanded view"),
    "half expanded": (lambda: torch.ones(8, 1).expand(8, 2**40), "an expanded view"),
    "meta": (lambda: torch.ones(2, 8, device="meta"), "meta device"),
    "nested": (nested, "a nested one"),
    "sparse": (lambda: torch.ones(2, 8).to_sparse(), "sparse_coo"),
    "compressed": (lambda: torch.ones(2, 8).to_sparse_csr(), "sparse_csr"),
    "whole numbers": (lambda: torch.ones(2, 8, dtype=torch.int32), "floating-point"),
    "no tensor": (lambda: [1.0, 2.0], "floating-point tensor, found list"),
}


@pytest.mark.filterwarnings("ignore:.*Sparse CSR.*")
@pytest.mark.filterwarnings("ignore:.*Sparse.*:UserWarning")
@pytest.mark.parametrize("kind", STRANGE)
@pytest.mark.parametrize("where", ["factor", "whole"])
def test_a_tensor_that_is_not_plain(tmp_path, kind, where):
    make, why = STRANGE[kind]
    state = {A: torch.ones(2, 8), B: torch.ones(8, 2)}
    state[A if where == "factor" else "norm.weight"] = make()
    if (kind, where) == ("whole numbers", "whole"):
        why = "norm"  # a buffer may be of whole numbers, and this model has none
    torch.save(state, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", why)


def test_many_views_of_the_same_bytes(tmp_path):
    one = torch.ones(8, 2**14)
    state = {f"m{n}.lora.{f}.weight": one for n in range(40) for f in "AB"}
    torch.save(state, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "tensors of .* bytes together in a file of")


def test_a_name_that_is_no_text(tmp_path):
    name = ()
    for _ in range(18):  # written out it would have 2¹⁸ parts
        name = (name, name)
    torch.save({A: torch.ones(2, 8), name: torch.ones(1)}, tmp_path / "a.pth")
    refused(tmp_path / "a.pth", "a tuple for a name")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"rank": 2**62}, "below 2³¹"),
        ({"rank": 2**31 - 1}, "say rank 2147483647, its factors have 2"),
        ({"rank": 10**400}, "below 2³¹"),
        ({"alpha": 10**400}, "alpha must be finite"),
        ({"alpha": 1e999}, "alpha must be finite"),
        ({"dropout": 10**400}, "dropout must be in"),
        ({"rank": []}, "rank must be an integer"),
        ({"strange": 1}, "strange"),
    ],
)
def test_metadata_of_no_adapter(tmp_path, change, why):
    layer = {"rank": 2, "alpha": None, "dropout": 0.0, "use_rslora": False, **change}
    described = {"version": 1, "modules": {"gate": layer}}
    state = {A: torch.ones(2, 8), B: torch.ones(8, 2)}
    save_file(state, tmp_path / "a.safetensors", {"lora_kernels": json.dumps(described)})
    refused(tmp_path / "a.safetensors", why)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"lora_alpha": 10**400}, "lora_alpha must be finite"),
        ({"alpha_pattern": {"gate": 10**400}}, "alpha_pattern.* must be finite"),
        ({"r": 2**62}, "r must be below 2³¹"),
        ({"rank_pattern": {"gate": 2**62}}, "below 2³¹"),
        ({"rank_pattern": {"(gat+)+x": 4, "(": 4}}, "no pattern of names"),
        ({"rank_pattern": {r"(g)\1": 4}}, "no pattern of names: groupref"),
        ({"alpha_pattern": {"(" * 5000 + ")" * 5000: 4}}, "alpha_pattern has a key"),
    ],
)
def test_a_config_of_no_adapter(tmp_path, change, why):
    save_lora(trained(Model(), rank=2, target_modules=["gate"]), tmp_path / "a")
    config = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps({**config, **change}))
    refused(tmp_path / "a", why)


def test_a_pattern_that_backtracks_is_soon_done(tmp_path):
    name = "a" * 200
    model = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8)})
    save_lora(trained(model, rank=2, target_modules=[name]), tmp_path / "a")
    file = tmp_path / "a" / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "rank_pattern": {"(a+)+b": 7}}))
    fresh = torch.nn.ModuleDict({name: torch.nn.Linear(8, 8)})
    assert load_lora(fresh, tmp_path / "a") == [name]


class PanicException(BaseException):
    """As safetensors' readers raise it."""


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (MemoryError("no more"), MemoryError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: tried to allocate 64 bytes"),
         MemoryError),
        (OSError("Cannot allocate memory (os error 12)"), MemoryError),
        (RuntimeError("can't allocate memory: you tried to allocate 99999999999 bytes"),
         AdapterMismatchError),
        (PanicException("slice index"), AdapterMismatchError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)  # fmt: skip
def test_what_is_damage_and_what_is_not(tmp_path, monkeypatch, suffix, raised, expected):
    path = tmp_path / f"a{suffix}"
    save_lora(trained(Model(), target_modules=["gate"]), path)

    def reader(*args, **kwargs):
        raise raised

    monkeypatch.setattr(tensor_files.torch, "load", reader)
    monkeypatch.setattr(tensor_files.safetensors, "safe_open", reader)
    with pytest.raises(expected):
        load_lora(Model(), path)


def test_a_config_of_our_own_of_such_sizes():
    for change in ({"rank": 2**31}, {"alpha": 10**400}, {"alpha_pattern": {"q": 10**400}}):
        with pytest.raises(ValueError, match="below 2³¹|finite"):
            LoRAConfig(**change)
