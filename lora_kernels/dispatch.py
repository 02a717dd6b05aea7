"""Which implementation serves a call, and why. Policy only: no kernel is imported here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

BACKENDS = ("triton", "reference")

# What `use_backend` asked for, None outside of it.
_asked_for: str | None = None


class Choice(NamedTuple):
    """An implementation and the reason it was taken."""

    backend: str
    reason: str


def choose(x: Tensor) -> Choice:
    """The implementation for a call on ``x``, looked at anew in each call.

    Raises:
        RuntimeError: `use_backend` named one that cannot serve this call.
    """
    refusal = _triton_refusal(x)
    if _asked_for == "reference":
        return Choice("reference", "asked for by use_backend")
    if _asked_for == "triton":
        raise RuntimeError(
            f"use_backend('triton') was asked for, but Triton cannot serve this call: {refusal}. "
            "Leave the `with`, or ask for 'reference'."
        )
    return Choice("reference", refusal)


def _triton_refusal(x: Tensor) -> str:
    if x.device.type != "cuda":
        return f"x is on {x.device.type}, the kernels run on cuda"
    return "this version has no Triton kernels yet"


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Take ``"triton"`` or ``"reference"`` for every call inside the ``with``, in all threads.

    What is asked for by name never falls back: a call that the backend cannot serve raises
    RuntimeError with the reason.

    Raises:
        ValueError: an unknown name.
    """
    global _asked_for
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    before, _asked_for = _asked_for, backend
    try:
        yield
    finally:
        _asked_for = before


def explain(module_or_tensors: nn.Module | Tensor | tuple[Any, ...] | list[Any]) -> str:
    """Say which path a call would take and why, as ``"<backend>: <reason>"``.

    Where `use_backend` asked for what cannot serve the call, the backend is ``none``.

    Args:
        module_or_tensors: a module (its first floating-point parameter stands for its input), a
            tensor, or the arguments of `lora_linear` in order, beginning with x.

    Raises:
        TypeError: anything else.
        ValueError: a module without floating-point parameters.
    """
    if isinstance(module_or_tensors, nn.Module):
        floating = (p for p in module_or_tensors.parameters() if p.is_floating_point())
        x: Any = next(floating, None)
        if x is None:
            raise ValueError(
                f"{type(module_or_tensors).__name__} has no floating-point parameter to judge by; "
                "pass the input tensor instead"
            )
    elif isinstance(module_or_tensors, (tuple, list)) and module_or_tensors:
        x = module_or_tensors[0]
    else:
        x = module_or_tensors
    if not isinstance(x, torch.Tensor):
        raise TypeError(
            f"module_or_tensors must be a module, a tensor or a tuple of tensors, got {type(x)}"
        )
    try:
        choice = choose(x)
    except RuntimeError as refusal:
        return f"none: {refusal}"
    return f"{choice.backend}: {choice.reason}"
