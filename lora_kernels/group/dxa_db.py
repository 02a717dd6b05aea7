"""Every member's ``dxa = scale·dy·B``, ``db = scale·dyᵀ·xa`` and ``dbias = Σ dy`` in one launch.

One pass over each dy, as `linear.dxa_db` makes over one: a program takes a block of rows of one
member and a share of its columns, and all members are split alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.launching import Layout, Prepared, layout_of, num_sms
from ..kernels.members import Members, Tensors, filled, numbered, pick, starts
from ..kernels.partials import Sum, plan_sums, slabs_like
from ..kernels.tiles import TRITON_DTYPES, block_of, cast, ceil_div, dot, load_tile, precision
from ..kernels.tuning import Config


@triton.jit(do_not_specialize=["STEPS"])
def group_dxa_db_kernel(
    dy0_ptr,
    dy1_ptr,
    dy2_ptr,
    dy3_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    b3_ptr,
    xa_ptr,
    dxa_ptr,
    db_ptr,
    dbias_ptr,
    M,
    N,
    SIZE,
    n0,
    n1,
    n2,
    n3,
    r0,
    r1,
    r2,
    r3,
    at0,
    at1,
    at2,
    at3,
    xa_at0,
    xa_at1,
    xa_at2,
    xa_at3,
    db_at0,
    db_at1,
    db_at2,
    db_at3,
    dbias_at0,
    dbias_at1,
    dbias_at2,
    dbias_at3,
    scale0,
    scale1,
    scale2,
    scale3,
    stride_dy0,
    stride_dy1,
    stride_dy2,
    stride_dy3,
    STEPS,
    stride_xam,
    stride_dxam,
    SPLIT: tl.constexpr,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    NEED_DXA: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    RANK_BY_8: tl.constexpr,
    PRECISION: tl.constexpr,
    TILES_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_r = tl.program_id(0) % TILES_R
    pid_m = (tl.program_id(0) // TILES_R) % tiles_m
    chunk = (tl.program_id(0) // (TILES_R * tiles_m)) % SPLIT
    member = tl.program_id(0) // (TILES_R * tiles_m * SPLIT)
    n = pick(member, n0, n1, n2, n3, MEMBERS)
    r = pick(member, r0, r1, r2, r3, MEMBERS)
    if RANK_BY_8:
        r = (r // 8) * 8
    scale = pick(member, scale0, scale1, scale2, scale3, MEMBERS)
    dy_ptr = pick(member, dy0_ptr, dy1_ptr, dy2_ptr, dy3_ptr, MEMBERS)
    stride_dym = pick(member, stride_dy0, stride_dy1, stride_dy2, stride_dy3, MEMBERS)
    b_ptr = pick(member, b0_ptr, b1_ptr, b2_ptr, b3_ptr, MEMBERS)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if NEED_DB:
        xa_ptr += pick(member, xa_at0, xa_at1, xa_at2, xa_at3, MEMBERS)
        xa = load_tile(xa_ptr, rows, ranks, stride_xam, 1, M, r)  # [BM, BR]
        db_ptr += pid_m.to(tl.int64) * SIZE + pick(member, db_at0, db_at1, db_at2, db_at3, MEMBERS)
    if NEED_DBIAS:
        dbias_ptr += pid_m.to(tl.int64) * N
        dbias_ptr += pick(member, dbias_at0, dbias_at1, dbias_at2, dbias_at3, MEMBERS)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for step in range(chunk * STEPS, min((chunk + 1) * STEPS, tl.cdiv(n, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        dy = load_tile(dy_ptr, rows, cols, stride_dym, 1, M, n)  # [BM, BN]
        if NEED_DXA:
            b = load_tile(b_ptr, cols, ranks, r, 1, n, r)  # [BN, BR]
            acc = dot(dy, cast(b, DTYPE), acc, PRECISION)
        if NEED_DB:
            db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
            db = dot(tl.trans(dy), xa, db, PRECISION) * scale
            db_ptrs = db_ptr + cols.to(tl.int64)[:, None] * r + ranks[None, :]
            inside = (cols < n)[:, None] & (ranks < r)[None, :]
            tl.store(db_ptrs, cast(db, db_ptr.dtype.element_ty), mask=inside)
        if NEED_DBIAS and pid_r == 0:
            dbias = tl.sum(dy.to(tl.float32), 0)
            tl.store(dbias_ptr + cols, cast(dbias, dbias_ptr.dtype.element_ty), mask=cols < n)
    if NEED_DXA:
        # The widest member has the most shares; those that others lack add zeros.
        dxa_ptr += chunk.to(tl.int64) * M * stride_dxam + pick(member, at0, at1, at2, at3, MEMBERS)
        dxa_ptrs = dxa_ptr + rows.to(tl.int64)[:, None] * stride_dxam + ranks[None, :]
        inside = (rows < M)[:, None] & (ranks < r)[None, :]
        tl.store(dxa_ptrs, cast(acc * scale, dxa_ptr.dtype.element_ty), mask=inside)


class FromDys(NamedTuple):
    """What one pass over each dy gives; None, or nothing, where not asked for."""

    dxa: Tensor | None
    dbs: tuple[Tensor | None, ...]
    dbiases: tuple[Tensor | None, ...]


# Called with the dys, the B and xa.
OfDys = Callable[[Sequence[Tensor], Tensors, Tensor | None], FromDys]


def compute_group_dxa_db(
    dys: Sequence[Tensor],
    lora_bs: Tensors,
    xa: Tensor | None,
    columns: Sequence[int],
    scales: Sequence[float],
    *,
    need_dxa: bool = True,
    need_db: bool = True,
    need_dbias: bool = False,
    config: Config,
) -> FromDys:
    """``dxa_i = scale_i·dy_i·B_i``, ``db_i = scale_i·dy_iᵀ·xa_i``, ``dbias_i = Σ dy_i``.

    Args:
        dys: ``[M, N_i]`` of up to four members, float32, float16 or bfloat16, rows contiguous.
        lora_bs: ``[N_i, R_i]``, of the dys' dtype or wider, rounded to it; None for a member
            without LoRA, but not for all.
        xa: ``[M, …]`` of the dys' dtype, rows contiguous; may be None without need_db.
        columns: the column of xa where a member's begin.
        scales: factors on the members' branches.
        need_dxa, need_db, need_dbias: what to compute.
        config: block_m, block_n.

    Returns:
        dxa ``[M, ΣR]`` in the dys' dtype, the members' columns side by side; db_i ``[N_i, R_i]`` in
        lora_b_i's dtype and dbias_i ``[N_i]`` in the dys', slices of one buffer each.
    """
    run = plan_group_dxa_db(
        [Layout.of(dy) for dy in dys],
        [layout_of(lora_b) for lora_b in lora_bs],
        layout_of(xa),
        columns,
        scales,
        need_dxa,
        need_db,
        need_dbias,
        config,
    )
    return run(dys, lora_bs, xa)


def plan_group_dxa_db(
    dys: Sequence[Layout],
    lora_bs: Sequence[Layout | None],
    xa: Layout | None,
    columns: Sequence[int],
    scales: Sequence[float],
    need_dxa: bool,
    need_db: bool,
    need_dbias: bool,
    config: Config,
) -> OfDys:
    """`compute_group_dxa_db` for tensors of these layouts."""
    m, dtype, device = dys[0].shape[0], dys[0].dtype, dys[0].device
    ns = [dy.shape[1] for dy in dys]
    members = Members(ns, lora_bs, scales)
    ranks = members.ranks
    block_r = block_of(members.rank)
    tiles_r, tiles_m = ceil_div(members.rank, block_r), ceil_div(m, config.block_m)
    blocks = [ceil_div(n, config.block_n) for n in ns]
    split, steps = _shares(tiles_m * tiles_r, blocks, num_sms(dys[0]))
    sizes = [n * r for n, r in zip(ns, ranks, strict=True)]
    launch = Prepared(
        group_dxa_db_kernel,
        tiles_r * tiles_m * split * len(ns),
        config.warps,
        config.stages,
        {
            **members.arguments,
            **numbered("xa_at", columns),
            **numbered("db_at", starts(sizes)),
            **numbered("dbias_at", starts(ns)),
            **numbered("stride_dy", [dy.stride[0] for dy in dys]),
            "M": m,
            "N": sum(ns),
            "SIZE": sum(sizes),
            "STEPS": steps,
            "SPLIT": split,
            "stride_xam": 0 if xa is None else xa.stride[0],
            "stride_dxam": sum(ranks),
            "DTYPE": TRITON_DTYPES[dtype],
            "NEED_DXA": need_dxa,
            "NEED_DB": need_db,
            "NEED_DBIAS": need_dbias,
            "RANK_BY_8": all(rank % 8 == 0 for rank in ranks),
            "PRECISION": precision(dtype),
            "TILES_R": tiles_r,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": block_r,
        },
    )
    # Of each result: whether it is needed, in how many slabs it comes, its shape and dtype.
    results = (
        (need_dxa, split, (m, sum(ranks)), dtype),
        (need_db, tiles_m, (sum(sizes),), members.dtype),
        (need_dbias, tiles_m, (sum(ns),), dtype),
    )
    add = plan_sums(
        [Sum(slabs, prod(shape)) for needed, slabs, shape, _ in results if needed and slabs > 1]
    )

    def run(dys: Sequence[Tensor], lora_bs: Tensors, xa: Tensor | None) -> FromDys:
        outs: list[Tensor | None] = []
        targets: list[Tensor | None] = []
        split_sums: list[tuple[Tensor, Tensor]] = []
        for needed, slabs, shape, dtype in results:
            out = torch.empty(shape, dtype=dtype, device=device) if needed else None
            target = out
            if out is not None and slabs > 1:
                target = slabs_like(slabs, *shape, device=device)
                split_sums.append((target, out))
            outs.append(out)
            targets.append(target)
        launch(*filled(dys), *members.factors(lora_bs), xa, *targets)
        add(split_sums)
        dxa, db, dbias = outs
        dbs: tuple[Tensor | None, ...] = (None,) * len(ns)
        if db is not None:
            dbs = tuple(
                None if lora_b is None else part.view(lora_b.shape).to(lora_b.dtype)
                for part, lora_b in zip(db.split(sizes), lora_bs, strict=True)
            )
        return FromDys(dxa, dbs, (None,) * len(ns) if dbias is None else dbias.split(ns))

    return run


def _shares(tiles: int, blocks: Sequence[int], sms: int) -> tuple[int, int]:
    """How many shares the widest member is split into, and the column blocks of one.

    The shortest shares of which no more than about two a multiprocessor are at work.
    """
    wanted = max(len(blocks), 2 * sms // tiles)
    steps = ceil_div(sum(blocks), wanted)
    while sum(ceil_div(count, steps) for count in blocks) > wanted:
        steps += 1
    return ceil_div(max(blocks), steps), steps
