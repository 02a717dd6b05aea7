"""Forward of a group in one kernel, which takes ``x·A_iᵀ`` along in every tile of member i."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.launching import Layout, Prepared, layout_of
from ..kernels.members import (
    Members,
    Tensors,
    bias_arguments,
    contiguous,
    empty_outputs,
    filled,
    member_of,
    pick,
)
from ..kernels.tiles import (
    TRITON_DTYPES,
    block_of,
    cast,
    ceil_div,
    dot,
    draw_bytes,
    expand_bits,
    grouped_tile,
    load_tile,
    precision,
)
from ..kernels.tuning import Config
from ..linear.xa import dropout_arguments

# Called with x, the weights, A stacked, the B, the biases and seed: the ys, xa and the keep bits.
OneKernel = Callable[
    [Tensor, Sequence[Tensor], Tensor, Tensors, Tensors, Tensor | None],
    tuple[tuple[Tensor, ...], Tensor, Tensor | None],
]


@triton.jit(do_not_specialize=["threshold"])
def group_one_kernel_kernel(
    x_ptr,
    a_ptr,
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
    y0_ptr,
    y1_ptr,
    y2_ptr,
    y3_ptr,
    xa_ptr,
    bits_ptr,
    seed_ptr,
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
    num_bytes,
    threshold,
    keep_scale,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_xam,
    DTYPE: tl.constexpr,
    MEMBERS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
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
    at = pick(member, at0, at1, at2, at3, MEMBERS)
    w_ptr = pick(member, w0_ptr, w1_ptr, w2_ptr, w3_ptr, MEMBERS)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    ranks = tl.arange(0, BLOCK_R)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc_a = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for step in range(0, tl.cdiv(K, BLOCK_K)):
        inner = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, inner, stride_xm, stride_xk, M, K)  # [BM, BK]
        w = load_tile(w_ptr, inner, cols, stride_wk, stride_wn, K, n)  # [BK, BN]
        a = load_tile(a_ptr, inner, at + ranks, stride_ak, stride_ar, K, at + r)  # [BK, BR]
        acc = dot(x, w, acc, PRECISION)
        if HAS_DROPOUT:
            byte_cols = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            bits = draw_bytes(seed, rows, byte_cols, threshold)
            if tile_n == 0:
                offsets = rows.to(tl.int64)[:, None] * num_bytes + byte_cols[None, :]
                inside = (rows < M)[:, None] & (byte_cols < num_bytes)[None, :]
                tl.store(bits_ptr + offsets, bits.to(tl.uint8), mask=inside)
            x = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
        acc_a = dot(x, cast(a, DTYPE), acc_a, PRECISION)
    xa = cast(acc_a * keep_scale, DTYPE)
    if pid_n == 0:
        inside = (rows < M)[:, None] & (ranks < r)[None, :]
        xa_ptrs = xa_ptr + at + rows.to(tl.int64)[:, None] * stride_xam + ranks[None, :]
        tl.store(xa_ptrs, xa, mask=inside)
    b_ptr = pick(member, b0_ptr, b1_ptr, b2_ptr, b3_ptr, MEMBERS)
    b = load_tile(b_ptr, ranks, cols, 1, r, r, n)  # [BR, BN]
    branch = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    scale = pick(member, scale0, scale1, scale2, scale3, MEMBERS)
    acc += scale * dot(xa, cast(b, DTYPE), branch, PRECISION)
    if HAS_BIAS:
        bias_ptr = pick(member, bias0_ptr, bias1_ptr, bias2_ptr, bias3_ptr, MEMBERS)
        biased = pick(member, biased0, biased1, biased2, biased3, MEMBERS)
        bias = tl.load(bias_ptr + cols, mask=cols < biased, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (cols < n)[None, :]
    y_ptr = pick(member, y0_ptr, y1_ptr, y2_ptr, y3_ptr, MEMBERS)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :], cast(acc, DTYPE), mask=inside)


def group_one_kernel(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_a: Tensor,
    lora_bs: Tensors,
    biases: Tensors,
    scales: Sequence[float],
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
    """The ``ys``, ``xa`` and the keep bits in one kernel.

    Args:
        x: ``[M, K]``, float32, float16 or bfloat16, any strides.
        weights: ``[N_i, K]`` of x's dtype, with the same strides.
        lora_a: ``[ΣR, K]``, the members' A stacked, of x's dtype or wider; rounded to x's dtype.
        lora_bs: ``[N_i, R_i]``, None for a member without LoRA; no R_i beyond
            ``tuning.ONE_KERNEL_RANK``.
        biases: ``[N_i]``, or None.
        scales: factors on the members' branches.
        seed, dropout_p: as in `compute_xa`.
        config: block_m, block_n, block_k, group.

    Returns:
        y_i ``[M, N_i]`` each; xa ``[M, ΣR]``; uint8 ``[M, ceil(K / 8)]`` or None.
    """
    run = plan_group_one_kernel(
        Layout.of(x),
        [Layout.of(weight) for weight in weights],
        Layout.of(lora_a),
        [layout_of(lora_b) for lora_b in lora_bs],
        [layout_of(bias) for bias in biases],
        scales,
        seed is not None,
        dropout_p,
        config,
    )
    return run(x, weights, lora_a, lora_bs, biases, seed)


def plan_group_one_kernel(
    x: Layout,
    weights: Sequence[Layout],
    lora_a: Layout,
    lora_bs: Sequence[Layout | None],
    biases: Sequence[Layout | None],
    scales: Sequence[float],
    dropped: bool,
    dropout_p: float,
    config: Config,
) -> OneKernel:
    """`group_one_kernel` for tensors of these layouts."""
    (m, k), dtype, device = x.shape, x.dtype, x.device
    ns, ranks, num_bytes = [weight.shape[0] for weight in weights], lora_a.shape[0], ceil_div(k, 8)
    members = Members(ns, lora_bs, scales)
    launch = Prepared(
        group_one_kernel_kernel,
        ceil_div(m, config.block_m) * sum(ceil_div(n, config.block_n) for n in ns),
        config.warps,
        config.stages,
        {
            **members.arguments,
            **bias_arguments(ns, biases),
            **dropout_arguments(num_bytes, dropped, dropout_p),
            "M": m,
            "K": k,
            "stride_xm": x.stride[0],
            "stride_xk": x.stride[1],
            "stride_wn": weights[0].stride[0],
            "stride_wk": weights[0].stride[1],
            "stride_ar": lora_a.stride[0],
            "stride_ak": lora_a.stride[1],
            "stride_xam": ranks,
            "DTYPE": TRITON_DTYPES[dtype],
            "PRECISION": precision(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_of(members.rank),
            "GROUP": config.group,
        },
    )

    def run(
        x: Tensor,
        weights: Sequence[Tensor],
        lora_a: Tensor,
        lora_bs: Tensors,
        biases: Tensors,
        seed: Tensor | None,
    ) -> tuple[tuple[Tensor, ...], Tensor, Tensor | None]:
        ys = empty_outputs(m, ns, dtype, device, False)
        xa = torch.empty(m, ranks, dtype=dtype, device=device)
        bits = torch.empty(m, num_bytes, dtype=torch.uint8, device=device) if dropped else None
        launch(
            x,
            lora_a,
            *filled(weights),
            *members.factors(lora_bs),
            *contiguous(biases),
            *filled(ys),
            xa,
            bits,
            seed,
        )
        return ys, xa, bits

    return run
