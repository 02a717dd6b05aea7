"""`minimind merge`."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from killed import killed_at
from tiny_cli import finetune

from lora_kernels import load_lora
from minimind import load_model, load_tokenizer
from minimind.cli import main


def test_merge_writes_the_adapted_model(here, capsys):
    assert finetune("--out", "o") == 0
    assert main(
        ["merge", "--base", "base", "--lora", "o/adapter.safetensors", "--out", "m", "--dtype",
         "float32"]
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "layers.0.attention.wq: 0.00% of" in said and "minimind chat --base m" in said
    adapted = load_model(here / "base")
    load_lora(adapted, here / "o" / "adapter.safetensors")
    merged = load_model(here / "m")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits)
    assert len(load_tokenizer(here / "m")) == 6400


def test_a_killed_merge_leaves_nothing_that_is_taken_for_a_model(here, capsys):
    assert finetune("--out", "o", "--epochs", "1") == 0
    command = ["merge", "--base", "base", "--lora", "o/adapter.safetensors", "--out", "deep/m"]
    assert main([*command[:-1], "whole"]) == 0
    expected = {p.name: p.read_bytes() for p in Path("whole").iterdir()}
    Path("deep/m").mkdir(parents=True)  # as a mounted volume, which cannot be renamed
    for place in ("an empty directory", "a new directory"):
        for count in range(1, 200, 4):
            died = killed_at(count, here / "deep", main, command)
            if died and Path("deep/m/model.safetensors").exists():
                files = [p for p in Path("deep/m").iterdir() if p.is_file()]
                assert {p.name: p.read_bytes() for p in files} == expected, (place, count)
                shutil.rmtree("deep/m")
            if not died:
                break
        assert count > 20
        assert {p.name: p.read_bytes() for p in Path("deep/m").iterdir()} == expected
        assert [p.name for p in Path("deep").iterdir()] == ["m"]
        shutil.rmtree("deep/m")
