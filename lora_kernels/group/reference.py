"""The maths of linears that share their input, in plain torch: the CPU path, and the truth.

Symbols as in `linear.reference`, one of each for every member i: ``weight_i [N_i, K]``, ``lora_a_i
[R_i, K]``, ``lora_b_i [N_i, R_i]``, ``bias_i [N_i]``; A and B are None for a member without LoRA.
One ``keep [M, K]`` serves all, and ``xa [M, ΣR]`` holds the members' columns side by side.

What is gained over the members one by one: x is dropped once and read once for all ``xa`` and once
for all ``da``, and the sum of their dx is made by the products themselves, each adding onto it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..linear.reference import (
    WIDENED_ROWS,
    as_dtype,
    db_of,
    dbias_of,
    is_narrow,
    kept,
    rank_first,
    with_branch,
)
from .packing import stacked

Factors = Sequence[Tensor | None]
Found = tuple[Tensor | None, ...]


class GroupNeeds(NamedTuple):
    """Which gradients somebody asked for, of the members in their order."""

    x: bool
    weights: tuple[bool, ...]
    lora_as: tuple[bool, ...]
    lora_bs: tuple[bool, ...]
    biases: tuple[bool, ...]


class GroupGrads(NamedTuple):
    """The gradients, None where not asked for."""

    dx: Tensor | None
    dweights: Found
    das: Found
    dbs: Found
    dbiases: Found


def rank_spans(lora_as: Factors) -> list[slice | None]:
    """Which columns of ``xa`` are each member's, None for one without LoRA."""
    spans: list[slice | None] = []
    end = 0
    for lora_a in lora_as:
        if lora_a is None:
            spans.append(None)
            continue
        spans.append(slice(end, end + lora_a.shape[0]))
        end += lora_a.shape[0]
    return spans


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors,
    scales: Sequence[float],
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """``xa = drop(x)·[A_0; A_1; …]ᵀ``, ``y_i = x·W_iᵀ + scale_i·xa_i·B_iᵀ + bias_i``.

    Returns ``(ys, xa)`` in x's dtype; xa is None where no member has LoRA.
    """
    xa = _xa_of(x, lora_as, keep, dropout_p)
    ys = []
    for weight, lora_b, bias, scale, span in zip(
        weights, lora_bs, biases, scales, rank_spans(lora_as), strict=True
    ):
        if span is None or xa is None or lora_b is None:
            ys.append(F.linear(x, weight, bias))
        else:
            ys.append(with_branch(x, weight, xa[:, span], lora_b, bias, scale))
    return tuple(ys), xa


def backward(
    dys: Factors,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    xa: Tensor | None,
    scales: Sequence[float],
    keep: Tensor | None,
    dropout_p: float,
    needs: GroupNeeds,
) -> GroupGrads:
    """The gradients that ``needs`` asks for, from ``dy_i [M, N_i]``, None for one nobody used.

    ``dx = Σ dy_i·W_i + mask⊙Σ dxa_i·A_i``; the others as `linear.reference.backward` has them.
    """
    spans = rank_spans(lora_as)
    used = [i for i, dy in enumerate(dys) if dy is not None]
    # Members whose dxa somebody reads, with their part of it.
    wanting = [i for i in used if spans[i] and (needs.x or needs.lora_as[i])]
    dxa = a_of = None
    if wanting:
        # Wherever dxa is used the mask follows, so the 1 / (1 - p) of both goes in here.
        undropped = 1.0 if keep is None else 1.0 / (1.0 - dropout_p)
        dxa = torch.cat([_dxa_of(dys[i], lora_bs[i], scales[i] * undropped) for i in wanting], 1)
    dx = None
    if needs.x and used:
        if dxa is not None:
            a_of = stacked([lora_as[i] for i in wanting], dxa.dtype)  # type: ignore[misc]
        dx = _dx_of([(dys[i], weights[i]) for i in used], dxa, a_of, keep)  # type: ignore[misc]
    count = len(weights)
    dweights: list[Tensor | None] = [None] * count
    das, dbs, dbiases = [*dweights], [*dweights], [*dweights]
    learning = [i for i in wanting if needs.lora_as[i]]
    if learning and dxa is not None:
        widths = [lora_as[i].shape[0] for i in wanting]  # type: ignore[union-attr]
        own = dict(zip(wanting, dxa.split(widths, 1), strict=True))
        some = dxa if learning == wanting else torch.cat([own[i] for i in learning], 1)
        da = some.t().mm(x if keep is None else kept(x, keep))
        each = da.split([lora_as[i].shape[0] for i in learning])  # type: ignore[union-attr]
        for i, part in zip(learning, each, strict=True):
            das[i] = as_dtype(part, lora_as[i].dtype)  # type: ignore[union-attr]
    for i in used:
        dy, lora_b = dys[i], lora_bs[i]
        assert dy is not None
        if needs.lora_bs[i] and lora_b is not None and xa is not None:
            dbs[i] = db_of(dy, xa[:, spans[i]], scales[i], lora_b.dtype)
        if needs.weights[i]:
            dweights[i] = dy.t().mm(x)
        if needs.biases[i]:
            dbiases[i] = dbias_of(dy)
    return GroupGrads(dx, tuple(dweights), tuple(das), tuple(dbs), tuple(dbiases))


