"""What shows that the kernels are right, and what they take of a GPU."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cases import Case, LayerCase, Tensors
    from .closeness import ROUNDING, distance
    from .resources import Launch, launches_of, source_of
    from .workers import Lost, processors, spread

__all__ = [
    "ROUNDING",
    "Case",
    "Launch",
    "LayerCase",
    "Lost",
    "Tensors",
    "distance",
    "launches_of",
    "processors",
    "source_of",
    "spread",
]

# Imported when first used: some of it needs Triton, which may be absent.
_HOMES = {
    "Case": "cases",
    "LayerCase": "cases",
    "Tensors": "cases",
    "ROUNDING": "closeness",
    "distance": "closeness",
    "Launch": "resources",
    "launches_of": "resources",
    "source_of": "resources",
    "Lost": "workers",
    "processors": "workers",
    "spread": "workers",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
