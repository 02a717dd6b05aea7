"""Backward of a group by the kernels: what of it to compute, in what order, by which of them.

One launch reads each dy once for every member's ``dxa``, ``db`` and ``dbias``, one reads x once for
every ``da``, and ``dx`` is the sum over the members as one product (`sum_gemm`, `sum_hopper`), or
cuBLAS's products, each adding itself on. A member whose dy is None takes no part in any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..kernels import plans, tuning
from ..kernels.gemm import plan_expand
from ..kernels.hopper import rows_suit_tma, suits_tma
from ..kernels.launching import Layout, layout_of, num_sms
from ..kernels.members import Tensors, alike, layout_of_stacked, starts
from ..kernels.sum_gemm import plan_sum_gemm
from ..kernels.sum_hopper import plan_sum_hopper
from ..kernels.thin import plan_da, plan_db
from ..kernels.tiles import ceil_div
from ..kernels.tuning import Config, Shape
from ..linear.backward import SKINNY_RANK, slabs_outweigh
from . import reference
from .dxa_db import FromDys, OfDys, plan_group_dxa_db
from .packing import stacked
from .reference import GroupGrads, GroupNeeds

_Lookup = Callable[..., Config]
# Called with the dys, the weights, dxa, A stacked and the keep bits, it gives dx.
_Dx = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Tensor, Tensor | None], Tensor]


def backward(
    dys: Tensors,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Tensors,
    lora_bs: Tensors,
    xa: Tensor | None,
    scales: Sequence[float],
    keep_bits: Tensor | None,
    dropout_p: float,
    needs: GroupNeeds,
    capability: tuple[int, int],
) -> GroupGrads:
    """The gradients that ``needs`` asks for; as `reference.backward`, with packed keep bits.

    No dimension may be 0. The gradients of one kind may be slices of one buffer.
    """
    dys = [None if dy is None else dy if _in_rows(dy) else dy.contiguous() for dy in dys]
    low = 0
    for tensor in (*dys, *weights):
        low |= 0 if tensor is None else tensor.data_ptr()
    p = dropout_p if keep_bits is not None else 0.0
    settings = tuple(scales), p, needs, capability, not low % 16
    tensors = (x, *dys, *weights, *lora_as, *lora_bs, xa, keep_bits)
    key = plans.key("group backward", tensors, settings)
    run = plans.find(key)
    if run is None:
        run = plans.keep(
            key,
            plan_backward(
                [layout_of(dy) for dy in dys],
                Layout.of(x),
                [Layout.of(weight) for weight in weights],
                [layout_of(lora_a) for lora_a in lora_as],
                [layout_of(lora_b) for lora_b in lora_bs],
                layout_of(xa),
                layout_of(keep_bits),
                *settings,
            ),
        )
    grads: GroupGrads = run(dys, x, weights, lora_as, lora_bs, xa, keep_bits)
    return grads


def _in_rows(dy: Tensor) -> bool:
    return dy.stride(1) == 1 or dy.shape[1] == 1


def plan_backward(
    dys: Sequence[Layout | None],
    x: Layout,
    weights: Sequence[Layout],
    lora_as: Sequence[Layout | None],
    lora_bs: Sequence[Layout | None],
    xa: Layout | None,
    keep_bits: Layout | None,
    scales: Sequence[float],
    dropout_p: float,
    needs: GroupNeeds,
    capability: tuple[int, int],
    aligned: bool,
) -> Callable[..., GroupGrads]:
    """`backward` for tensors of these layouts; called with them.

    ``aligned`` says whether the addresses of the dys and the weights are multiples of 16.
    """
    (m, k), dtype = x.shape, x.dtype
    used = [i for i, dy in enumerate(dys) if dy is not None]
    ranks = [0 if dys[i] is None or a is None else a.shape[0] for i, a in enumerate(lora_as)]
    if not any(ranks):
        return _by_torch(scales, needs)
    widths = [weights[i].shape[0] for i in used]
    # cuBLAS's products add themselves onto dx one by one, each of them with its own contraction.
    of_dx = Shape(m, k, ceil_div(sum(widths), len(used)), sum(ranks))
    name = tuning.strategy(
        "dx",
        capability,
        dtype,
        of_dx,
        dropped=keep_bits is not None,
        tma=aligned
        and k % 8 == 0
        and all(rows_suit_tma(dys[i]) and suits_tma(weights[i]) for i in used),  # type: ignore[arg-type]
        sms=num_sms(x),
        alike=alike([weights[i] for i in used]),
    )
    if name == "aten":
        return _by_torch(scales, needs)

    def config(kernel: str, of: Shape) -> Config:
        return tuning.lookup(kernel, capability, dtype.itemsize, of)

    with_rank = [i for i in used if ranks[i]]
    # Which members dy is read of, and which of those have columns in dxa.
    read = [i for i in used if ranks[i] or needs.biases[i]]
    need_dxa = needs.x or any(needs.lora_as[i] for i in with_rank)
    columns = starts([0 if a is None else a.shape[0] for a in lora_as])
    from_dys = _plan_from_dys(
        [dys[i] for i in read],  # type: ignore[misc]
        [lora_bs[i] if ranks[i] else None for i in read],
        xa,
        [columns[i] for i in read],
        [scales[i] for i in read],
        need_dxa,
        any(needs.lora_bs[i] for i in with_rank),
        any(needs.biases[i] for i in used),
        config,
    )
    dxa = x.filled(m, sum(ranks))
    factors = [lora_as[i] for i in with_rank]
    factor = layout_of_stacked(factors)
    da_of = dx_of = None
    if any(needs.lora_as[i] for i in with_rank):
        da_of = _plan_da(dxa, x, factor.dtype, keep_bits, dropout_p, config)
    if needs.x:
        operands = [dys[i] for i in used], [weights[i] for i in used]
        dx_of = _plan_dx(name, *operands, dxa, factor, keep_bits, dropout_p, of_dx, config)  # type: ignore[arg-type]
    sizes = [ranks[i] for i in with_rank]

    def run(
        dys: Tensors,
        x: Tensor,
        weights: Sequence[Tensor],
        lora_as: Tensors,
        lora_bs: Tensors,
        xa: Tensor | None,
        keep_bits: Tensor | None,
    ) -> GroupGrads:
        found = from_dys([dys[i] for i in read], [lora_bs[i] for i in read], xa)  # type: ignore[misc]
        none: list[Tensor | None] = [None] * len(dys)
        dweights, das, dbs, dbiases, dx = [*none], [*none], [*none], [*none], None
        for i, db, dbias in zip(read, found.dbs, found.dbiases, strict=True):
            dbs[i] = db if needs.lora_bs[i] else None
            dbiases[i] = dbias if needs.biases[i] else None
        if da_of is not None and found.dxa is not None:
            da = da_of(found.dxa, x, keep_bits)
            for i, part in zip(with_rank, da.split(sizes), strict=True):
                if needs.lora_as[i]:
                    das[i] = part.to(lora_as[i].dtype)  # type: ignore[union-attr]
        if dx_of is not None and found.dxa is not None:
            given = [dys[i] for i in used], [weights[i] for i in used]
            factor = stacked([lora_as[i] for i in with_rank])  # type: ignore[misc]
            dx = dx_of(*given, found.dxa, factor, keep_bits)  # type: ignore[arg-type]
        for i in used:
            if needs.weights[i]:
                dweights[i] = dys[i].t() @ x  # type: ignore[union-attr]
        return GroupGrads(dx, tuple(dweights), tuple(das), tuple(dbs), tuple(dbiases))

    return run


def _by_torch(scales: Sequence[float], needs: GroupNeeds) -> Callable[..., GroupGrads]:
    """The reference's products, where nothing is dropped."""

    def run(dys: Tensors, x: Tensor, *others: object) -> GroupGrads:
        weights, lora_as, lora_bs, xa, _ = others
        return reference.backward(
            dys,
            x,
            weights,  # type: ignore[arg-type]
            lora_as,  # type: ignore[arg-type]
            lora_bs,  # type: ignore[arg-type]
            xa,  # type: ignore[arg-type]
            scales,
            None,
            0.0,
            needs,
        )

    return run


