"""What an adapter's file holds, and what is refused whatever the model."""

from __future__ import annotations

import os
import pickle

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import SUFFIXES, Model, trained

from lora_kernels import AdapterMismatchError, load_lora, lora_state_dict, save_lora


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({"gate.lora.A.weight": Evil()}, path)
    with pytest.raises(AdapterMismatchError, match="pickled objects"):
        load_lora(Model(), path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(AdapterMismatchError, match="pickled objects"):
        load_lora(Model(), path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("length", [0, 7, 300])
def test_half_a_file_is_refused(tmp_path, suffix, length):
    path = tmp_path / f"a{suffix}"
    save_lora(trained(Model()), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(AdapterMismatchError, match=f"a{suffix} "):
        load_lora(Model(), path)


def test_one_layer_under_two_names_is_refused(tmp_path):
    state = dict(lora_state_dict(trained(Model(), rank=2)))
    state |= {f"module.{k}": v for k, v in state.items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(AdapterMismatchError, match="is there twice"):
        load_lora(Model(), tmp_path / "a.pth")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04garbage"])
def test_files_of_another_kind_are_not_called_pickles(tmp_path, content):
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        with pytest.raises(
            AdapterMismatchError, match="^(?!.*weights_only).*another kind.*save_lora$"
        ):
            load_lora(Model(), path)


# torch 2.11 warns when it reads a sparse tensor without checking it, 2.14 when it checks it.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks", "ignore:Validating sparse tensor")
def test_sparse_and_narrow_tensors_are_refused(tmp_path):
    for tensor, message in (
        (torch.ones(2, 8).to_sparse(), "expected a dense tensor"),
        (torch.ones(2, 8).to(torch.float8_e4m3fn), "found torch.float8"),
    ):
        state = {**lora_state_dict(trained(Model(), rank=2)), "gate.lora.A.weight": tensor}
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(AdapterMismatchError, match=message):
            load_lora(Model(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    "metadata",
    [
        "not json",
        "{}",
        "[]",
        '{"version": 1, "modules": []}',
        '{"version": 1, "modules": {"gate": {"rank": 0}}}',
        '{"version": 2, "modules": {}}',
    ],
)
def test_damaged_metadata_is_refused(tmp_path, metadata):
    state = lora_state_dict(trained(Model()))
    save_file(state, tmp_path / "a.safetensors", {"lora_kernels": metadata})
    with pytest.raises(AdapterMismatchError, match="cannot be read"):
        load_lora(Model(), tmp_path / "a.safetensors")
