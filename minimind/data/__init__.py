"""Conversations, the tokenizer that reads them, and the project's own text."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .forms import read_conversations
    from .reading import find_data
    from .sft import SFTDataset

__all__ = ["SFTDataset", "find_data", "read_conversations"]

# Imported when first used: the toy data is made without torch.
_HOMES = {"SFTDataset": "sft", "find_data": "reading", "read_conversations": "forms"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