def _plan_from_dys(
    dys: Sequence[Layout],
    lora_bs: Sequence[Layout | None],
    xa: Layout | None,
    columns: Sequence[int],
    scales: Sequence[float],
    need_dxa: bool,
    need_db: bool,
    need_dbias: bool,
    config: _Lookup,
) -> OfDys:
    """``dxa``, the ``db`` and the ``dbias`` of the dys, the B and xa."""
    m, dtype = dys[0].shape[0], dys[0].dtype
    ranks = [0 if lora_b is None else lora_b.shape[1] for lora_b in lora_bs]
    widths, rank = [dy.shape[1] for dy in dys], max(ranks)
    spans = [slice(at, at + r) for at, r in zip(columns, ranks, strict=True)]
    if not (need_dxa or need_db) or rank > SKINNY_RANK:

        def by_torch(dys: Sequence[Tensor], lora_bs: Tensors, xa: Tensor | None) -> FromDys:
            parts, dbs, dbiases = [], [], []
            for dy, lora_b, scale, span, r in zip(dys, lora_bs, scales, spans, ranks, strict=True):
                db = None
                if r and need_dxa:
                    parts.append((dy @ lora_b.to(dtype)).mul_(scale))  # type: ignore[union-attr]
                if r and need_db and xa is not None:
                    db = (dy.t() @ xa[:, span]).mul_(scale).to(lora_b.dtype)  # type: ignore[union-attr]
                dbs.append(db)
                total = dy.sum(0, dtype=torch.float32).to(dtype) if need_dbias else None
                dbiases.append(total)
            return FromDys(torch.cat(parts, 1) if parts else None, tuple(dbs), tuple(dbiases))

        return by_torch
    of = Shape(m, max(widths), 0, rank)
    chosen = config("group_dxa_db", of)
    mean = ceil_div(sum(n * r for n, r in zip(widths, ranks, strict=True)), rank)
    apart = need_dxa and need_db and slabs_outweigh(m, mean, rank, chosen)
    one_pass = plan_group_dxa_db(
        dys, lora_bs, xa, columns, scales, need_dxa, need_db and not apart, need_dbias, chosen
    )
    if not apart or xa is None:
        return one_pass
    db_of = [
        None
        if lora_b is None
        else plan_db(dy, xa._replace(shape=(m, r)), scale, lora_b.dtype, config("da", of))
        for dy, lora_b, r, scale in zip(dys, lora_bs, ranks, scales, strict=True)
    ]

    def in_two(dys: Sequence[Tensor], lora_bs: Tensors, xa: Tensor | None) -> FromDys:
        found = one_pass(dys, lora_bs, xa)
        dbs = [
            None if plan is None or xa is None else plan(dy, xa[:, span])
            for plan, dy, span in zip(db_of, dys, spans, strict=True)
        ]
        return found._replace(dbs=tuple(dbs))

    return in_two


