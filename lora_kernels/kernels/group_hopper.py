"""The products of `group_gemm` for Hopper: operands through TMA descriptors, persistent programs.

A descriptor cannot be picked from among several, so each member has a branch with its own loop. As
in `hopper`, the rank part comes last where it can.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .group_gemm import Products
from .hopper import scales_exactly
from .launching import Box, Layout, Prepared, layout_of, num_sms
from .members import (
    MOST,
    Members,
    Tensors,
    bias_arguments,
    contiguous,
    empty_outputs,
    member_of,
    pick,
)
from .tiles import TRITON_DTYPES, block_of, cast, ceil_div, dot, grouped_tile, load_tile, rank_tile
from .tuning import Config


@triton.jit
def _tile_of_member(
    acc,
    p_desc,
    w_desc,
    out_desc,
    u,
    b,
    bias,
    scale,
    row,
    col,
    K,
    DTYPE: tl.constexpr,
    W_IS_NK: tl.constexpr,
    RANK_LAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one member from ``acc`` on. What it returns keeps no accumulator alive."""
    out = acc
    for step in range(tl.cdiv(K, BLOCK_K)):
        p = p_desc.load([row, step * BLOCK_K])  # [BM, BK]
        if W_IS_NK:
            w = w_desc.load([col, step * BLOCK_K])  # [BN, BK]
            out = dot(p, w.T, out, "ieee")
        else:
            out = dot(p, w_desc.load([step * BLOCK_K, col]), out, "ieee")
    rounded = out
    if RANK_LAST:
        rounded = dot(cast(u.to(tl.float32) * scale, DTYPE), cast(b, DTYPE), out, "ieee")
        rounded += bias[None, :]
    # In two halves, as in `hopper`.
    halves = tl.permute(tl.reshape(rounded, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
    left, right = tl.split(halves)
    out_desc.store([row, col], cast(left, DTYPE))
    out_desc.store([row, col + BLOCK_N // 2], cast(right, DTYPE))
    if RANK_LAST:
        out = acc  # zeros, which take no registers
    return out


@triton.jit
def group_hopper_kernel(
    p_desc,
    w0_desc,
    out0_desc,
    w1_desc,
    out1_desc,
    w2_desc,
    out2_desc,
    w3_desc,
    out3_desc,
    u_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    b3_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    M,
    K,
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
    biased0,
    biased1,
    biased2,
    biased3,
    scale0,
    scale1,
    scale2,
    scale3,
    stride_um,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    W_IS_NK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOOPED: tl.constexpr,
    RANK_LAST: tl.constexpr,
    GROUP: tl.constexpr,
):
    end0 = tl.cdiv(n0, BLOCK_N)
    end1 = end0 + tl.cdiv(n1, BLOCK_N)
    end2 = end1 + tl.cdiv(n2, BLOCK_N)
    end3 = end2 + tl.cdiv(n3, BLOCK_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    for tile in tl.range(tl.program_id(0), tiles_m * end3, tl.num_programs(0)):
        pid_m, tile_n = grouped_tile(tile, tiles_m, end3, GROUP)
        member = member_of(tile_n, end0, end1, end2, MEMBERS)
        pid_n = tile_n - pick(member, 0, end0, end1, end2, MEMBERS)
        n = pick(member, n0, n1, n2, n3, MEMBERS)
        r = pick(member, r0, r1, r2, r3, MEMBERS)
        scale = pick(member, scale0, scale1, scale2, scale3, MEMBERS)
        own_ptr = u_ptr + pick(member, at0, at1, at2, at3, MEMBERS)
        b_ptr = pick(member, b0_ptr, b1_ptr, b2_ptr, b3_ptr, MEMBERS)
        rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
        if HAS_BIAS:
            bias_ptr = pick(member, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr, MEMBERS)
            biased = pick(member, biased0, biased1, biased2, biased3, MEMBERS)
            bias = tl.load(bias_ptr + cols, mask=cols < biased, other=0.0).to(tl.float32)
        if RANK_LAST:
            ranks = tl.arange(0, BLOCK_R)
            u = load_tile(own_ptr, rows, ranks, stride_um, 1, M, r)
            b = load_tile(b_ptr, ranks, cols, 1, r, r, n)
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        else:
            u = 0.0
            b = 0.0
            acc = rank_tile(
                own_ptr,
                b_ptr,
                None,
                None,
                pid_m,
                pid_n,
                M,
                n,
                r,
                0,
                scale,
                stride_um,
                1,
                1,
                r,
                0,
                DTYPE,
                False,
                False,
                "ieee",
                BLOCK_M,
                BLOCK_N,
                BLOCK_R,
                LOOPED,
            )
            acc += bias[None, :]
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        # One after the other, not else: only so do their buffers lie in the same shared memory.
        if member == 0:
            acc = _tile_of_member(
                acc, p_desc, w0_desc, out0_desc, u, b, bias, scale, row, col, K,
                DTYPE, W_IS_NK, RANK_LAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if MEMBERS > 1 and member == 1:
            acc = _tile_of_member(
                acc, p_desc, w1_desc, out1_desc, u, b, bias, scale, row, col, K,
                DTYPE, W_IS_NK, RANK_LAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if MEMBERS > 2 and member == 2:
            acc = _tile_of_member(
                acc, p_desc, w2_desc, out2_desc, u, b, bias, scale, row, col, K,
                DTYPE, W_IS_NK, RANK_LAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        if MEMBERS > 3 and member == 3:
            acc = _tile_of_member(
                acc, p_desc, w3_desc, out3_desc, u, b, bias, scale, row, col, K,
                DTYPE, W_IS_NK, RANK_LAST, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


def group_hopper(
    p: Tensor,
    ws: Sequence[Tensor],
    u: Tensor,
    bs: Tensors,
    biases: Tensors,
    scales: Sequence[float],
    *,
    config: Config,
) -> tuple[Tensor, ...]:
    """As `group_gemm`, for 16-bit p and ws that `suits_tma`, of N_i that 8 divides.

    No dimension may be 0.
    """
    run = plan_group_hopper(
        Layout.of(p),
        [Layout.of(w) for w in ws],
        Layout.of(u),
        [layout_of(b) for b in bs],
        [layout_of(bias) for bias in biases],
        scales,
        config,
    )
    return run(p, ws, u, bs, biases)


def plan_group_hopper(
    p: Layout,
    ws: Sequence[Layout],
    u: Layout,
    bs: Sequence[Layout | None],
    biases: Sequence[Layout | None],
    scales: Sequence[float],
    config: Config,
) -> Products:
    """`group_hopper` for tensors of these layouts."""
    (m, k), dtype, device = p.shape, p.dtype, p.device
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    ns = [w.shape[0] for w in ws]
    members = Members(ns, bs, scales)
    w_is_nk = ws[0].stride[1] == 1
    boxes = [Box((m, k), p.stride[0], (block_m, block_k))]
    for n, w in zip(ns, ws, strict=True):
        boxes.append(
            Box((n, k), w.stride[0], (block_n, block_k))
            if w_is_nk
            else Box((k, n), w.stride[1], (block_k, block_n))
        )
        boxes.append(Box((m, n), n, (block_m, block_n // 2)))
    tiles = ceil_div(m, block_m) * sum(ceil_div(n, block_n) for n in ns)
    block_r = block_of(members.rank, most=32)
    last = config.per_sm == 1 and members.rank <= block_r
    last = last and all(scales_exactly(scale, dtype) for scale in scales)
    # Buffers of its own for more than 16 would not fit beside the wide tiles.
    looped = not last and (config.per_sm > 1 or members.rank > 16)
    launch = Prepared(
        group_hopper_kernel,
        min(num_sms(p) * config.per_sm, tiles),
        config.warps,
        config.stages,
        {
            **members.arguments,
            **bias_arguments(ns, biases),
            "M": m,
            "K": k,
            "stride_um": u.stride[0],
            "DTYPE": TRITON_DTYPES[dtype],
            "W_IS_NK": w_is_nk,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "BLOCK_R": block_r,
            "LOOPED": looped,
            "RANK_LAST": last,
            "GROUP": config.group,
        },
        tuple(boxes),
    )
    absent = [None] * (2 * (MOST - len(ns)))

    def run(
        p: Tensor | None, ws: Sequence[Tensor], u: Tensor, bs: Tensors, biases: Tensors
    ) -> tuple[Tensor, ...]:
        outs = empty_outputs(m, ns, dtype, device, False)
        pairs = [tensor for pair in zip(ws, outs, strict=True) for tensor in pair]
        launch(p, *pairs, *absent, u, *members.factors(bs), *contiguous(biases))
        return outs

    return run
