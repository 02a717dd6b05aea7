"""The `minimind` command on a model so small that a run takes a second."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from minimind import LMConfig, MiniMindLM
from minimind.cli import main
from minimind.model.checkpoint import save_model

SIZES = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}


def make_base(directory, **sizes):
    """A random model in ``directory``, the same every time."""
    torch.manual_seed(0)
    save_model(MiniMindLM(LMConfig(**{**SIZES, **sizes})), directory, torch.float32)


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, conversations):
    lines = [json.dumps({"conversations": c}, ensure_ascii=False) for c in conversations]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def finetune(*options):
    return main(
        ["finetune", "--base", "base", "--data", "data.jsonl", "--epochs", "2", "--batch-size", "4",
         "--dtype", "float32", "--lr", "0.01", *options]
    )  # fmt: skip
