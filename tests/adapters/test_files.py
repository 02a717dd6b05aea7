"""Files appear whole or not at all, whenever writing them ends."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_model import Model, trained
from tiny_peft import CONFIG, TENSORS, config_of, contents

from lora_kernels import AdapterMismatchError, load_lora, save_lora
from lora_kernels.adapters import peft_writing


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_lora(trained(Model()), path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_lora(trained(Model()), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize("step", range(7))
def test_a_failed_write_leaves_the_old_adapter(tmp_path, monkeypatch, step):
    """Of two files written and four moves, fail at each in turn; at last, not at all."""
    save_lora(trained(Model(), rank=2), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before, calls = contents(tmp_path), []

    def failing(real):
        def call(*args):
            calls.append(args)
            if len(calls) == step + 1:
                raise OSError("no space left")
            return real(*args)

        return call

    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    monkeypatch.setattr(os, "replace", failing(os.replace))
    if step == 6:
        save_lora(trained(Model(), rank=3), tmp_path)
        assert contents(tmp_path).keys() == before.keys()
        assert (tmp_path / "README.md").read_text() == "mine"
        assert config_of(tmp_path)["r"] == 3
        return
    with pytest.raises(OSError, match="no space left"):
        save_lora(trained(Model(), rank=3), tmp_path)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("step", range(2))
def test_a_failed_first_write_leaves_nothing(tmp_path, monkeypatch, step):
    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(*[(os, "fsync"), (peft_writing, "to_bytes")][step], full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_lora(trained(Model()), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_at_no_moment_is_there_half_an_adapter_that_loads(tmp_path, monkeypatch):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    real, seen = os.replace, []

    def look(*args):
        real(*args)
        names = [name for name in (TENSORS, CONFIG) if (tmp_path / name).exists()]
        try:
            seen.append((names, bool(load_lora(Model(), tmp_path))))
        except (AdapterMismatchError, FileNotFoundError):
            seen.append((names, False))

    monkeypatch.setattr(os, "replace", look)
    save_lora(trained(Model(), rank=2, alpha=8), tmp_path)
    assert seen == [
        ([TENSORS], False),
        ([], False),
        ([TENSORS], False),
        ([TENSORS, CONFIG], True),
    ]
