"""The maths of a LoRA linear in plain torch: the CPU path, and the truth for every kernel.

Symbols: ``x [M, K]``, ``weight [N, K]``, ``lora_a [R, K]``, ``lora_b [N, R]``, ``bias [N]``,
``keep [M, K]`` boolean, ``xa [M, R]``, ``y [M, N]``; gradients are ``d`` + name.

A and B may be wider than x (float32 over bfloat16). The products are then taken in x's dtype, as
the tensor cores take them: A, B and dxa are each rounded to it once, and da, db are widened at
the end.

The road not taken: autograd of the one-line statement keeps ``drop(x)`` and ``x·Aᵀ`` alive, adds
the two branches in a pass of their own and sums two dx. Here one of the two products adds itself
onto the other (``addmm_``), so nothing of size ``[M, N]`` or ``[M, K]`` is made twice (eagerly; a
compiler is left to fuse the sum itself).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling


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
    if keep is None:
        xa = x.mm(as_dtype(lora_a, x.dtype).t())
    else:
        xa = kept(x, keep).mm(as_dtype(lora_a, x.dtype).t()).mul_(1.0 / (1.0 - dropout_p))
    return with_branch(x, weight, xa, lora_b, bias, scale), xa


def with_branch(
    x: Tensor, weight: Tensor, xa: Tensor, lora_b: Tensor, bias: Tensor | None, scale: float
) -> Tensor:
    """``x·Wᵀ + scale·xa·Bᵀ + bias``, of which one product adds itself onto the other."""
    factor = as_dtype(lora_b, x.dtype).t()
    if is_compiling():
        # torch 2.11 traces an output written in place into gradients that are silently zero.
        return F.linear(x, weight, bias).addmm(xa, factor, alpha=scale)
    if not rank_first(x.shape[0], xa.shape[1], *weight.shape):
        return F.linear(x, weight, bias).addmm_(xa, factor, alpha=scale)
    if bias is None:
        y = x.new_empty(x.shape[0], weight.shape[0]).addmm_(xa, factor, beta=0, alpha=scale)
    else:
        y = torch.addmm(bias, xa, factor, alpha=scale)
    return y.addmm_(x, weight.t())


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
        # Wherever dxa is used the mask follows, so the 1 / (1 - p) of both goes in here.
        factor = scale if keep is None else scale / (1.0 - dropout_p)
        dxa = dy.mm(as_dtype(lora_b, dy.dtype)).mul_(factor)
    if needs.x:
        factor_a = as_dtype(lora_a, dy.dtype)
        if not is_compiling() and rank_first(dy.shape[0], lora_a.shape[0], *weight.shape):
            dx = dxa.mm(factor_a)
            if keep is not None:
                dx.mul_(keep.view(torch.uint8))
            dx.addmm_(dy, weight)
        elif keep is None:
            dx = dy.mm(weight).addmm_(dxa, factor_a)
        else:
            dx = dy.mm(weight).add_(kept(dxa.mm(factor_a), keep))
    if needs.lora_b:
        db = db_of(dy, xa, scale, lora_b.dtype)
    if needs.lora_a:
        da = as_dtype(dxa.t().mm(x if keep is None else kept(x, keep)), lora_a.dtype)
    if needs.weight:
        dweight = dy.t().mm(x)
    if needs.bias:
        dbias = dbias_of(dy)
    return Grads(dx, dweight, da, db, dbias)


def db_of(dy: Tensor, xa: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """``scale·dyᵀ·xa [N, R]`` in ``dtype``."""
    if is_compiling() or dy.shape[0] < _MANY or torch.get_num_threads() > 1:
        db = dy.t().mm(xa).mul_(scale)
    else:
        db = xa.t().mm(dy).mul_(scale).t().contiguous()
    return as_dtype(db, dtype)


def dbias_of(dy: Tensor) -> Tensor:
    """``Σ dy [N]``, summed in float32 or wider."""
    return dy.sum(0, dtype=torch.float32).to(dy.dtype) if is_narrow(dy) else dy.sum(0)


def plain_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """``y`` as torch itself differentiates, batches and exports it: each product by its own."""
    xa = _xa_with_graph(x, lora_a, keep, dropout_p)
    return F.linear(x, weight, bias) + xa.mm(lora_b.to(x.dtype).t()) * scale


def backward_with_graph(
    dy: Tensor | None,
    dxa: Tensor | None,
    x: Tensor | None,
    weight: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor | None,
    scale: float,
    keep: Tensor | None,
    dropout_p: float,
    needs: Needs,
    dtype: torch.dtype,
) -> Grads:
    """`backward` by products that torch can differentiate again, taken in ``dtype``.

    Tensors that the gradients asked for do not read may be None. ``dxa`` is the gradient of the
    output ``xa``, which is one where x or A is not at hand to make it anew.
    """
    dy, x, weight, lora_a, lora_b = (
        t if t is None else t.to(dtype) for t in (dy, x, weight, lora_a, lora_b)
    )
    undropped = 1.0 if keep is None else 1.0 / (1.0 - dropout_p)
    dx = dweight = da = db = dbias = branch = None
    if needs.x or needs.lora_a:
        parts = [] if dxa is None else [dxa.to(dtype) * undropped]
        if dy is not None:
            parts.append(dy.mm(lora_b) * (scale * undropped))  # type: ignore[arg-type]
        branch = sum(parts[1:], parts[0])
    if needs.x and branch is not None:
        dx = branch.mm(lora_a)  # type: ignore[arg-type]
        if keep is not None:
            dx = kept(dx, keep)
        if dy is not None:
            dx = dx + dy.mm(weight)  # type: ignore[arg-type]
    if needs.lora_a and branch is not None:
        da = branch.t().mm(x if keep is None else kept(x, keep))  # type: ignore[arg-type]
    if dy is not None:
        if needs.lora_b:
            if x is not None and lora_a is not None:
                xa = _xa_with_graph(x, lora_a, keep, dropout_p)
            db = dy.t().mm(xa.to(dtype)) * scale  # type: ignore[union-attr]
        if needs.weight:
            dweight = dy.t().mm(x)  # type: ignore[arg-type]
        if needs.bias:
            dbias = dy.sum(0, dtype=torch.float32 if is_narrow(dy) else None)
    return Grads(dx, dweight, da, db, dbias)


def _xa_with_graph(x: Tensor, lora_a: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    xa = (x if keep is None else kept(x, keep)).mm(lora_a.to(x.dtype).t())
    return xa if keep is None else xa * (1.0 / (1.0 - dropout_p))


def widened_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`forward` of 16-bit x with its products in float32; y in x's dtype, xa in float32.

    For CPUs that take a 16-bit product an element at a time, see `dispatch.widens`.
    """
    if x.shape[0] < WIDENED_ROWS and not is_compiling():
        # Few rows are dot products with the rows of W, which those CPUs do read fast.
        y, xa = forward(x, weight, lora_a, lora_b, bias, scale, keep, dropout_p)
        return y, xa.float()
    factors = lora_a.float(), lora_b.float(), None if bias is None else bias.float()
    y, xa = forward(x.float(), weight.float(), *factors, scale, keep, dropout_p)
    return y.to(x.dtype), xa


