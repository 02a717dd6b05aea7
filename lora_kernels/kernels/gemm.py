"""One matrix product that takes in the rank part: forward and dx are both it.

``out = p·q + scale·mask⊙(u·v)/(1 - p_drop) + bias`` with ``p [M, K]``, ``q [K, N]``, ``u [M, R]``,
``v [R, N]``. Forward is ``(x, Wᵀ, xa, Bᵀ)`` with the bias; dx is ``(dy, W, dxa, A)`` with the mask.

The rank part comes first, while the accumulator is still empty: scale, mask and bias concern it
alone, so one accumulator serves both products and the loop over K then runs on top of it. Taken
last, it needs a second accumulator or a scale that rounds nothing in u, which `hopper` looks for.

`pointer_gemm` takes any strides and runs on sm_80 and up. Its sister in `hopper` reads through TMA
descriptors and is persistent. `expand` is the rank part alone, for a product that is added onto it.

The road not taken: ``[x | xa]·[W | scale·B]ᵀ`` as one plain product needs a second copy of W, or
a copy in every step, which on an H200 costs about as much as adding onto the rank part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Layout, Prepared, layout_of
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

# Called with p, q, u, v, bias and the keep bits, it gives out.
Product = Callable[
    [Tensor | None, Tensor | None, Tensor, Tensor, Tensor | None, Tensor | None], Tensor
]


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
    LOOPED: tl.constexpr,
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
        LOOPED,
    )
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if HAS_PRODUCT:
        acc = product_tile(
            acc,
            p_ptr,
            q_ptr,
            rows,
            cols,
            M,
            N,
            K,
            stride_pm,
            stride_pk,
            stride_qk,
            stride_qn,
            p_step,
            q_step,
            EVEN_K,
            PRECISION,
            BLOCK_K,
        )
    inside = (rows < M)[:, None] & (cols < N)[None, :]
    out_ptrs = out_ptr + rows.to(tl.int64)[:, None] * N + cols[None, :]
    tl.store(out_ptrs, cast(acc, DTYPE), mask=inside)


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
    layouts = (
        layout_of(p),
        layout_of(q),
        layout_of(u),
        layout_of(v),
        layout_of(bias),
        layout_of(keep_bits),
    )
    run = plan_pointer_gemm(*layouts, scale, dropout_p, config)
    return run(p, q, u, v, bias, keep_bits)


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
    layouts = (
        layout_of(u),
        layout_of(v),
        layout_of(bias),
        layout_of(keep_bits),
    )
    run = plan_expand(*layouts, scale, dropout_p, config)
    return run(u, v, bias, keep_bits)


def plan_pointer_gemm(
    p: Layout | None,
    q: Layout | None,
    u: Layout,
    v: Layout,
    bias: Layout | None,
    keep_bits: Layout | None,
    scale: float,
    dropout_p: float,
    config: Config,
) -> Product:
    """`pointer_gemm` for tensors of these layouts; `expand` where p and q are None."""
    (m, n), dtype, device = (u.shape[0], v.shape[1]), u.dtype, u.device
    product: dict[str, object] = {
        "K": 0,
        "stride_pm": 0,
        "stride_pk": 0,
        "stride_qk": 0,
        "stride_qn": 0,
        "p_step": 0,
        "q_step": 0,
        "EVEN_K": True,
        "BLOCK_K": 0,
        "GROUP": 1,
    }
    if p is not None and q is not None:
        k = p.shape[1]
        product = {
            "K": k,
            "stride_pm": p.stride[0],
            "stride_pk": p.stride[1],
            "stride_qk": q.stride[0],
            "stride_qn": q.stride[1],
            "p_step": config.block_k * p.stride[1],
            "q_step": config.block_k * q.stride[0],
            "EVEN_K": k % config.block_k == 0,
            "BLOCK_K": config.block_k,
            "GROUP": config.group,
        }
    masked = p is not None and keep_bits is not None
    launch = Prepared(
        pointer_gemm_kernel,
        ceil_div(m, config.block_m) * ceil_div(n, config.block_n),
        config.warps,
        config.stages,
        {
            # Product, mask and no loop take registers for which one program an SM has to go.
            **rank_arguments(u, v, bias, keep_bits, scale, dropout_p, looped=masked),
            **product,
            "M": m,
            "N": n,
            "HAS_PRODUCT": p is not None,
            "PRECISION": precision(dtype),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
        },
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
        launch(p, q, u, v, bias, keep_bits, out)
        return out

    return run


def plan_expand(
    u: Layout,
    v: Layout,
    bias: Layout | None,
    keep_bits: Layout | None,
    scale: float,
    dropout_p: float,
    config: Config,
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """`expand` for tensors of these layouts."""
    run = plan_pointer_gemm(None, None, u, v, bias, keep_bits, scale, dropout_p, config)
    return lambda u, v, bias, keep_bits: run(None, None, u, v, bias, keep_bits)


def rank_arguments(
    u: Layout,
    v: Layout,
    bias: Layout | None,
    keep_bits: Layout | None,
    scale: float,
    dropout_p: float,
    most: int = 64,
    looped: bool = False,
) -> dict[str, object]:
    """What `rank_tile` is told; ``most`` bounds its tile of the rank, ``looped`` see there."""
    block_r = block_of(u.shape[1], most=most)
    return {
        "R": u.shape[1],
        "num_bytes": 0 if keep_bits is None else keep_bits.shape[1],
        "scale": scale if keep_bits is None else scale / (1.0 - dropout_p),
        "stride_um": u.stride[0],
        "stride_ur": u.stride[1],
        "stride_vr": v.stride[0],
        "stride_vn": v.stride[1],
        "stride_bias": 0 if bias is None else bias.stride[0],
        "DTYPE": TRITON_DTYPES[u.dtype],
        "HAS_BIAS": bias is not None,
        "HAS_MASK": keep_bits is not None,
        "BLOCK_R": block_r,
        "LOOPED": looped or u.shape[1] > block_r,
    }
