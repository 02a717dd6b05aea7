"""``out_i = p·w_iᵀ + scale_i·u_i·b_iᵀ + bias_i``: members that share p, in one launch.

The column tiles of all members are walked as if they were of one wide output, so that the rows of p
stay in L2 for all of them. A tile picks its member's operands before its loop begins, and from
there on is a tile of `gemm`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launching import Layout, Prepared, layout_of
from .members import (
    Members,
    Tensors,
    bias_arguments,
    contiguous,
    empty_outputs,
    filled,
    member_of,
    pick,
)
from .tiles import (
    TRITON_DTYPES,
    block_of,
    cast,
    ceil_div,
    grouped_tile,
    precision,
    product_tile,
    rank_tile,
)
from .tuning import Config

# Called with p, the w, u, the b and the biases, it gives the outputs.
Products = Callable[[Tensor | None, Sequence[Tensor], Tensor, Tensors, Tensors], tuple[Tensor, ...]]


@triton.jit
def group_gemm_kernel(
    p_ptr,
    u_ptr,
    w0_ptr,
    w1_ptr,
    w2_ptr,
    w3_ptr,
    b0_ptr,
    b1_ptr,
    b2_ptr,
    b3_ptr,
    bias0_ptr,
    bias1_ptr,
    bias2_ptr,
    bias3_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    M,
    K,
    pitch,
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
    stride_pm,
    stride_pk,
    stride_wk,
    stride_wn,
    p_step,
    w_step,
    stride_um,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    PACKED: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOOPED: tl.constexpr,
    GROUP: tl.constexpr,
):
    end0 = tl.cdiv(n0, BLOCK_N)
    end1 = end0 + tl.cdiv(n1, BLOCK_N)
    end2 = end1 + tl.cdiv(n2, BLOCK_N)
    end3 = end2 + tl.cdiv(n3, BLOCK_N)
    pid_m, tile_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), end3, GROUP)
    member = member_of(tile_n, end0, end1, end2, MEMBERS)
    pid_n = tile_n - pick(member, 0, end0, end1, end2, MEMBERS)
    n = pick(member, n0, n1, n2, n3, MEMBERS)
    r = pick(member, r0, r1, r2, r3, MEMBERS)
    acc = rank_tile(
        u_ptr + pick(member, at0, at1, at2, at3, MEMBERS),
        pick(member, b0_ptr, b1_ptr, b2_ptr, b3_ptr, MEMBERS),
        None,
        None,
        pid_m,
        pid_n,
        M,
        n,
        r,
        0,
        pick(member, scale0, scale1, scale2, scale3, MEMBERS),
        stride_um,
        1,
        1,
        r,
        0,
        DTYPE,
        False,
        False,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        LOOPED,
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        bias_ptr = pick(member, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr, MEMBERS)
        biased = pick(member, biased0, biased1, biased2, biased3, MEMBERS)
        bias = tl.load(bias_ptr + cols, mask=cols < biased, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    if HAS_PRODUCT:
        acc = product_tile(
            acc,
            p_ptr,
            pick(member, w0_ptr, w1_ptr, w2_ptr, w3_ptr, MEMBERS),
            rows,
            cols,
            M,
            n,
            K,
            stride_pm,
            stride_pk,
            stride_wk,
            stride_wn,
            p_step,
            w_step,
            EVEN_K,
            PRECISION,
            BLOCK_K,
        )
    out_ptr = pick(member, out0_ptr, out1_ptr, out2_ptr, out3_ptr, MEMBERS)
    if not PACKED:
        pitch = n
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :]
    tl.store(out_ptrs, cast(acc, DTYPE), mask=(rows < M)[:, None] & (cols < n)[None, :])


def group_gemm(
    p: Tensor | None,
    ws: Sequence[Tensor],
    u: Tensor,
    bs: Tensors,
    biases: Tensors,
    scales: Sequence[float],
    *,
    packed: bool = False,
    config: Config,
) -> tuple[Tensor, ...]:
    """``out_i = p·w_iᵀ + scale_i·u_i·b_iᵀ + bias_i`` for up to `MOST` members, in one launch.

    Args:
        p: ``[M, K]``, float32, float16 or bfloat16; None for the rank parts and biases alone.
        ws: ``[N_i, K]`` of p's dtype, with the same strides (see `alike`).
        u: ``[M, ΣR]`` of p's dtype, rows contiguous: the u_i of the members with b, side by side.
        bs: ``[N_i, R_i]``, of p's dtype or wider, rounded to it, or None; one at least is not.
        biases: ``[N_i]`` of p's dtype, or None.
        scales: factors on the rank parts.
        packed: the outputs side by side in one buffer.
        config: block_m, block_n, block_k, group.

    Returns:
        ``[M, N_i]`` each, contiguous, or column slices of one ``[M, ΣN]`` if packed.
    """
    run = plan_group_gemm(
        layout_of(p),
        [Layout.of(w) for w in ws],
        Layout.of(u),
        [layout_of(b) for b in bs],
        [layout_of(bias) for bias in biases],
        scales,
        config,
        packed,
    )
    return run(p, ws, u, bs, biases)


def plan_group_gemm(
    p: Layout | None,
    ws: Sequence[Layout],
    u: Layout,
    bs: Sequence[Layout | None],
    biases: Sequence[Layout | None],
    scales: Sequence[float],
    config: Config,
    packed: bool = False,
) -> Products:
    """`group_gemm` for tensors of these layouts."""
    m, dtype, device = u.shape[0], u.dtype, u.device
    ns = [w.shape[0] for w in ws]
    members = Members(ns, bs, scales)
    product: dict[str, object] = {
        "K": 0,
        "stride_pm": 0,
        "stride_pk": 0,
        "stride_wk": 0,
        "stride_wn": 0,
        "p_step": 0,
        "w_step": 0,
        "EVEN_K": True,
        "BLOCK_K": 0,
        "GROUP": 1,
    }
    if p is not None:
        (k, block_k), (stride_wn, stride_wk) = (p.shape[1], config.block_k), ws[0].stride
        product = {
            "K": k,
            "stride_pm": p.stride[0],
            "stride_pk": p.stride[1],
            "stride_wk": stride_wk,
            "stride_wn": stride_wn,
            "p_step": block_k * p.stride[1],
            "w_step": block_k * stride_wk,
            "EVEN_K": k % block_k == 0,
            "BLOCK_K": block_k,
            "GROUP": config.group,
        }
    launch = Prepared(
        group_gemm_kernel,
        ceil_div(m, config.block_m) * sum(ceil_div(n, config.block_n) for n in ns),
        config.warps,
        config.stages,
        {
            **members.arguments,
            **bias_arguments(ns, biases),
            **product,
            "M": m,
            "pitch": sum(ns) if packed else 0,
            "stride_um": u.stride[0],
            "DTYPE": TRITON_DTYPES[dtype],
            "HAS_PRODUCT": p is not None,
            "PACKED": packed,
            "PRECISION": precision(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_R": block_of(members.rank),
            "LOOPED": members.rank > block_of(members.rank),
        },
    )

    def run(
        p: Tensor | None, ws: Sequence[Tensor], u: Tensor, bs: Tensors, biases: Tensors
    ) -> tuple[Tensor, ...]:
        outs = empty_outputs(m, ns, dtype, device, packed)
        launch(
            p,
            u,
            *filled(() if p is None else ws),
            *members.factors(bs),
            *contiguous(biases),
            *filled(outs),
        )
        return outs

    return run