def widened_backward(
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
    """`backward` of 16-bit dy with its products in float32; the gradients in their own dtypes."""
    operands = (
        dy.float(),
        x.float() if needs.lora_a or needs.weight else x,
        weight.float() if needs.x else weight,
        lora_a.float(),
        lora_b.float(),
        xa,
    )
    grads = backward(*operands, scale, keep, dropout_p, needs)
    like = (x, weight, lora_a, lora_b, dy)
    return Grads(
        *(None if grad is None else grad.to(of.dtype) for grad, of in zip(grads, like, strict=True))
    )


# From so many rows on buffers outgrow the cache, see `rank_first`; and one thread of MKL takes the
# tall dyᵀ at two thirds of the speed of the thin xaᵀ, where several share the tall one out better.
_MANY = 256
# From so many rows on it pays to widen the weight for forward, at 512 and at 4864 features alike.
WIDENED_ROWS = 16


def rank_first(rows: int, rank: int, n: int, k: int) -> bool:
    """Whether the big product adds itself onto the rank part, and not the other way round.

    That it reads what it adds onto hides behind its arithmetic, which is worth up to 8 % with many
    rows; few stay in the cache. Onto a rank part that outweighs it, it would add less exactly.
    """
    return rows >= _MANY and 4 * rank <= min(n, k)


def as_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`Tensor.to` for tensors that mostly are so already: a comparison instead of a call."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def kept(x: Tensor, keep: Tensor) -> Tensor:
    """``keep ⊙ x``, as torch's own dropout takes it: a dropped NaN or infinity makes a NaN."""
    # On a CPU seven times as fast as torch.where, and three times as a product with a boolean.
    return x * keep.view(torch.uint8)


def is_narrow(tensor: Tensor) -> bool:
    return tensor.dtype in (torch.float16, torch.bfloat16)