def plain_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors,
    scales: Sequence[float],
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[Tensor, ...]:
    """``ys`` as torch itself differentiates, batches and exports them: each product by its own."""
    xa = _xa_with_graph(x, lora_as, keep, dropout_p)
    ys = []
    for weight, lora_b, bias, scale, span in zip(
        weights, lora_bs, biases, scales, rank_spans(lora_as), strict=True
    ):
        y = F.linear(x, weight, bias)
        if span is not None and xa is not None and lora_b is not None:
            y = y + xa[:, span].mm(lora_b.to(x.dtype).t()) * scale
        ys.append(y)
    return tuple(ys)


def backward_with_graph(
    dys: Factors,
    d_xa: Tensor | None,
    x: Tensor | None,
    weights: Factors,
    lora_as: Factors,
    lora_bs: Factors,
    xa: Tensor | None,
    ranks: Sequence[int | None],
    scales: Sequence[float],
    keep: Tensor | None,
    dropout_p: float,
    needs: GroupNeeds,
    dtype: torch.dtype,
) -> GroupGrads:
    """`backward` by products that torch can differentiate again, taken in ``dtype``.

    Tensors that the gradients asked for do not read may be None; ``ranks`` says which members have
    LoRA. ``d_xa`` is the gradient of the output ``xa``, which is one where x or the A's are not at
    hand to make it anew.
    """

    def wide(tensors: Factors) -> list[Tensor | None]:
        return [None if tensor is None else tensor.to(dtype) for tensor in tensors]

    (x, d_xa), dys, weights = wide((x, d_xa)), wide(dys), wide(weights)
    lora_as, lora_bs = wide(lora_as), wide(lora_bs)
    undropped = 1.0 if keep is None else 1.0 / (1.0 - dropout_p)
    dropped = x if x is None or keep is None else kept(x, keep)
    count, end = len(ranks), 0
    dweights: list[Tensor | None] = [None] * count
    das, dbs, dbiases = [*dweights], [*dweights], [*dweights]
    base: list[Tensor] = []
    branches: list[Tensor] = []
    for i, (dy, rank) in enumerate(zip(dys, ranks, strict=True)):
        columns = slice(end, end + (rank or 0))
        end = columns.stop
        lora_a, lora_b = lora_as[i], lora_bs[i]
        if dy is not None:
            if needs.x:
                base.append(dy.mm(weights[i]))  # type: ignore[arg-type]
            if needs.weights[i]:
                dweights[i] = dy.t().mm(x)  # type: ignore[arg-type]
            if needs.biases[i]:
                dbiases[i] = dy.sum(0, dtype=torch.float32 if is_narrow(dy) else None)
            if needs.lora_bs[i]:
                if dropped is not None and lora_a is not None:
                    own = dropped.mm(lora_a.t()) * undropped
                else:
                    own = xa[:, columns].to(dtype)  # type: ignore[index]
                dbs[i] = dy.t().mm(own) * scales[i]
        if rank is None or not (needs.x or needs.lora_as[i]):
            continue
        parts = [] if d_xa is None else [d_xa[:, columns] * undropped]
        if dy is not None:
            parts.append(dy.mm(lora_b) * (scales[i] * undropped))  # type: ignore[arg-type]
        if not parts:
            continue
        dxa = sum(parts[1:], parts[0])
        if needs.x:
            branches.append(dxa.mm(lora_a))  # type: ignore[arg-type]
        if needs.lora_as[i]:
            das[i] = dxa.t().mm(dropped)  # type: ignore[arg-type]
    if branches:
        branch = sum(branches[1:], branches[0])
        base.append(branch if keep is None else kept(branch, keep))
    dx = sum(base[1:], base[0]) if base else None
    return GroupGrads(dx, tuple(dweights), tuple(das), tuple(dbs), tuple(dbiases))


