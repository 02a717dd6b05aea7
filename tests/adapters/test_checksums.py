"""The same adapter is the same file, and a bit that has turned over is noticed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import safetensors
import torch
from places import ROOT
from safetensors.torch import load_file, save_file
from tiny_model import Model, assert_untouched, snapshot, trained

from lora_kernels import AdapterMismatchError, load_lora, save_lora
from lora_kernels.adapters import files
from lora_kernels.adapters.checksums import CHECKSUM, checksum, to_bytes

TENSORS = "adapter_model.safetensors"


def saved(model, folder, kind):
    """The file of tensors that saving writes: by itself, or of a directory."""
    path = folder / ("a.safetensors" if kind == "file" else "a")
    save_lora(model, path)
    return path, path if kind == "file" else path / TENSORS


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_the_same_adapter_is_the_same_file(tmp_path, kind):
    model, seen = trained(Model(), target_modules=["q", "gate"]), set()
    for turn in range(20):  # of two keys in the order of a hash table's
        (tmp_path / str(turn)).mkdir()
        seen.add(saved(model, tmp_path / str(turn), kind)[1].read_bytes())
    assert len(seen) == 1
    work = f"""
import sys; sys.path.insert(0, {str(ROOT / "tests" / "helpers")!r})
import torch; from tiny_model import Model, trained; from lora_kernels import save_lora, load_lora
model = Model(); load_lora(model, {str(saved(model, tmp_path, kind)[0])!r})
save_lora(model, sys.argv[1])
"""
    other = tmp_path / ("b.safetensors" if kind == "file" else "b")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", work, other], check=True, env=environment)
    assert (other if kind == "file" else other / TENSORS).read_bytes() in seen


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_bit_that_has_turned_over_is_noticed(tmp_path, kind):
    model = trained(Model().bfloat16(), target_modules=["gate"], rank=2, lora_dtype=torch.bfloat16)
    path, file = saved(model, tmp_path, kind)
    whole, fresh = file.read_bytes(), Model().bfloat16()
    begin = 8 + int.from_bytes(whole[:8], "little")
    before, unnoticed = snapshot(fresh), []
    for at in range(begin, len(whole)):
        damaged = bytearray(whole)
        damaged[at] ^= 1 << (at % 8)
        file.write_bytes(damaged)
        try:
            load_lora(fresh, path)
        except AdapterMismatchError as error:
            assert "checksum" in str(error) or "NaN" in str(error)
        else:
            unnoticed.append(at)
    assert not unnoticed
    assert_untouched(fresh, before)
    file.write_bytes(whole)
    load_lora(fresh, path)


def test_names_shapes_and_dtypes_are_part_of_it():
    one = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    others = [
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3, dtype=torch.int32), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3)},
        {"a": torch.zeros(2, 3), "b": torch.ones(1), "d": torch.zeros(0)},
    ]
    assert checksum(one) == checksum(dict(reversed(one.items())))
    assert checksum(one) not in map(checksum, others)
    assert checksum({"a": torch.arange(6.0).view(2, 3).t()}) == checksum(
        {"a": torch.arange(6.0).view(2, 3).t().contiguous()}
    )


def test_a_file_without_one_loads(tmp_path):
    save_lora(trained(Model()), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata.pop(CHECKSUM)
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata)
    assert load_lora(Model(), tmp_path / "b.safetensors")


def test_other_readers_read_it(tmp_path):
    tensors = {"ключ.a": torch.randn(3, 2), "b": torch.randn(2).half(), "c": torch.zeros(0, 4)}
    for text in ("x", 'quoted "y"', "ключ \\ \n 键", ""):
        (tmp_path / "a").write_bytes(to_bytes(tensors, {"format": "pt", "z": text}))
        read = load_file(tmp_path / "a")
        assert read.keys() == tensors.keys()
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)
        with safetensors.safe_open(tmp_path / "a", "pt") as file:
            assert file.metadata()["z"] == text
        content = (tmp_path / "a").read_bytes()
        length = int.from_bytes(content[:8], "little")
        assert length % 8 == 0
        assert list(json.loads(content[8 : 8 + length])["__metadata__"]) == [
            "format", CHECKSUM, "z"
        ]  # fmt: skip


@pytest.mark.parametrize("kind", ["a.pth", "a.safetensors", "a"])
def test_the_names_are_on_the_disk_after_the_rename(tmp_path, monkeypatch, kind):
    """And no descriptor is left open."""
    model, synced, real = trained(Model(), target_modules=["gate"]), [], os.fsync

    def fsync(handle):
        synced.append((os.readlink(f"/proc/self/fd/{handle}"), (tmp_path / kind).exists()))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    for turn in range(3):
        before = len(os.listdir("/proc/self/fd"))
        save_lora(model, tmp_path / kind)
        assert len(os.listdir("/proc/self/fd")) == before
        where = tmp_path / kind if turn and kind == "a" else tmp_path
        assert synced[-1] == (str(where), True)


def test_what_is_synced_has_been_written(tmp_path, monkeypatch):
    """A file that still lies in Python's buffer is not on the disk, whatever fsync says."""
    sizes, real = {}, os.fsync

    def fsync(handle):
        sizes[os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))] = os.fstat(handle).st_size
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    save_lora(trained(Model(), target_modules=["gate"]), tmp_path / "a")
    for name in (TENSORS, "adapter_config.json"):
        assert sizes[name] == (tmp_path / "a" / name).stat().st_size > 0
