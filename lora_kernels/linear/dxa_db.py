"""``dxa = scale·dy·B`` and ``db = scale·dyᵀ·xa`` in one pass over dy, which also sums ``dbias``."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.launching import Layout, Prepared, num_sms
from ..kernels.partials import Sum, chunks, plan_sums, slabs_like
from ..kernels.tiles import (
    TRITON_DTYPES,
    block_of,
    cast,
    ceil_div,
    dot,
    load_tile,
    precision,
    rank_by_8,
)
from ..kernels.tuning import Config


@triton.jit(do_not_specialize=["STEPS"])
def dxa_db_kernel(
    dy_ptr,
    b_ptr,
    xa_ptr,
    dxa_ptr,
    db_ptr,
    dbias_ptr,
    M,
    N,
    R,
    dxa_scale,
    db_scale,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_xam,
    stride_xar,
    STEPS,
    DTYPE: tl.constexpr,
    NEED_DXA: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    RANK_BY_8: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if RANK_BY_8:
        R, stride_bn = (R // 8) * 8, (stride_bn // 8) * 8
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_r = tl.program_id(0) % tiles_r
    pid_m = (tl.program_id(0) // tiles_r) % tiles_m
    chunk = tl.program_id(0) // (tiles_r * tiles_m)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if NEED_DB:
        xa = load_tile(xa_ptr, rows, ranks, stride_xam, stride_xar, M, R)  # [BM, BR]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for step in range(chunk * STEPS, min((chunk + 1) * STEPS, tl.cdiv(N, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        dy = load_tile(dy_ptr, rows, cols, stride_dym, stride_dyn, M, N)  # [BM, BN]
        if NEED_DXA:
            b = load_tile(b_ptr, cols, ranks, stride_bn, stride_br, N, R)  # [BN, BR]
            acc = dot(dy, cast(b, DTYPE), acc, PRECISION)
        if NEED_DB:
            db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
            db = dot(tl.trans(dy), xa, db, PRECISION) * db_scale
            db_ptrs = db_ptr + pid_m.to(tl.int64) * N * R
            db_ptrs += cols.to(tl.int64)[:, None] * R + ranks[None, :]
            inside = (cols < N)[:, None] & (ranks < R)[None, :]
            tl.store(db_ptrs, cast(db, db_ptr.dtype.element_ty), mask=inside)
        if NEED_DBIAS and pid_r == 0:
            dbias = tl.sum(dy.to(tl.float32), 0)
            dbias_ptrs = dbias_ptr + pid_m.to(tl.int64) * N + cols
            tl.store(dbias_ptrs, cast(dbias, dbias_ptr.dtype.element_ty), mask=cols < N)
    if NEED_DXA:
        dxa_ptrs = dxa_ptr + chunk.to(tl.int64) * M * R
        dxa_ptrs += rows.to(tl.int64)[:, None] * R + ranks[None, :]
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        tl.store(dxa_ptrs, cast(acc * dxa_scale, dxa_ptr.dtype.element_ty), mask=inside)


def compute_dxa_db(
    dy: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scale: float,
    *,
    need_dxa: bool = True,
    need_db: bool = True,
    need_dbias: bool = False,
    config: Config,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dxa = scale·dy·B``, ``db = scale·dyᵀ·xa``, ``dbias = Σ dy`` in one pass over dy.

    Args:
        dy: ``[M, N]``, float32, float16 or bfloat16, any strides.
        lora_b: ``[N, R]``, of dy's dtype or wider; rounded to dy's dtype.
        xa: ``[M, R]`` of dy's dtype.
        scale: factor on the LoRA branch.
        need_dxa, need_db, need_dbias: what to compute; the rest comes back as None.
        config: block_m, block_n.

    Returns:
        dxa ``[M, R]`` in dy's dtype, db ``[N, R]`` in lora_b's, dbias ``[N]`` in dy's.
    """
    layouts = Layout.of(dy), Layout.of(lora_b), Layout.of(xa)
    plan = plan_dxa_db(*layouts, scale, need_dxa, need_db, need_dbias, config)
    return plan(dy, lora_b, xa)


def plan_dxa_db(
    dy: Layout,
    lora_b: Layout,
    xa: Layout,
    scale: float,
    need_dxa: bool,
    need_db: bool,
    need_dbias: bool,
    config: Config,
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """`compute_dxa_db` for tensors of these layouts; called with dy, B and xa."""
    (m, n), r, device = dy.shape, lora_b.shape[1], dy.device
    block_r = block_of(r)
    tiles_m = ceil_div(m, config.block_m)
    tiles = tiles_m * ceil_div(r, block_r)
    split, steps = chunks(tiles, ceil_div(n, config.block_n), num_sms(dy))
    launch = Prepared(
        dxa_db_kernel,
        tiles * split,
        config.warps,
        config.stages,
        {
            "M": m,
            "N": n,
            "R": r,
            "dxa_scale": scale,
            "db_scale": scale,
            "stride_dym": dy.stride[0],
            "stride_dyn": dy.stride[1],
            "stride_bn": lora_b.stride[0],
            "stride_br": lora_b.stride[1],
            "stride_xam": xa.stride[0],
            "stride_xar": xa.stride[1],
            "STEPS": steps,
            "DTYPE": TRITON_DTYPES[dy.dtype],
            "NEED_DXA": need_dxa,
            "NEED_DB": need_db,
            "NEED_DBIAS": need_dbias,
            "RANK_BY_8": rank_by_8(lora_b),
            "PRECISION": precision(dy.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": block_r,
        },
    )
    # Of each result: whether it is needed, in how many slabs it comes, its shape and dtype.
    results = (
        (need_dxa, split, (m, r), dy.dtype),
        (need_db, tiles_m, (n, r), lora_b.dtype),
        (need_dbias, tiles_m, (n,), dy.dtype),
    )
    add = plan_sums(
        [Sum(slabs, prod(shape)) for needed, slabs, shape, _ in results if needed and slabs > 1]
    )

    def run(
        dy: Tensor, lora_b: Tensor, xa: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
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
        launch(dy, lora_b, xa, *targets)
        add(split_sums)
        dxa, db, dbias = outs
        return dxa, db, dbias

    return run
