"""A thin matrix transposed times a wide one: ``da = dxaᵀ·drop(x)``, and db where it is taken apart.

One pass over the wide one, split over its rows and summed in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Layout, Prepared, num_sms
from .partials import Sum, chunks, plan_sums, slabs_like
from .tiles import block_of, cast, ceil_div, dot, load_keep, load_tile, precision, rank_by_8
from .tuning import Config


@triton.jit(do_not_specialize=["STEPS"])
def thin_kernel(
    thin_ptr,
    wide_ptr,
    bits_ptr,
    out_ptr,
    M,
    K,
    R,
    num_bytes,
    scale,
    stride_thin_m,
    stride_thin_r,
    stride_wide_m,
    stride_wide_k,
    stride_out_r,
    stride_out_k,
    STEPS,
    HAS_MASK: tl.constexpr,
    RANK_BY_8: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if RANK_BY_8:
        R, stride_thin_m = (R // 8) * 8, (stride_thin_m // 8) * 8
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles_k = tl.cdiv(K, BLOCK_K)
    pid_r = tl.program_id(0) % tiles_r
    pid_k = (tl.program_id(0) // tiles_r) % tiles_k
    chunk = tl.program_id(0) // (tiles_r * tiles_k)
    cols = pid_k * BLOCK_K + tl.arange(0, BLOCK_K)
    ranks = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    # Transposed, so that the long side K is the product's rows: the rank alone would be too few
    # for Hopper's widest instruction.
    acc = tl.zeros((BLOCK_K, BLOCK_R), dtype=tl.float32)
    for step in range(chunk * STEPS, min((chunk + 1) * STEPS, tl.cdiv(M, BLOCK_M))):
        rows = step * BLOCK_M + tl.arange(0, BLOCK_M)
        thin = load_tile(thin_ptr, rows, ranks, stride_thin_m, stride_thin_r, M, R)  # [BM, BR]
        if HAS_MASK:
            wide = load_tile(wide_ptr, rows, cols, stride_wide_m, stride_wide_k, M, K)  # [BM, BK]
            keep = load_keep(bits_ptr, rows, pid_k * (BLOCK_K // 8), M, num_bytes, BLOCK_M, BLOCK_K)
            wide = tl.trans(tl.where(keep, wide, 0.0))
        else:
            # Read as its transpose: without wgmma, a tile turned round is loaded with a wait.
            wide = load_tile(wide_ptr, cols, rows, stride_wide_k, stride_wide_m, K, M)  # [BK, BM]
        acc = dot(wide, thin, acc, PRECISION)
    out_ptrs = out_ptr + chunk.to(tl.int64) * R * K
    out_ptrs += ranks[None, :] * stride_out_r + cols.to(tl.int64)[:, None] * stride_out_k
    inside = (cols < K)[:, None] & (ranks < R)[None, :]
    tl.store(out_ptrs, cast(acc * scale, out_ptr.dtype.element_ty), mask=inside)


def compute_da(
    dxa: Tensor,
    x: Tensor,
    keep_bits: Tensor | None = None,
    dropout_p: float = 0.0,
    *,
    dtype: torch.dtype | None = None,
    config: Config,
) -> Tensor:
    """``da = dxaᵀ·drop(x)`` in one pass over x.

    Args:
        dxa: ``[M, R]`` of x's dtype.
        x: ``[M, K]``, float32, float16 or bfloat16, any strides.
        keep_bits: uint8 ``[M, ceil(K / 8)]``, or None for no dropout.
        dropout_p: probability that the bits were drawn with.
        dtype: of the result, x's by default.
        config: block_m, block_k.

    Returns:
        da ``[R, K]``.
    """
    layouts = Layout.of(dxa), Layout.of(x)
    plan = plan_da(*layouts, keep_bits is not None, dropout_p, dtype or x.dtype, config)
    return plan(dxa, x, keep_bits)


def compute_db(
    dy: Tensor, xa: Tensor, scale: float, dtype: torch.dtype, *, config: Config
) -> Tensor:
    """``db = scale·dyᵀ·xa`` in a pass over dy of its own; da's kernel, the other way round.

    Args:
        dy: ``[M, N]``, float32, float16 or bfloat16, any strides.
        xa: ``[M, R]`` of dy's dtype.
        scale: factor on the LoRA branch.
        dtype: of the result.
        config: block_m, block_k, the latter of N.

    Returns:
        db ``[N, R]``.
    """
    return plan_db(Layout.of(dy), Layout.of(xa), scale, dtype, config)(dy, xa)


def plan_da(
    dxa: Layout, x: Layout, dropped: bool, dropout_p: float, dtype: torch.dtype, config: Config
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """`compute_da` for tensors of these layouts; called with dxa, x and the keep bits."""
    scale = 1.0 / (1.0 - dropout_p) if dropped else 1.0
    shape = dxa.shape[1], x.shape[1]
    return _plan_product(dxa, x, dropped, scale, dtype, shape, (shape[1], 1), config)


def plan_db(
    dy: Layout, xa: Layout, scale: float, dtype: torch.dtype, config: Config
) -> Callable[[Tensor, Tensor], Tensor]:
    """`compute_db` for tensors of these layouts; called with dy and xa."""
    shape = dy.shape[1], xa.shape[1]
    product = _plan_product(xa, dy, False, scale, dtype, shape, (1, shape[1]), config)
    return lambda dy, xa: product(xa, dy, None)


def _plan_product(
    thin: Layout,
    wide: Layout,
    dropped: bool,
    scale: float,
    dtype: torch.dtype,
    shape: tuple[int, int],
    strides: tuple[int, int],
    config: Config,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """``scale·thinᵀ·(mask⊙wide)`` as a tensor of ``shape``, ``strides`` being those of [R, K]."""
    (m, k), r, device = wide.shape, thin.shape[1], wide.device
    block_r = block_of(r)
    tiles = ceil_div(k, config.block_k) * ceil_div(r, block_r)
    split, steps = chunks(tiles, ceil_div(m, config.block_m), num_sms(wide))
    launch = Prepared(
        thin_kernel,
        tiles * split,
        config.warps,
        config.stages,
        {
            "M": m,
            "K": k,
            "R": r,
            "num_bytes": ceil_div(k, 8) if dropped else 0,
            "scale": scale,
            "stride_thin_m": thin.stride[0],
            "stride_thin_r": thin.stride[1],
            "stride_wide_m": wide.stride[0],
            "stride_wide_k": wide.stride[1],
            "stride_out_r": strides[0],
            "stride_out_k": strides[1],
            "STEPS": steps,
            "HAS_MASK": dropped,
            "RANK_BY_8": rank_by_8(thin),
            "PRECISION": precision(wide.dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r,
        },
    )
    add = plan_sums([Sum(split, r * k)])

    def run(thin: Tensor, wide: Tensor, keep_bits: Tensor | None) -> Tensor:
        out = torch.empty(shape, dtype=dtype, device=device)
        if split == 1:
            launch(thin, wide, keep_bits, out)
        else:
            slabs = slabs_like(split, *shape, device=device)
            launch(thin, wide, keep_bits, slabs)
            add([(slabs, out)])
        return out

    return run
