"""Forward by the kernels: ``y = x·Wᵀ + scale·xa·Bᵀ + bias`` with ``xa = drop(x)·Aᵀ``.

Two passes over x, the second of them the base product's own; or one kernel that takes ``x·Aᵀ``
along in every column of tiles, for narrow outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import plans, tuning
from ..kernels.gemm import plan_expand, plan_pointer_gemm
from ..kernels.hopper import plan_hopper_gemm, rows_suit_tma, suits_tma
from ..kernels.launching import Layout, Prepared, layout_of, num_sms
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
from ..kernels.tuning import Config, Shape
from . import reference
from .xa import dropout_arguments, plan_xa

# Called with x, weight, A, B, bias and seed, it gives y, xa and the keep bits.
Forward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    tuple[Tensor, Tensor, Tensor | None],
]


@triton.jit(do_not_specialize=["threshold"])
def one_kernel_kernel(
    x_ptr,
    w_ptr,
    a_ptr,
    b_ptr,
    bias_ptr,
    y_ptr,
    xa_ptr,
    bits_ptr,
    seed_ptr,
    M,
    N,
    K,
    R,
    num_bytes,
    scale,
    threshold,
    keep_scale,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_ar,
    stride_ak,
    stride_bn,
    stride_br,
    stride_bias,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
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
        w = load_tile(w_ptr, inner, cols, stride_wk, stride_wn, K, N)  # [BK, BN]
        a = load_tile(a_ptr, inner, ranks, stride_ak, stride_ar, K, R)  # [BK, BR]
        acc = dot(x, w, acc, PRECISION)
        if HAS_DROPOUT:
            byte_cols = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            bits = draw_bytes(seed, rows, byte_cols, threshold)
            if pid_n == 0:
                offsets = rows.to(tl.int64)[:, None] * num_bytes + byte_cols[None, :]
                inside = (rows < M)[:, None] & (byte_cols < num_bytes)[None, :]
                tl.store(bits_ptr + offsets, bits.to(tl.uint8), mask=inside)
            x = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
        acc_a = dot(x, cast(a, DTYPE), acc_a, PRECISION)
    xa = cast(acc_a * keep_scale, DTYPE)
    if pid_n == 0:
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        tl.store(xa_ptr + rows.to(tl.int64)[:, None] * R + ranks[None, :], xa, mask=inside)
    b = load_tile(b_ptr, ranks, cols, stride_br, stride_bn, R, N)  # [BR, BN]
    branch = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    acc += scale * dot(xa, cast(b, DTYPE), branch, PRECISION)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols * stride_bias, mask=cols < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :], cast(acc, DTYPE), mask=inside)


def one_kernel(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y``, ``xa`` and the keep bits in one kernel, for ranks up to ``tuning.ONE_KERNEL_RANK``.

    Arguments as `lora_linear` on 2-D x and `compute_xa`; config: block_m, block_n, block_k, group.
    """
    layouts = (
        layout_of(x),
        layout_of(weight),
        layout_of(lora_a),
        layout_of(lora_b),
        layout_of(bias),
    )
    run = plan_one_kernel(*layouts, scale, seed is not None, dropout_p, config)
    return run(x, weight, lora_a, lora_b, bias, seed)


