"""The ways to write a LoRA linear in plain PyTorch that ours has to beat.

All take ``(x [M, K], weight [N, K], lora_a [R, K], lora_b [N, R], scale, dropout)`` and return
``x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ``; the weight gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def three_calls(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float
) -> Tensor:
    """Three linears and a sum, as the formula is read."""
    dropped = F.dropout(x, dropout) if dropout else x
    return F.linear(x, weight) + scale * F.linear(F.linear(dropped, lora_a), lora_b)


def three_calls_addmm(
    x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float
) -> Tensor:
    """The scale and the sum left to ``addmm``: the best of the plain statements."""
    dropped = F.dropout(x, dropout) if dropout else x
    return torch.addmm(F.linear(x, weight), dropped @ lora_a.t(), lora_b.t(), alpha=scale)


class AddmmFunction(torch.autograd.Function):
    """A hand-written backward of matrix products that add onto each other, nothing saved but x.

    The shape of the LoRA layers of Unsloth and Axolotl: ``x·Aᵀ`` is made again in backward, which
    saves memory for a pass over x. Without dropout, as theirs.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, scale: float
    ) -> Tensor:
        y = x @ weight.t()
        y.addmm_(x @ lora_a.t(), lora_b.t(), alpha=scale)
        ctx.save_for_backward(x, weight, lora_a, lora_b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, lora_a, lora_b = ctx.saved_tensors
        dy_b = dy @ lora_b
        da, db = torch.empty_like(lora_a), torch.empty_like(lora_b)
        da.addmm_(dy_b.t(), x, beta=0, alpha=ctx.scale)
        db.addmm_(dy.t(), x @ lora_a.t(), beta=0, alpha=ctx.scale)
        dx = dy @ weight
        dx.addmm_(dy_b, lora_a, alpha=ctx.scale)
        return dx, None, da, db, None


class Beta1Function(torch.autograd.Function):
    """The rank part written first, the big product added onto it (``beta = 1``)."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        scale: float,
        dropout: float,
    ) -> Tensor:
        if dropout:
            dropped, keep = torch.native_dropout(x, dropout, True)
        else:
            dropped, keep = x, None
        xa = dropped @ lora_a.t()
        y = (xa * scale) @ lora_b.t()
        y.addmm_(x, weight.t())
        ctx.save_for_backward(x, keep, weight, lora_a, lora_b, xa)
        ctx.scale, ctx.dropout = scale, dropout
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, keep, weight, lora_a, lora_b, xa = ctx.saved_tensors
        factor = 1.0 / (1.0 - ctx.dropout)
        dxa = (dy @ lora_b).mul_(ctx.scale * factor)
        dx = dxa @ lora_a
        if keep is None:
            dropped = x
        else:
            dropped = x * keep
            dx.mul_(keep)
        dx.addmm_(dy, weight)
        db = (dy.t() @ xa).mul_(ctx.scale)
        return dx, None, dxa.t() @ dropped, db, None, None


class GroupAddmmFunction(torch.autograd.Function):
    """Linears that share x in one hand-written Function, as Axolotl and Unsloth have for q, k, v.

    ``apply(x, scale, *weights, *lora_as, *lora_bs)`` gives the ys. What `AddmmFunction` does for
    each, and dx summed by products that add onto it. Without dropout, as theirs.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.scale, ctx.count = scale, len(tensors) // 3
        ctx.save_for_backward(x, *tensors)
        weights, lora_as, lora_bs = GroupAddmmFunction._apart(tensors)
        ys = []
        for weight, lora_a, lora_b in zip(weights, lora_as, lora_bs, strict=True):
            y = x @ weight.t()
            ys.append(y.addmm_(x @ lora_a.t(), lora_b.t(), alpha=scale))
        return tuple(ys)

    @staticmethod
    def _apart(tensors: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
        count = len(tensors) // 3
        return [tensors[i : i + count] for i in range(0, 3 * count, count)]

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, *tensors = ctx.saved_tensors
        das, dbs = [], []
        dx: Tensor | None = None
        for dy, weight, lora_a, lora_b in zip(
            dys, *GroupAddmmFunction._apart(tuple(tensors)), strict=True
        ):
            dy_b = dy @ lora_b
            da, db = torch.empty_like(lora_a), torch.empty_like(lora_b)
            das.append(da.addmm_(dy_b.t(), x, beta=0, alpha=ctx.scale))
            dbs.append(db.addmm_(dy.t(), x @ lora_a.t(), beta=0, alpha=ctx.scale))
            dx = dy @ weight if dx is None else dx.addmm_(dy, weight)
            dx.addmm_(dy_b, lora_a, alpha=ctx.scale)
        return (dx, None, *[None] * ctx.count, *das, *dbs)