def _plan_da(
    dxa: Layout,
    x: Layout,
    dtype: torch.dtype,
    keep_bits: Layout | None,
    dropout_p: float,
    config: _Lookup,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """Every ``da``, one below the other, of dxa, x and the keep bits."""
    (m, k), rank = x.shape, dxa.shape[1]
    if rank > SKINNY_RANK and keep_bits is None:
        return lambda dxa, x, _: (dxa.t() @ x).to(dtype)
    chosen = config("da", Shape(m, k, k, rank))
    return plan_da(dxa, x, keep_bits is not None, dropout_p, dtype, chosen)


def _plan_dx(
    name: str,
    dys: Sequence[Layout],
    weights: Sequence[Layout],
    dxa: Layout,
    lora_a: Layout,
    keep_bits: Layout | None,
    dropout_p: float,
    shape: Shape,
    config: _Lookup,
) -> _Dx:
    """``dx`` of the dys, the weights, dxa, A stacked and the keep bits."""
    if name == "beta1":
        chosen = config("expand", shape)
        of_rank = plan_expand(dxa, lora_a, None, keep_bits, 1.0, dropout_p, chosen)

        def chained(
            dys: Sequence[Tensor],
            weights: Sequence[Tensor],
            dxa: Tensor,
            lora_a: Tensor,
            keep_bits: Tensor | None,
        ) -> Tensor:
            dx = of_rank(dxa, lora_a, None, keep_bits)
            for dy, weight in zip(dys, weights, strict=True):
                dx.addmm_(dy, weight)
            return dx

        return chained
    of, p = (dys, weights, dxa, lora_a, keep_bits), dropout_p
    if name == "hopper":
        whole = shape._replace(k=sum(dy.shape[1] for dy in dys))
        return plan_sum_hopper(*of, p, config("group_dx_hopper", whole))
    return plan_sum_gemm(*of, p, config("group_dx", shape))
