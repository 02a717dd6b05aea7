"""The maths of LoRA on groups of rows in plain torch: the CPU path, and the truth.

Symbols: ``x [M, K]`` sorted by group, ``offsets [G]`` the end of each group's rows, ``weight
[G, N, K]``, ``lora_a [G, R, K]``, ``lora_b [G, N, R]``, ``bias [G, N]``, ``keep [M, K]`` boolean,
``xa [M, R]``, ``y [M, N]``. Rows beyond the last offset belong to no group: zero in y and dx.

Each group's products write into its rows of one buffer, and a group without rows costs nothing.
The road not taken: ``W + scale·B·A`` of every group, as a parametrisation makes it, pays for groups
without rows too, and in backward for the gradient of the whole weight.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear import reference as linear
from ..linear.reference import Grads, Needs, as_dtype, dbias_of, kept, rank_first


class Group(NamedTuple):
    """A group that has rows."""

    number: int
    start: int
    end: int


def groups_of(offsets: Tensor, rows: int) -> list[Group]:
    """The groups that have rows; waits for the device where the offsets are not on the CPU.

    Raises:
        ValueError: the offsets decrease, or point beyond the rows.
    """
    found = []
    start = 0
    for index, end in enumerate(offsets.tolist()):
        if end < start or end > rows:
            raise ValueError(
                f"offsets must be ends of groups, from 0 to the {rows} rows of x and never "
                f"decreasing; got {end} for group {index}, which begins at {start}"
            )
        if end > start:
            found.append(Group(index, start, end))
        start = end
    return found


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``xa = drop(x)·A_gᵀ``, ``y = x·W_gᵀ + scale·xa·B_gᵀ + bias_g`` for the rows of each group g.

    Returns ``(y, xa)`` in x's dtype; the weight may be wider and is rounded a group at a time.
    """
    groups = groups_of(offsets, x.shape[0])
    y = x.new_empty(x.shape[0], weight.shape[1])
    xa = x.new_empty(x.shape[0], lora_a.shape[1])
    _zero_beyond(y, groups)
    _zero_beyond(xa, groups)
    dropped = x if keep is None else kept(x, keep)
    weights, biases = weight.unbind(), None if bias is None else bias.unbind()
    factors_a = as_dtype(lora_a, x.dtype).mT.unbind()
    factors_b = as_dtype(lora_b, x.dtype).mT.unbind()
    for (g, *_), x_g, dropped_g, xa_g, y_g in _of(groups, x, dropped, xa, y):
        torch.mm(dropped_g, factors_a[g], out=xa_g)
        if keep is not None:
            xa_g.mul_(1.0 / (1.0 - dropout_p))
        w = as_dtype(weights[g], x.dtype)
        branch, base = (xa_g, factors_b[g], scale), (x_g, w.t(), 1.0)
        first_is_rank = rank_first(x_g.shape[0], lora_a.shape[1], *w.shape)
        first, second = (branch, base) if first_is_rank else (base, branch)
        if biases is None:
            torch.addmm(y_g, *first[:2], beta=0, alpha=first[2], out=y_g)
        else:
            torch.addmm(as_dtype(biases[g], x.dtype), *first[:2], alpha=first[2], out=y_g)
        torch.addmm(y_g, *second[:2], alpha=second[2], out=y_g)
    return y, xa


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    xa: Tensor,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
) -> Grads:
    """The gradients that ``needs`` asks for, from ``dy [M, N]``; zero for groups without rows.

    Of each group as `linear.reference.backward` has them.
    """
    groups = groups_of(offsets, dy.shape[0])
    dtype = dy.dtype
    dx = dy.new_empty(x.shape) if needs.x else None
    if dx is not None:
        _zero_beyond(dx, groups)
    # Written in place by `out`, which counters of FLOPs see and `addmm_` passes by.
    da = dy.new_zeros(lora_a.shape) if needs.lora_a else None
    db = dy.new_zeros(lora_b.shape) if needs.lora_b else None
    dweight = dy.new_zeros(weight.shape) if needs.weight else None
    dbias = dy.new_zeros(weight.shape[:2]) if needs.bias else None
    dropped = x if keep is None or not needs.lora_a else kept(x, keep)
    weights, factors_a = weight.unbind(), as_dtype(lora_a, dtype).unbind()
    factors_b = as_dtype(lora_b, dtype).unbind()
    # Wherever dxa is used the mask follows, so the 1 / (1 - p) of both goes in here.
    undropped = scale if keep is None else scale / (1.0 - dropout_p)
    rows = _of(groups, dy, x, dropped, xa, dx, keep)
    for (g, *_), dy_g, x_g, dropped_g, xa_g, dx_g, keep_g in rows:
        if needs.x or needs.lora_a:
            dxa = dy_g.mm(factors_b[g]).mul_(undropped)
        if dx_g is not None:
            _dx_into(dx_g, dy_g, as_dtype(weights[g], dtype), dxa, factors_a[g], keep_g)
        if da is not None:
            torch.mm(dxa.t(), dropped_g, out=da[g])
        if db is not None:
            torch.addmm(db[g], dy_g.t(), xa_g, beta=0, alpha=scale, out=db[g])
        if dweight is not None:
            torch.mm(dy_g.t(), x_g, out=dweight[g])
        if dbias is not None:
            dbias[g] = dbias_of(dy_g)
    return in_their_dtypes(Grads(dx, dweight, da, db, dbias), weight, lora_a, lora_b)


