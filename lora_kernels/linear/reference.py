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
    # The big product first: it reads x from memory behind its arithmetic, the thin one from cache.
    y = F.linear(x, weight, bias)
    if keep is None:
        xa = x @ _as(lora_a, x.dtype).t()
    else:
        xa = _kept(x, keep) @ _as(lora_a, x.dtype).t() * (1.0 / (1.0 - dropout_p))
    factor = _as(lora_b, x.dtype).t()
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
    if needs.x:
        dx = dy @ weight  # first, as in forward
    if needs.x or needs.lora_a:
        # Wherever dxa is used the mask follows, so the 1 / (1 - p) of both goes in here.
        factor = scale if keep is None else scale / (1.0 - dropout_p)
        dxa = (dy @ _as(lora_b, dy.dtype)).mul_(factor)
    if dx is not None:  # while dx is in the cache
        if keep is None:
            dx.addmm_(dxa, _as(lora_a, dy.dtype))
        else:
            dx.addcmul_(dxa @ _as(lora_a, dy.dtype), keep.view(torch.uint8))
    if needs.lora_b:
        # MKL multiplies a tall dyᵀ at two thirds of the speed of the thin xaᵀ.
        db = (xa.t() @ dy).mul_(scale).t().contiguous()
        db = _as(db, lora_b.dtype)
    if needs.lora_a:
        da = _as(dxa.t() @ (x if keep is None else _kept(x, keep)), lora_a.dtype)
    if needs.weight:
        dweight = dy.t() @ x
    if needs.bias:
        dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype) if _narrow(dy) else dy.sum(0)
    return Grads(dx, dweight, da, db, dbias)


def _as(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`Tensor.to` for tensors that mostly are so already: a comparison instead of a call."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _kept(x: Tensor, keep: Tensor) -> Tensor:
    """``keep ⊙ x``, as torch's own dropout takes it: a dropped NaN or infinity makes a NaN."""
    # On a CPU seven times as fast as torch.where, and three times as a product with a boolean.
    return x * keep.view(torch.uint8)


def _narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