def widened_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors,
    scales: Sequence[float],
    keep: Tensor | None,
    dropout_p: float,
) -> tuple[tuple[Tensor, ...], Tensor | None]:
    """`forward` of 16-bit x with its products in float32; ys in x's dtype, xa in float32."""
    dtype = x.dtype
    if x.shape[0] < WIDENED_ROWS and not is_compiling():
        ys, xa = forward(x, weights, lora_as, lora_bs, biases, scales, keep, dropout_p)
        return ys, None if xa is None else xa.float()
    floats: Any = [_floats(kind) for kind in (weights, lora_as, lora_bs, biases)]
    weights, lora_as, lora_bs, biases = floats
    ys, xa = forward(x.float(), weights, lora_as, lora_bs, biases, scales, keep, dropout_p)
    return tuple(y.to(dtype) for y in ys), xa


def widened_backward(
    dys: Factors,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    xa: Tensor | None,
    scales: Sequence[float],
    keep: Tensor | None,
    dropout_p: float,
    needs: GroupNeeds,
) -> GroupGrads:
    """`backward` of 16-bit dy with its products in float32; the gradients in their own dtypes."""
    grads = backward(
        _floats(dys),
        x.float() if any(needs.lora_as) or any(needs.weights) else x,
        _floats(weights) if needs.x else weights,  # type: ignore[arg-type]
        _floats(lora_as),
        _floats(lora_bs),
        xa,
        scales,
        keep,
        dropout_p,
        needs,
    )
    return in_their_dtypes(grads, x, weights, lora_as, lora_bs)


def in_their_dtypes(
    grads: GroupGrads, x: Tensor, weights: Sequence[Tensor], lora_as: Factors, lora_bs: Factors
) -> GroupGrads:
    """The same gradients, each in the dtype of what it is the gradient of."""

    def like(found: Found, of: Factors) -> Found:
        pairs = zip(found, of, strict=True)
        return tuple(g if g is None or t is None else g.to(t.dtype) for g, t in pairs)

    dx = None if grads.dx is None else grads.dx.to(x.dtype)
    dbiases = tuple(None if g is None else g.to(x.dtype) for g in grads.dbiases)
    return GroupGrads(
        dx,
        like(grads.dweights, weights),
        like(grads.das, lora_as),
        like(grads.dbs, lora_bs),
        dbiases,
    )


def _floats(tensors: Factors) -> list[Tensor | None]:
    return [None if tensor is None else tensor.float() for tensor in tensors]


def _xa_of(x: Tensor, lora_as: Factors, keep: Tensor | None, dropout_p: float) -> Tensor | None:
    factors = [a for a in lora_as if a is not None]
    if not factors:
        return None
    factor = stacked(factors, x.dtype).t()
    if keep is None:
        return x.mm(factor)
    return kept(x, keep).mm(factor).mul_(1.0 / (1.0 - dropout_p))


def _xa_with_graph(
    x: Tensor, lora_as: Factors, keep: Tensor | None, dropout_p: float
) -> Tensor | None:
    factors = [a for a in lora_as if a is not None]
    if not factors:
        return None
    xa = (x if keep is None else kept(x, keep)).mm(stacked(factors, x.dtype).t())
    return xa if keep is None else xa * (1.0 / (1.0 - dropout_p))


def _dxa_of(dy: Tensor | None, lora_b: Tensor | None, factor: float) -> Tensor:
    assert dy is not None and lora_b is not None
    return dy.mm(as_dtype(lora_b, dy.dtype)).mul_(factor)


def _dx_of(
    products: Sequence[tuple[Tensor, Tensor]],
    dxa: Tensor | None,
    lora_a: Tensor | None,
    keep: Tensor | None,
) -> Tensor:
    """``Σ dy·W + mask⊙(dxa·A)``."""
    (dy, weight), *others = products
    if is_compiling():
        dx = dy.mm(weight)
        for dy, weight in others:
            dx = dx + dy.mm(weight)
        if dxa is None or lora_a is None:
            return dx
        branch = dxa.mm(lora_a)
        return dx + (branch if keep is None else kept(branch, keep))
    wide = sum(w.shape[0] for _, w in products)
    first = dxa is not None and rank_first(dy.shape[0], dxa.shape[1], wide, weight.shape[1])
    if first and dxa is not None and lora_a is not None:
        dx = dxa.mm(lora_a)
        if keep is not None:
            dx.mul_(keep.view(torch.uint8))
        for dy, weight in products:
            dx.addmm_(dy, weight)
        return dx
    dx = dy.mm(weight)
    for dy, weight in others:
        dx.addmm_(dy, weight)
    if dxa is None or lora_a is None:
        return dx
    return dx.addmm_(dxa, lora_a) if keep is None else dx.add_(kept(dxa.mm(lora_a), keep))