def plan_one_kernel(
    x: Layout,
    weight: Layout,
    lora_a: Layout,
    lora_b: Layout,
    bias: Layout | None,
    scale: float,
    dropped: bool,
    dropout_p: float,
    config: Config,
) -> Forward:
    """`one_kernel` for tensors of these layouts."""
    (m, k), (r, n), dtype, device = x.shape, (lora_a.shape[0], weight.shape[0]), x.dtype, x.device
    num_bytes = ceil_div(k, 8)
    launch = Prepared(
        one_kernel_kernel,
        ceil_div(m, config.block_m) * ceil_div(n, config.block_n),
        config.warps,
        config.stages,
        {
            **dropout_arguments(num_bytes, dropped, dropout_p),
            "M": m,
            "N": n,
            "K": k,
            "R": r,
            "scale": scale,
            "stride_xm": x.stride[0],
            "stride_xk": x.stride[1],
            "stride_wn": weight.stride[0],
            "stride_wk": weight.stride[1],
            "stride_ar": lora_a.stride[0],
            "stride_ak": lora_a.stride[1],
            "stride_bn": lora_b.stride[0],
            "stride_br": lora_b.stride[1],
            "stride_bias": 0 if bias is None else bias.stride[0],
            "DTYPE": TRITON_DTYPES[dtype],
            "HAS_BIAS": bias is not None,
            "PRECISION": precision(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_of(r),
            "GROUP": config.group,
        },
    )

    def run(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        y = torch.empty(m, n, dtype=dtype, device=device)
        xa = torch.empty(m, r, dtype=dtype, device=device)
        bits = torch.empty(m, num_bytes, dtype=torch.uint8, device=device) if dropped else None
        launch(x, weight, lora_a, lora_b, bias, y, xa, bits, seed)
        return y, xa, bits

    return run


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    seed: Tensor | None,
    dropout_p: float,
    capability: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``y``, ``xa`` and the keep bits, by the strategy that `tuning` gives for this shape.

    x ``[M, K]`` and no dimension 0; otherwise as `reference.forward`, with a seed for the mask.
    """
    aligned = not (x.data_ptr() | weight.data_ptr()) % 16
    settings = scale, None if seed is None else dropout_p, capability, aligned
    key = plans.key("forward", (x, weight, lora_a, lora_b, bias), settings)
    run = plans.find(key)
    if run is None:
        layouts = (
            layout_of(x),
            layout_of(weight),
            layout_of(lora_a),
            layout_of(lora_b),
            layout_of(bias),
        )
        run = plans.keep(key, plan_forward(*layouts, *settings))
    return run(x, weight, lora_a, lora_b, bias, seed)


def plan_forward(
    x: Layout,
    weight: Layout,
    lora_a: Layout,
    lora_b: Layout,
    bias: Layout | None,
    scale: float,
    dropout_p: float | None,
    capability: tuple[int, int],
    aligned: bool,
) -> Forward:
    """`forward` for tensors of these layouts.

    Args:
        dropout_p: None where nothing is dropped.
        aligned: whether the addresses of x and weight are multiples of 16.
    """
    shape = Shape(x.shape[0], weight.shape[0], x.shape[1], lora_a.shape[0])
    dropped, p = dropout_p is not None, dropout_p or 0.0
    name = tuning.strategy(
        "forward",
        capability,
        x.dtype,
        shape,
        dropped=dropped,
        tma=aligned and rows_suit_tma(x) and suits_tma(weight) and weight.shape[0] % 8 == 0,
        sms=num_sms(x),
    )
    if name == "aten":

        def by_torch(
            x: Tensor,
            weight: Tensor,
            lora_a: Tensor,
            lora_b: Tensor,
            bias: Tensor | None,
            seed: Tensor | None,
        ) -> tuple[Tensor, Tensor, None]:
            return *reference.forward(x, weight, lora_a, lora_b, bias, scale, None, 0.0), None

        return by_torch

    def config(kernel: str) -> Config:
        return tuning.lookup(kernel, capability, x.dtype.itemsize, shape)

    if name == "one_kernel":
        return plan_one_kernel(
            x, weight, lora_a, lora_b, bias, scale, dropped, p, config("one_kernel")
        )
    xa_of = plan_xa(x, lora_a, dropped, p, config("xa"))
    xa = x.filled(shape.m, shape.r)
    if name == "beta1":
        expand = plan_expand(xa, lora_b.t(), bias, None, scale, 0.0, config("expand"))
    else:
        plan = plan_hopper_gemm if name == "hopper" else plan_pointer_gemm
        chosen = config("hopper" if name == "hopper" else "gemm")
        gemm = plan(x, weight.t(), xa, lora_b.t(), bias, None, scale, 0.0, chosen)

    def run(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        xa, bits = xa_of(x, lora_a, seed)
        if name == "beta1":
            return expand(xa, lora_b, bias, None).addmm_(x, weight.t()), xa, bits
        return gemm(x, weight, xa, lora_b, bias, None), xa, bits

    return run