def _dx_into(
    dx: Tensor, dy: Tensor, weight: Tensor, dxa: Tensor, factor: Tensor, keep: Tensor | None
) -> None:
    """Write ``dy·W + mask⊙(dxa·A)`` of one group."""
    if rank_first(dy.shape[0], dxa.shape[1], *weight.shape):
        torch.mm(dxa, factor, out=dx)
        if keep is not None:
            dx.mul_(keep.view(torch.uint8))
        torch.addmm(dx, dy, weight, out=dx)
        return
    torch.mm(dy, weight, out=dx)
    if keep is None:
        torch.addmm(dx, dxa, factor, out=dx)
    else:
        dx.add_(kept(dxa.mm(factor), keep))


def widened_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """`forward` of 16-bit x with its products in float32; y in x's dtype, xa in float32.

    For CPUs that take a 16-bit product an element at a time, see `dispatch.widens`.
    """
    groups = groups_of(offsets, x.shape[0])
    y = x.new_empty(x.shape[0], weight.shape[1])
    xa = x.new_empty(x.shape[0], lora_a.shape[1], dtype=torch.float32)
    _zero_beyond(y, groups)
    _zero_beyond(xa, groups)
    for (g, *_), x_g, xa_g, y_g, keep_g in _of(groups, x, xa, y, keep):
        bias_g = None if bias is None else as_dtype(bias[g], x.dtype)
        w = as_dtype(weight[g], x.dtype)
        found = linear.widened_forward(
            x_g, w, lora_a[g], lora_b[g], bias_g, scale, keep_g, dropout_p
        )
        y_g.copy_(found[0])
        xa_g.copy_(found[1])
    return y, xa


def widened_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    xa: Tensor,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
) -> Grads:
    """`backward` of 16-bit dy with its products in float32; the gradients in their own dtypes."""
    groups = groups_of(offsets, dy.shape[0])
    dx = dy.new_zeros(x.shape) if needs.x else None
    dweight = weight.new_zeros(weight.shape) if needs.weight else None
    da = lora_a.new_zeros(lora_a.shape) if needs.lora_a else None
    db = lora_b.new_zeros(lora_b.shape) if needs.lora_b else None
    dbias = dy.new_zeros(weight.shape[:2]) if needs.bias else None
    for (g, *_), dy_g, x_g, xa_g, dx_g, keep_g in _of(groups, dy, x, xa, dx, keep):
        w = as_dtype(weight[g], dy.dtype)
        operands = dy_g, x_g, w, lora_a[g], lora_b[g], xa_g
        grads = linear.widened_backward(*operands, scale, keep_g, dropout_p, needs)
        into = (dx_g, *(None if t is None else t[g] for t in (dweight, da, db, dbias)))
        for target, grad in zip(into, grads, strict=True):
            if target is not None and grad is not None:
                target.copy_(grad)
    return Grads(dx, dweight, da, db, dbias)


def plain_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """``y`` as torch itself differentiates and batches it: each product by its own."""
    groups = groups_of(offsets, x.shape[0])
    end = groups[-1].end if groups else 0
    ys = [
        linear.plain_forward(
            x[start:stop],
            weight[g].to(x.dtype),
            lora_a[g],
            lora_b[g],
            None if bias is None else bias[g].to(x.dtype),
            None if keep is None else keep[start:stop],
            scale,
            dropout_p,
        )
        for g, start, stop in groups
    ]
    return torch.cat([*ys, x.new_zeros(x.shape[0] - end, weight.shape[1])])


def backward_with_graph(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
    dtype: torch.dtype,
) -> Grads:
    """`backward` by products that torch can differentiate again, taken in ``dtype``."""
    groups = groups_of(offsets, dy.shape[0])
    each = {
        g: linear.backward_with_graph(
            dy[start:end],
            None,
            x[start:end],
            weight[g],
            lora_a[g],
            lora_b[g],
            None,
            scale,
            None if keep is None else keep[start:end],
            dropout_p,
            needs,
            dtype,
        )
        for g, start, end in groups
    }
    beyond = dy.shape[0] - (groups[-1].end if groups else 0)
    dx = None
    if needs.x:
        parts: list[Any] = [grads.dx for grads in each.values()]
        dx = torch.cat([*parts, dy.new_zeros(beyond, x.shape[1], dtype=dtype)])
    shapes = weight.shape[1:], lora_a.shape[1:], lora_b.shape[1:], weight.shape[1:2]
    others: list[Any] = [None] * 4
    for i, (needed, shape) in enumerate(zip(needs[1:], shapes, strict=True)):
        if needed:
            zero = dy.new_zeros(shape, dtype=dtype)
            found = [each[g][1 + i] if g in each else zero for g in range(weight.shape[0])]
            others[i] = torch.stack(found)  # type: ignore[arg-type]
    dweight, da, db, dbias = others
    return Grads(dx, dweight, da, db, dbias)


def in_their_dtypes(grads: Grads, weight: Tensor, lora_a: Tensor, lora_b: Tensor) -> Grads:
    """The gradients of the weights and factors in the dtypes of these."""
    dweight, da, db = (
        None if grad is None else as_dtype(grad, of.dtype)
        for grad, of in zip(grads[1:4], (weight, lora_a, lora_b), strict=True)
    )
    return Grads(grads.dx, dweight, da, db, grads.dbias)


def _of(groups: list[Group], *tensors: Tensor | None) -> Iterator[tuple[Any, ...]]:
    """Each group with its rows of each tensor, None of None."""
    sizes = [group.end - group.start for group in groups]
    end = groups[-1].end if groups else 0
    rows: list[Any] = [
        [None] * len(sizes) if tensor is None else tensor[:end].split(sizes) for tensor in tensors
    ]
    return zip(groups, *rows, strict=True) if groups else iter(())


def _zero_beyond(tensor: Tensor, groups: list[Group]) -> None:
    """Zero the rows that belong to no group, which no product writes."""
    tensor[groups[-1].end if groups else 0 :].zero_()
