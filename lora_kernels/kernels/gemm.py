"""One matrix product that takes in the rank part: forward and dx are both it.

``out = p·q + scale·mask⊙(u·v)/(1 - p_drop) + bias`` with ``p [M, K]``, ``q [K, N]``, ``u [M, R]``,
``v [R, N]``. Forward is ``(x, Wᵀ, xa, Bᵀ)`` with the bias; dx is ``(dy, W, dxa, A)`` with the mask.

The rank part comes first, while the accumulator is still empty: scale, mask and bias concern it
alone, so one accumulator serves both products and the loop over K then runs on top of it. Taken
last, it would need a second accumulator, and the scale would have to be rounded into u or v.

`pointer_gemm` takes any strides and runs on sm_80 and up. `hopper_gemm` reads through TMA
descriptors and is persistent. `expand` is the rank part alone, for a product that is added onto it.

The road not taken: ``[x | xa]·[W | scale·B]ᵀ`` as one plain product needs a second copy of W, or
a copy in every step, which on an H200 costs about as much as adding onto the rank part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import (
    TRITON_DTYPES,
    block_of,
    cast,
    dot,
    grouped_tile,
    launch,
    num_sms,
    precision,
    rank_tile,
)
from .tuning import Config


@triton.jit
def pointer_gemm_kernel(
    p_ptr,
    q_ptr,
    u_ptr,
    v_ptr,
    bias_ptr,
    bits_ptr,
    out_ptr,
    M,
    N,
    K,
    R,
    num_bytes,
    scale,
    stride_pm,
    stride_pk,
    stride_qk,
    stride_qn,
    p_step,
    q_step,
    stride_um,
    stride_ur,
    stride_vr,
    stride_vn,
    stride_bias,
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_PRODUCT: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP: tl.constexpr,
):
    pid_m, pid_n = grouped_tile(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
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
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = (rows < M)[:, None]
    col_ok = (cols < N)[None, :]
    if HAS_PRODUCT:
        inner = tl.arange(0, BLOCK_K)
        p_ptrs = (
            p_ptr + rows.to(tl.int64)[:, None] * stride_pm + inner.to(tl.int64)[None, :] * stride_pk
        )
        q_ptrs = (
            q_ptr + inner.to(tl.int64)[:, None] * stride_qk + cols.to(tl.int64)[None, :] * stride_qn
        )
        for start in range(0, K, BLOCK_K):
            if EVEN_K:
                p = tl.load(p_ptrs, mask=row_ok, other=0.0)  # [BM, BK]
                q = tl.load(q_ptrs, mask=col_ok, other=0.0)  # [BK, BN]
            else:
                inner_ok = start + inner < K
                p = tl.load(p_ptrs, mask=row_ok & inner_ok[None, :], other=0.0)
                q = tl.load(q_ptrs, mask=inner_ok[:, None] & col_ok, other=0.0)
            acc = dot(p, q, acc, PRECISION)
            p_ptrs += p_step
            q_ptrs += q_step
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out_ptrs, cast(acc, DTYPE), mask=row_ok & col_ok)


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
    GROUP: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        pid_m, pid_n = grouped_tile(tile, tiles_m, tiles_n, GROUP)
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
        )
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        for step in range(tl.cdiv(K, BLOCK_K)):
            p = p_desc.load([row, step * BLOCK_K])  # [BM, BK]
            if Q_IS_NK:
                q = q_desc.load([col, step * BLOCK_K]).T  # [BK, BN]
            else:
                q = q_desc.load([step * BLOCK_K, col])
            acc = dot(p, q, acc, "ieee")
        # In two halves, so that the copy on its way out takes half the shared memory.
        halves = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
        left, right = tl.split(halves)
        out_desc.store([row, col], cast(left, DTYPE))
        out_desc.store([row, col + BLOCK_N // 2], cast(right, DTYPE))


def pointer_gemm(
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
    """``p·q + scale·mask⊙(u·v)/(1 - dropout_p) + bias``, for any strides.

    Args:
        p: ``[M, K]``, float32, float16 or bfloat16; out has its dtype.
        q: ``[K, N]`` of p's dtype.
        u: ``[M, R]`` of p's dtype.
        v: ``[R, N]``, of p's dtype or wider; rounded to p's dtype.
        bias: ``[N]`` of p's dtype, or None.
        scale: factor on ``u·v``.
        keep_bits: uint8 ``[M, ceil(N / 8)]``, the mask on ``u·v``, or None for all kept.
        dropout_p: what the kept elements are scaled up for, with keep_bits.
        config: block_m, block_n, block_k, group.

    Returns:
        out ``[M, N]``, contiguous.
    """
    (m, k), n = p.shape, q.shape[1]
    out = torch.empty(m, n, dtype=p.dtype, device=p.device)
    launch(
        pointer_gemm_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        config.warps,
        config.stages,
        p_ptr=p,
        q_ptr=q,
        **_rank_arguments(u, v, bias, keep_bits, scale, dropout_p, p.dtype),
        out_ptr=out,
        M=m,
        N=n,
        K=k,
        stride_pm=p.stride(0),
        stride_pk=p.stride(1),
        stride_qk=q.stride(0),
        stride_qn=q.stride(1),
        p_step=config.block_k * p.stride(1),
        q_step=config.block_k * q.stride(0),
        HAS_PRODUCT=True,
        EVEN_K=k % config.block_k == 0,
        PRECISION=precision(p.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        GROUP=config.group,
    )
    return out


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
    (m, k), n = p.shape, q.shape[1]
    out = torch.empty(m, n, dtype=p.dtype, device=p.device)
    block_m, block_n, block_k = config.block_m, config.block_n, config.block_k
    q_is_nk = q.stride(0) == 1 and q.stride(1) != 1  # Wᵀ: the memory is [N, K]
    q_stored = q.t() if q_is_nk else q
    q_block = [block_n, block_k] if q_is_nk else [block_k, block_n]
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    launch(
        hopper_gemm_kernel,
        min(num_sms(p) * config.per_sm, tiles),
        config.warps,
        config.stages,
        p_desc=TensorDescriptor(p, [m, k], [p.stride(0), 1], [block_m, block_k]),
        q_desc=TensorDescriptor(q_stored, list(q_stored.shape), [q_stored.stride(0), 1], q_block),
        out_desc=TensorDescriptor(out, [m, n], [n, 1], [block_m, block_n // 2]),
        **_rank_arguments(u, v, bias, keep_bits, scale, dropout_p, p.dtype, most=32),
        M=m,
        N=n,
        K=k,
        Q_IS_NK=q_is_nk,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP=config.group,
    )
    return out


def suits_tma(tensor: Tensor) -> bool:
    """Whether a 2-D tensor or its transpose can be read through a TMA descriptor.

    `hopper_gemm` takes q either way round, and p only with rows of contiguous elements.
    """
    inner, outer = sorted((tensor.stride(0), tensor.stride(1)))
    width = tensor.shape[1] if tensor.stride(1) == 1 else tensor.shape[0]
    return (
        inner == 1
        and outer >= width  # rows may not overlap
        and outer * tensor.element_size() % 16 == 0
        and tensor.data_ptr() % 16 == 0
    )


def expand(
    u: Tensor,
    v: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    keep_bits: Tensor | None = None,
    dropout_p: float = 0.0,
    config: Config,
) -> Tensor:
    """``scale·mask⊙(u·v)/(1 - dropout_p) + bias``, as `pointer_gemm` without p and q."""
    m, n = u.shape[0], v.shape[1]
    out = torch.empty(m, n, dtype=u.dtype, device=u.device)
    launch(
        pointer_gemm_kernel,
        triton.cdiv(m, config.block_m) * triton.cdiv(n, config.block_n),
        config.warps,
        config.stages,
        p_ptr=None,
        q_ptr=None,
        **_rank_arguments(u, v, bias, keep_bits, scale, dropout_p, u.dtype),
        out_ptr=out,
        M=m,
        N=n,
        K=0,
        stride_pm=0,
        stride_pk=0,
        stride_qk=0,
        stride_qn=0,
        p_step=0,
        q_step=0,
        HAS_PRODUCT=False,
        EVEN_K=True,
        PRECISION=precision(u.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=0,
        GROUP=1,
    )
    return out


def _rank_arguments(
    u: Tensor,
    v: Tensor,
    bias: Tensor | None,
    keep_bits: Tensor | None,
    scale: float,
    dropout_p: float,
    dtype: torch.dtype,
    most: int = 64,
) -> dict[str, object]:
    # `most` bounds the rank tile: one of 64 in float32 does not fit beside Hopper's wide tiles.
    return {
        "u_ptr": u,
        "v_ptr": v,
        "bias_ptr": bias,
        "bits_ptr": keep_bits,
        "R": u.shape[1],
        "num_bytes": 0 if keep_bits is None else keep_bits.shape[1],
        "scale": scale if keep_bits is None else scale / (1.0 - dropout_p),
        "stride_um": u.stride(0),
        "stride_ur": u.stride(1),
        "stride_vr": v.stride(0),
        "stride_vn": v.stride(1),
        "stride_bias": 0 if bias is None else bias.stride(0),
        "DTYPE": TRITON_DTYPES[dtype],
        "HAS_BIAS": bias is not None,
        "HAS_MASK": keep_bits is not None,
        "BLOCK_R": block_of(u.shape[1], most=most),
    }
