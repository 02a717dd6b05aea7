"""The sum of `sum_gemm` for Hopper: operands through TMA descriptors, and persistent programs.

The loops over the members follow one another in each tile; as in `hopper`, the rank part comes
last where it can.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import rank_arguments
from .launching import Box, Layout, Prepared, layout_of, num_sms
from .members import MOST, numbered
from .sum_gemm import SumOfProducts
from .tiles import cast, ceil_div, dot, grouped_tile, load_tile, rank_tile
from .tuning import Config


@triton.jit
def sum_hopper_kernel(
    out_desc,
    p0_desc,
    q0_desc,
    p1_desc,
    q1_desc,
    p2_desc,
    q2_desc,
    p3_desc,
    q3_desc,
    u_ptr,
    v_ptr,
    bits_ptr,
    M,
    N,
    R,
    num_bytes,
    scale,
    k0,
    k1,
    k2,
    k3,
    stride_um,
    stride_ur,
    stride_vr,
    stride_vn,
    stride_bias,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    Q_IS_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOOPED: tl.constexpr,
    RANK_LAST: tl.constexpr,
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
        if RANK_LAST:
            rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
            cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            ranks = tl.arange(0, BLOCK_R)
            u = load_tile(u_ptr, rows, ranks, stride_um, stride_ur, M, R)
            v = load_tile(v_ptr, ranks, cols, stride_vr, stride_vn, R, N)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        else:
            acc = rank_tile(
                u_ptr,
                v_ptr,
                None,
                bits_ptr,
                pid_m,
                pid_n,
                M,
                N,
                R,
                num_bytes,
                scale,
                stride_um,
                stride_ur,
                stride_vr,
                stride_vn,
                stride_bias,
                DTYPE,
                HAS_BIAS,
                HAS_MASK,
                "ieee",
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                LOOPED,
            )
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        for member in tl.static_range(MEMBERS):
            p_desc = (p0_desc, p1_desc, p2_desc, p3_desc)[member]
            q_desc = (q0_desc, q1_desc, q2_desc, q3_desc)[member]
            for step in range(tl.cdiv((k0, k1, k2, k3)[member], BLOCK_K)):
                p = p_desc.load([row, step * BLOCK_K])  # [BM, BK]
                if Q_IS_NK:
                    q = q_desc.load([col, step * BLOCK_K]).T  # [BK, BN]
                else:
                    q = q_desc.load([step * BLOCK_K, col])
                acc = dot(p, q, acc, "ieee")
        if RANK_LAST:
            acc = dot(u, cast(v, DTYPE), acc, "ieee")
        # In two halves, as in `hopper`.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        out_desc.store([row, col], cast(left, DTYPE))
        out_desc.store([row, col + BLOCK_N // 2], cast(right, DTYPE))


def sum_hopper(
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    *,
    keep_bits: Tensor | None = None,
    dropout_p: float = 0.0,
    config: Config,
) -> Tensor:
    """As `sum_gemm`, for 16-bit ps and qs that `suits_tma`, of N that 8 divides.

    No dimension may be 0.
    """
    of_ps, of_qs, bits = (
        [Layout.of(p) for p in ps],
        [Layout.of(q) for q in qs],
        layout_of(keep_bits),
    )
    run = plan_sum_hopper(of_ps, of_qs, Layout.of(u), Layout.of(v), bits, dropout_p, config)
    return run(ps, qs, u, v, keep_bits)


def plan_sum_hopper(
    ps: Sequence[Layout],
    qs: Sequence[Layout],
    u: Layout,
    v: Layout,
    keep_bits: Layout | None,
    dropout_p: float,
    config: Config,
) -> SumOfProducts:
    """`sum_hopper` for tensors of these layouts."""
    (m, n), dtype, device = (u.shape[0], v.shape[1]), u.dtype, u.device
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    q_is_nk = qs[0].stride[0] == 1 and qs[0].stride[1] != 1
    ks = [p.shape[1] for p in ps]
    boxes = [Box((m, n), n, (block_m, block_n // 2))]
    for k, p, q in zip(ks, ps, qs, strict=True):
        boxes.append(Box((m, k), p.stride[0], (block_m, block_k)))
        boxes.append(
            Box((n, k), q.stride[1], (block_n, block_k))
            if q_is_nk
            else Box((k, n), q.stride[0], (block_k, block_n))
        )
    tiles = ceil_div(m, block_m) * ceil_div(n, block_n)
    rank = rank_arguments(u, v, None, keep_bits, 1.0, dropout_p, 32, config.per_sm > 1)
    launch = Prepared(
        sum_hopper_kernel,
        min(num_sms(u) * config.per_sm, tiles),
        config.warps,
        config.stages,
        {
            **rank,
            **numbered("k", ks),
            "M": m,
            "N": n,
            "MEMBERS": len(ps),
            "RANK_LAST": keep_bits is None and not rank["LOOPED"],
            "Q_IS_NK": q_is_nk,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP": config.group,
        },
        tuple(boxes),
    )
    absent = [None] * (2 * (MOST - len(ps)))

    def run(
        ps: Sequence[Tensor],
        qs: Sequence[Tensor],
        u: Tensor,
        v: Tensor,
        keep_bits: Tensor | None,
    ) -> Tensor:
        out = torch.empty(m, n, dtype=dtype, device=device)
        pairs = [tensor for pair in zip(ps, qs, strict=True) for tensor in pair]
        launch(out, *pairs, *absent, u, v, keep_bits)
        return out

    return run
