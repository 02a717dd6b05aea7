"""The product of `gemm` for Hopper: operands through TMA descriptors, and persistent programs.

What comes first in a tile holds up the loads that the loop over K begins with. So the rank part
comes last here where it can: unmasked, no wider than its tile, and with a scale that changes no
digit of u, so that one accumulator still serves both. Its operands are asked for before the loop.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import Product, rank_arguments
from .launching import Box, Layout, Prepared, layout_of, num_sms
from .tiles import cast, ceil_div, dot, grouped_tile, load_tile, rank_tile
from .tuning import Config


@triton.jit
def hopper_gemm_kernel(
    p_desc,
    q_desc,
    out_desc,
    u_ptr,
    v_ptr,
    bias_ptr,
    bits_ptr,
    M,
    N,
    K,
    R,
    num_bytes,
    scale,
    stride_um,
    stride_ur,
    stride_vr,
    stride_vn,
    stride_bias,
    DTYPE: tl.constexpr,
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
                bias_ptr,
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
        for step in range(tl.cdiv(K, BLOCK_K)):
            p = p_desc.load([row, step * BLOCK_K])  # [BM, BK]
            if Q_IS_NK:
                q = q_desc.load([col, step * BLOCK_K]).T  # [BK, BN]
            else:
                q = q_desc.load([step * BLOCK_K, col])
            acc = dot(p, q, acc, "ieee")
        if RANK_LAST:
            acc = dot(cast(u.to(tl.float32) * scale, DTYPE), cast(v, DTYPE), acc, "ieee")
            if HAS_BIAS:
                bias = tl.load(bias_ptr + cols * stride_bias, mask=cols < N, other=0.0)
                acc += bias.to(tl.float32)[None, :]
        # In two halves, so that the copy on its way out takes half the shared memory.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        out_desc.store([row, col], cast(left, DTYPE))
        out_desc.store([row, col + BLOCK_N // 2], cast(right, DTYPE))


def hopper_gemm(
    p: Tensor,
    q: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    keep_bits: Tensor | None = None,
    dropout_p: float = 0.0,
    config: Config,
) -> Tensor:
    """As `pointer_gemm`, for 16-bit p and q that `suits_tma`; no dimension may be 0."""
    layouts = (
        layout_of(p),
        layout_of(q),
        layout_of(u),
        layout_of(v),
        layout_of(bias),
        layout_of(keep_bits),
    )
    run = plan_hopper_gemm(*layouts, scale, dropout_p, config)
    return run(p, q, u, v, bias, keep_bits)


def suits_tma(matrix: Layout) -> bool:
    """Whether it or its transpose can be read through a TMA descriptor, given an aligned address.

    `hopper_gemm` takes q either way round, and p only with rows of contiguous elements.
    """
    inner, outer = sorted(matrix.stride)
    width = matrix.shape[1] if matrix.stride[1] == 1 else matrix.shape[0]
    return (
        inner == 1
        and outer >= width  # rows may not overlap
        and outer * matrix.dtype.itemsize % 16 == 0
    )


def rows_suit_tma(matrix: Layout) -> bool:
    """`suits_tma` as it is, not transposed."""
    return suits_tma(matrix) and matrix.stride[1] == 1


def plan_hopper_gemm(
    p: Layout,
    q: Layout,
    u: Layout,
    v: Layout,
    bias: Layout | None,
    keep_bits: Layout | None,
    scale: float,
    dropout_p: float,
    config: Config,
) -> Product:
    """`hopper_gemm` for tensors of these layouts."""
    (m, k), n, dtype, device = p.shape, q.shape[1], p.dtype, p.device
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    q_is_nk = q.stride[0] == 1 and q.stride[1] != 1  # Wᵀ: the memory is [N, K]
    q_box = (
        Box((n, k), q.stride[1], (block_n, block_k))
        if q_is_nk
        else Box((k, n), q.stride[0], (block_k, block_n))
    )
    boxes = (
        Box((m, k), p.stride[0], (block_m, block_k)),
        q_box,
        Box((m, n), n, (block_m, block_n // 2)),
    )
    tiles = ceil_div(m, block_m) * ceil_div(n, block_n)
    # Beside the wide tiles a rank tile of 64 in float32 does not fit; and none that has its own
    # buffers, where two programs share an SM.
    looped = config.per_sm > 1
    rank = rank_arguments(u, v, bias, keep_bits, scale, dropout_p, 32, looped)
    last = keep_bits is None and not rank["LOOPED"] and scales_exactly(scale, dtype)
    launch = Prepared(
        hopper_gemm_kernel,
        min(num_sms(p) * config.per_sm, tiles),
        config.warps,
        config.stages,
        {
            **rank,
            "M": m,
            "N": n,
            "K": k,
            "RANK_LAST": last,
            "Q_IS_NK": q_is_nk,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "BLOCK_K": block_k,
            "GROUP": config.group,
        },
        boxes,
    )

    def run(
        p: Tensor | None,
        q: Tensor | None,
        u: Tensor,
        v: Tensor,
        bias: Tensor | None,
        keep_bits: Tensor | None,
    ) -> Tensor:
        out = torch.empty(m, n, dtype=dtype, device=device)
        launch(p, q, out, u, v, bias, keep_bits)
        return out

    return run


def scales_exactly(scale: float, dtype: torch.dtype) -> bool:
    """Whether ``scale`` times what is in dtype is in dtype; bfloat16 has float32's range."""
    return scale == 1.0 or (dtype == torch.bfloat16 and abs(math.frexp(scale)[0]) == 0.5)
