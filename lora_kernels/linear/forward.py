"""The forward kernels and their launchers: ``xa = drop(x)·Aᵀ``, ``y = x·Wᵀ + scale·xa·Bᵀ + bias``.

Two passes over x, the second of them the base product's own; or one kernel that takes ``x·Aᵀ``
along in every column of tiles, for narrow outputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import tuning
from ..kernels.dropout import keep_threshold
from ..kernels.gemm import expand, hopper_gemm, pointer_gemm, suits_tma
from ..kernels.partials import Partial, chunks, slabs_like, sum_partials
from ..kernels.tiles import (
    TRITON_DTYPES,
    block_of,
    cast,
    dot,
    draw_bytes,
    expand_bits,
    grouped_tile,
    launch,
    load_tile,
    num_sms,
    precision,
)
from ..kernels.tuning import Config, Shape
from . import reference


@triton.jit(do_not_specialize=["STEPS", "threshold"])
def xa_kernel(
    x_ptr,
    a_ptr,
    out_ptr,
    bits_ptr,
    seed_ptr,
    M,
    K,
    R,
    num_bytes,
    threshold,
    keep_scale,
    stride_xm,
    stride_xk,
    stride_ar,
    stride_ak,
    STEPS,
    DTYPE: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_r = tl.program_id(0) % tiles_r
    pid_m = (tl.program_id(0) // tiles_r) % tiles_m
    chunk = tl.program_id(0) // (tiles_r * tiles_m)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if HAS_DROPOUT:
        seed = tl.load(seed_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for step in range(chunk * STEPS, min((chunk + 1) * STEPS, tl.cdiv(K, BLOCK_K))):
        cols = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = load_tile(x_ptr, rows, cols, stride_xm, stride_xk, M, K)  # [BM, BK]
        a = load_tile(a_ptr, cols, ranks, stride_ak, stride_ar, K, R)  # [BK, BR]
        if HAS_DROPOUT:
            byte_cols = step * (BLOCK_K // 8) + tl.arange(0, BLOCK_K // 8)
            bits = draw_bytes(seed, rows, byte_cols, threshold)
            if pid_r == 0:
                offsets = rows.to(tl.int64)[:, None] * num_bytes + byte_cols[None, :]
                inside = (rows < M)[:, None] & (byte_cols < num_bytes)[None, :]
                tl.store(bits_ptr + offsets, bits.to(tl.uint8), mask=inside)
            x = tl.where(expand_bits(bits, BLOCK_M, BLOCK_K), x, 0.0)
        acc = dot(x, cast(a, DTYPE), acc, PRECISION)
    out_ptrs = out_ptr + chunk.to(tl.int64) * M * R
    out_ptrs += rows.to(tl.int64)[:, None] * R + ranks[None, :]
    inside = (rows < M)[:, None] & (ranks < R)[None, :]
    tl.store(out_ptrs, cast(acc * keep_scale, out_ptr.dtype.element_ty), mask=inside)


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


def compute_xa(
    x: Tensor,
    lora_a: Tensor,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    config: Config,
) -> tuple[Tensor, Tensor | None]:
    """``xa = drop(x)·Aᵀ`` in one pass over x, which draws and stores the keep mask.

    Args:
        x: ``[M, K]``, float32, float16 or bfloat16, any strides.
        lora_a: ``[R, K]``, of x's dtype or wider; rounded to x's dtype.
        seed: int64 ``[1]`` of the mask on x's device, or None for no dropout.
        dropout_p: probability of dropping an element, with seed.
        config: block_m, block_k.

    Returns:
        xa ``[M, R]`` in x's dtype; the keep bits, uint8 ``[M, ceil(K / 8)]``, or None.
    """
    (m, k), r = x.shape, lora_a.shape[0]
    block_r = block_of(r)
    tiles = triton.cdiv(m, config.block_m) * triton.cdiv(r, block_r)
    split, steps = chunks(tiles, triton.cdiv(k, config.block_k), num_sms(x))
    xa = torch.empty(m, r, dtype=x.dtype, device=x.device)
    out = xa if split == 1 else slabs_like(split, m, r, device=x.device)
    bits = _empty_bits(x) if seed is not None else None
    launch(
        xa_kernel,
        tiles * split,
        config.warps,
        config.stages,
        x_ptr=x,
        a_ptr=lora_a,
        out_ptr=out,
        **_dropout_arguments(bits, seed, dropout_p),
        M=m,
        K=k,
        R=r,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_ar=lora_a.stride(0),
        stride_ak=lora_a.stride(1),
        STEPS=steps,
        DTYPE=TRITON_DTYPES[x.dtype],
        PRECISION=precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_K=config.block_k,
        BLOCK_R=block_r,
    )
    if split > 1:
        sum_partials([Partial(out, xa)])
    return xa, bits


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
    (m, k), (r, n) = x.shape, (lora_a.shape[0], weight.shape[0])
    y = torch.empty(m, n, dtype=x.dtype, device=x.device)
    xa = torch.empty(m, r, dtype=x.dtype, device=x.device)
    bits = _empty_bits(x) if seed is not None else None
    launch(
        one_kernel_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        config.warps,
        config.stages,
        x_ptr=x,
        w_ptr=weight,
        a_ptr=lora_a,
        b_ptr=lora_b,
        bias_ptr=bias,
        y_ptr=y,
        xa_ptr=xa,
        **_dropout_arguments(bits, seed, dropout_p),
        M=m,
        N=n,
        K=k,
        R=r,
        scale=scale,
        stride_xm=x.stride(0),
        stride_xk=x.stride(1),
        stride_wn=weight.stride(0),
        stride_wk=weight.stride(1),
        stride_ar=lora_a.stride(0),
        stride_ak=lora_a.stride(1),
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        stride_bias=0 if bias is None else bias.stride(0),
        DTYPE=TRITON_DTYPES[x.dtype],
        HAS_BIAS=bias is not None,
        PRECISION=precision(x.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BLOCK_R=block_of(r),
        GROUP=config.group,
    )
    return y, xa, bits


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
    shape = Shape(x.shape[0], weight.shape[0], x.shape[1], lora_a.shape[0])
    name = tuning.strategy(
        "forward",
        capability,
        x.dtype,
        shape,
        dropped=seed is not None,
        tma=suits_tma(x) and x.stride(1) == 1 and suits_tma(weight) and weight.shape[0] % 8 == 0,
        sms=num_sms(x),
    )
    if name == "aten":
        return *reference.forward(x, weight, lora_a, lora_b, bias, scale, None, 0.0), None

    def config(kernel: str) -> Config:
        return tuning.lookup(kernel, capability, x.element_size(), shape)

    if name == "one_kernel":
        chosen = config("one_kernel")
        return one_kernel(x, weight, lora_a, lora_b, bias, scale, seed, dropout_p, config=chosen)
    xa, bits = compute_xa(x, lora_a, seed, dropout_p, config=config("xa"))
    if name == "beta1":
        y = expand(xa, lora_b.t(), bias=bias, scale=scale, config=config("expand"))
        return y.addmm_(x, weight.t()), xa, bits
    gemm, kernel = (hopper_gemm, "hopper") if name == "hopper" else (pointer_gemm, "gemm")
    y = gemm(x, weight.t(), xa, lora_b.t(), bias=bias, scale=scale, config=config(kernel))
    return y, xa, bits


def _empty_bits(x: Tensor) -> Tensor:
    return torch.empty(x.shape[0], (x.shape[1] + 7) // 8, dtype=torch.uint8, device=x.device)


def _dropout_arguments(
    bits: Tensor | None, seed: Tensor | None, dropout_p: float
) -> dict[str, object]:
    return {
        "bits_ptr": bits,
        "seed_ptr": seed,
        "num_bytes": 0 if bits is None else bits.shape[1],
        "threshold": 0 if seed is None else keep_threshold(dropout_p),
        "keep_scale": 1.0 if seed is None else 1.0 / (1.0 - dropout_p),
        "HAS_DROPOUT": seed is not None,
    }
