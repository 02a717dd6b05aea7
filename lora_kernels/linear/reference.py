"""The maths of a LoRA linear in plain torch: the CPU path, and the truth for every kernel.

Symbols: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``bias [N]``,
``keep [M, K]`` boolean, ``xa [M, R]``, ``y [M, N]``; gradients are ``d`` + name.

A and B may be wider than x (float32 over bfloat16). The products are then taken in x's dtype, as
the tensor cores take them: A, B and dxa are each rounded to it once, and da, db are widened at
the end.

The road not taken: autograd of the one-line statement keeps ``drop(x)`` and ``x·Aᵀ`` alive, adds
the two branches in a pass of their own and sums two dx. Here the branch is accumulated by the
matrix product itself (``addmm_``), so nothing of size ``[M, N]`` or ``[M, K]`` is made twice
without dropout (eagerly; a compiler is left to fuse the sum itself).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropout import apply_keep_mask


class Needs(NamedTuple):
    """Which gradients somebody asked for."""

    x: bool
    weight: bool
    lora_a: bool
    lora_b: bool
    bias: bool


class Grads(NamedTuple):
    """The gradients, None where not asked for."""

    dx: Tensor | None
    dweight: Tensor | None
    da: Tensor | None
    db: Tensor | None
    dbias: Tensor | None


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``xa = drop(x)·Aᵀ``, ``y = x·Wᵀ + scale·xa·Bᵀ + bias``; returns ``(y, xa)`` in x's dtype."""
    dropped = x if keep is None else apply_keep_mask(x, keep, dropout_p)
    xa = dropped @ lora_a.to(x.dtype).t()
    y = F.linear(x, weight, bias)
    factor = lora_b.to(x.dtype).t()
    if torch.compiler.is_compiling():
        # torch 2.11 traces an output written in place into gradients that are silently zero.
        return y.addmm(xa, factor, alpha=scale), xa
    return y.addmm_(xa, factor, alpha=scale), xa


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scale: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: Needs,
) -> Grads:
    """The gradients that ``needs`` asks for, from ``dy [M, N]`` of any strides.

    ``dxa = scale·dy·B``, ``db = scale·dyᵀ·xa``, ``da = dxaᵀ·drop(x)``,
    ``dx = dy·W + mask⊙(dxa·A)``, ``dweight = dyᵀ·x``, ``dbias = Σ dy``.
    """
    dx = dweight = da = db = dbias = None
    if needs.x or needs.lora_a:
        dxa = (dy @ lora_b.to(dy.dtype)).mul_(scale)
    if needs.lora_b:
        db = (dy.t() @ xa).mul_(scale).to(lora_b.dtype)
    if needs.lora_a:
        dropped = x if keep is None else apply_keep_mask(x, keep, dropout_p)
        da = (dxa.t() @ dropped).to(lora_a.dtype)
    if needs.x:
        dx = dy @ weight
        factor = lora_a.to(dy.dtype)
        if keep is None:
            dx.addmm_(dxa, factor)
        else:
            dx.add_(apply_keep_mask(dxa @ factor, keep, dropout_p))
    if needs.weight:
        dweight = dy.t() @ x
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype) if _narrow(dy) else dy.sum(0)
    return Grads(dx, dweight, da, db, dbias)


def _narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
