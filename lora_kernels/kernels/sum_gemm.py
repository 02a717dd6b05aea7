"""``out = Σ p_i·q_i + mask⊙(u·v)/(1 - p_drop)``: dx of members that share x, in one launch.

The loops over the members' contractions follow one another on one accumulator, so that no member's
own dx is ever written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemm import rank_arguments
from .launching import Layout, Prepared, layout_of
from .members import filled, numbered
from .tiles import cast, ceil_div, grouped_tile, precision, product_tile, rank_tile
from .tuning import Config

# Called with the p, the q, u, v and the keep bits, it gives their sum.
SumOfProducts = Callable[
    [Sequence[Tensor], Sequence[Tensor], Tensor, Tensor, Tensor | None], Tensor
]


@triton.jit
def sum_gemm_kernel(
    p0_ptr,
    p1_ptr,
    p2_ptr,
    p3_ptr,
    q0_ptr,
    q1_ptr,
    q2_ptr,
    q3_ptr,
    u_ptr,
    v_ptr,
    bits_ptr,
    out_ptr,
    M,
    N,
    R,
    num_bytes,
    scale,
    k0,
    k1,
    k2,
    k3,
    stride_p0,
    stride_p1,
    stride_p2,
    stride_p3,
    stride_qk,
    stride_qn,
    q_step,
    stride_um,
    stride_ur,
    stride_vr,
    stride_vn,
    stride_bias,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOOPED: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
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
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        LOOPED,
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    for member in tl.static_range(MEMBERS):
        acc = product_tile(
            acc,
            (p0_ptr, p1_ptr, p2_ptr, p3_ptr)[member],
            (q0_ptr, q1_ptr, q2_ptr, q3_ptr)[member],
            rows,
            cols,
            M,
            N,
            (k0, k1, k2, k3)[member],
            (stride_p0, stride_p1, stride_p2, stride_p3)[member],
            1,
            stride_qk,
            stride_qn,
            BLOCK_K,
            q_step,
            EVEN_K,
            PRECISION,
            BLOCK_K,
        )
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(
        out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], cast(acc, DTYPE), mask=inside
    )


def sum_gemm(
    ps: Sequence[Tensor],
    qs: Sequence[Tensor],
    u: Tensor,
    v: Tensor,
    *,
    keep_bits: Tensor | None = None,
    dropout_p: float = 0.0,
    config: Config,
) -> Tensor:
    """``Σ p_i·q_i + mask⊙(u·v)/(1 - dropout_p)`` over up to `MOST` members, in one launch.

    Args:
        ps: ``[M, K_i]``, float32, float16 or bfloat16, rows contiguous; out has their dtype.
        qs: ``[K_i, N]`` of their dtype, with the same strides (see `alike`).
        u: ``[M, R]`` of their dtype.
        v: ``[R, N]``, of their dtype or wider, rounded to it.
        keep_bits: uint8 ``[M, ceil(N / 8)]``, the mask on ``u·v``, or None for all kept.
        dropout_p: what the kept elements are scaled up for, with keep_bits.
        config: block_m, block_n, block_k, group.

    Returns:
        out ``[M, N]``, contiguous.
    """
    bits = layout_of(keep_bits)
    of_ps, of_qs = [Layout.of(p) for p in ps], [Layout.of(q) for q in qs]
    run = plan_sum_gemm(of_ps, of_qs, Layout.of(u), Layout.of(v), bits, dropout_p, config)
    return run(ps, qs, u, v, keep_bits)


def plan_sum_gemm(
    ps: Sequence[Layout],
    qs: Sequence[Layout],
    u: Layout,
    v: Layout,
    keep_bits: Layout | None,
    dropout_p: float,
    config: Config,
) -> SumOfProducts:
    """`sum_gemm` for tensors of these layouts."""
    (m, n), dtype, device = (u.shape[0], v.shape[1]), u.dtype, u.device
    ks = [p.shape[1] for p in ps]
    rank = rank_arguments(u, v, None, keep_bits, 1.0, dropout_p, looped=keep_bits is not None)
    launch = Prepared(
        sum_gemm_kernel,
        ceil_div(m, config.block_m) * ceil_div(n, config.block_n),
        config.warps,
        config.stages,
        {
            **rank,
            **numbered("k", ks),
            **numbered("stride_p", [p.stride[0] for p in ps]),
            "M": m,
            "N": n,
            "stride_qk": qs[0].stride[0],
            "stride_qn": qs[0].stride[1],
            "q_step": config.block_k * qs[0].stride[0],
            "MEMBERS": len(ps),
            "EVEN_K": all(k % config.block_k == 0 for k in ks),
            "PRECISION": precision(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "GROUP": config.group,
        },
    )

    def run(
        ps: Sequence[Tensor],
        qs: Sequence[Tensor],
        u: Tensor,
        v: Tensor,
        keep_bits: Tensor | None,
    ) -> Tensor:
        out = torch.empty(m, n, dtype=dtype, device=device)
        launch(*filled(ps), *filled(qs), u, v, keep_bits, out)
        return out

    return run
