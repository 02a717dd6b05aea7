"""``xa = drop(x)·Aᵀ`` in one pass over x, which draws the keep mask on its way."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.dropout import keep_threshold
from ..kernels.launching import Layout, Prepared, num_sms
from ..kernels.partials import Sum, chunks, plan_sums, slabs_like
from ..kernels.tiles import (
    TRITON_DTYPES,
    block_of,
    cast,
    ceil_div,
    dot,
    draw_bytes,
    expand_bits,
    load_tile,
    precision,
)
from ..kernels.tuning import Config


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
    layouts = Layout.of(x), Layout.of(lora_a)
    return plan_xa(*layouts, seed is not None, dropout_p, config)(x, lora_a, seed)


def plan_xa(
    x: Layout, lora_a: Layout, dropped: bool, dropout_p: float, config: Config
) -> Callable[[Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor | None]]:
    """`compute_xa` for tensors of these layouts; called with x, A and the seed."""
    (m, k), r, dtype, device = x.shape, lora_a.shape[0], x.dtype, x.device
    block_r, num_bytes = block_of(r), ceil_div(k, 8)
    tiles = ceil_div(m, config.block_m) * ceil_div(r, block_r)
    split, steps = chunks(tiles, ceil_div(k, config.block_k), num_sms(x))
    launch = Prepared(
        xa_kernel,
        tiles * split,
        config.warps,
        config.stages,
        {
            **dropout_arguments(num_bytes, dropped, dropout_p),
            "M": m,
            "K": k,
            "R": r,
            "stride_xm": x.stride[0],
            "stride_xk": x.stride[1],
            "stride_ar": lora_a.stride[0],
            "stride_ak": lora_a.stride[1],
            "STEPS": steps,
            "DTYPE": TRITON_DTYPES[dtype],
            "PRECISION": precision(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r,
        },
    )
    add = plan_sums([Sum(split, m * r)])

    def run(x: Tensor, lora_a: Tensor, seed: Tensor | None) -> tuple[Tensor, Tensor | None]:
        xa = torch.empty(m, r, dtype=dtype, device=device)
        bits = torch.empty(m, num_bytes, dtype=torch.uint8, device=device) if dropped else None
        if split == 1:
            launch(x, lora_a, xa, bits, seed)
        else:
            slabs = slabs_like(split, m, r, device=device)
            launch(x, lora_a, slabs, bits, seed)
            add([(slabs, xa)])
        return xa, bits

    return run


def dropout_arguments(num_bytes: int, dropped: bool, dropout_p: float) -> dict[str, object]:
    """What a kernel that draws the mask is told of it."""
    return {
        "num_bytes": num_bytes if dropped else 0,
        "threshold": keep_threshold(dropout_p) if dropped else 0,
        "keep_scale": 1.0 / (1.0 - dropout_p) if dropped else 1.0,
        "HAS_DROPOUT": dropped,
    }
