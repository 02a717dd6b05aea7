"""MiniMind: a small language model, its tokenizer and data, and LoRA fine-tuning to try it on."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .checkpoint import load_model
    from .config import LMConfig
    from .data import SFTDataset
    from .model import MiniMindLM
    from .tokenizer import load_tokenizer

__all__ = ["LMConfig", "MiniMindLM", "SFTDataset", "load_model", "load_tokenizer"]

# Imported when first used: torch and transformers take seconds, `minimind --help` should not.
_HOMES = {
    "LMConfig": "config",
    "MiniMindLM": "model",
    "SFTDataset": "data",
    "load_model": "checkpoint",
    "load_tokenizer": "tokenizer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
