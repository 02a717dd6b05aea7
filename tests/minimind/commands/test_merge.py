"""`minimind merge`."""

from __future__ import annotations

import torch
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
