"""MiniMind: a small language model, its tokenizer and data, and LoRA fine-tuning to try it on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data.sft import SFTDataset
    from .data.tokenizer import load_tokenizer
    from .model.checkpoint import load_model
    from .model.config import LMConfig
    from .model.transformer import MiniMindLM

__all__ = ["LMConfig", "MiniMindLM", "SFTDataset", "load_model", "load_tokenizer"]

# Imported when first used: torch and transformers take seconds, `minimind --help` should not.
_HOMES = {
    "LMConfig": "model.config",
    "MiniMindLM": "model.transformer",
    "SFTDataset": "data.sft",
    "load_model": "model.checkpoint",
    "load_tokenizer": "data.tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
