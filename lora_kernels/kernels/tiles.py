"""Device helpers that every kernel shares, and the arithmetic of blocks on the host.

Tiles are named by their shape in comments: ``[BM, BN]``. Row offsets are int64 throughout, so that
tensors of more than 2³¹ elements are addressed right.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import InterpretedFunction

from .launching import Layout


@triton.jit
def grouped_tile(tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Tile number to ``(pid_m, pid_n)``, GROUP rows of tiles at a time so that L2 keeps both."""
    per_group = GROUP * tiles_n
    first = (tile // per_group) * GROUP
    rows = min(tiles_m - first, GROUP)
    within = tile % per_group
    return first + within % rows, within // rows


# Whether Triton's interpreter runs these kernels; decided by Triton itself when it decorates.
# Helpers read it as a default, and no other constant of a module: before Triton 3.8, the key of a
# kernel has those that its helpers read in their bodies, or not, by which kernel came first.
INTERPRETED = tl.constexpr(isinstance(grouped_tile, InterpretedFunction))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr = INTERPRETED):
    """``acc + a·b`` in float32. The interpreter would multiply bfloat16's bit patterns."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(value, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr = INTERPRETED):
    """``value`` in DTYPE, rounded to nearest. The interpreter would cut bfloat16 short."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        word = value.to(tl.float32).to(tl.uint32, bitcast=True)
        word = (word + 0x7FFF + ((word >> 16) & 1)) & 0xFFFF0000
        value = word.to(tl.float32, bitcast=True)
    return value.to(DTYPE)


@triton.jit
def load_tile(ptr, rows, cols, stride_row, stride_col, num_rows, num_cols):
    """``ptr[rows, cols]`` with zeros outside; rows and cols are ranges of indices."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    offsets = rows.to(tl.int64)[:, None] * stride_row + cols.to(tl.int64)[None, :] * stride_col
    return tl.load(ptr + offsets, mask=mask, other=0.0)


@triton.jit
def draw_bytes(seed, rows, byte_cols, threshold):
    """Keep bits of eight neighbours a byte, ``[rows, byte_cols]`` as int32.

    Element ``8·j + i`` of a row is kept where lane i of ``philox(seed, (j, row, 0, 0))``, read as
    eight 16-bit numbers, is at least ``threshold``.
    """
    row = (rows.to(tl.int32)[:, None] + 0 * byte_cols[None, :]).to(tl.int32)
    col = (byte_cols[None, :] + 0 * rows[:, None]).to(tl.int32)
    zero = row * 0
    # Philox4x32 passes BigCrush from 7 rounds on (Salmon et al., SC 2011, table 2); the usual 10
    # would make the pass over x wait for its integer arithmetic.
    w0, w1, w2, w3 = tl.philox(seed, col, row, zero, zero, 7)
    bits = _two_bits(w0, threshold)
    bits |= _two_bits(w1, threshold) << 2
    bits |= _two_bits(w2, threshold) << 4
    bits |= _two_bits(w3, threshold) << 6
    return bits


@triton.jit
def _two_bits(word, threshold):
    low = (word & 0xFFFF).to(tl.int32)
    high = ((word >> 16) & 0xFFFF).to(tl.int32)
    return (low >= threshold).to(tl.int32) | ((high >= threshold).to(tl.int32) << 1)


@triton.jit
def expand_bits(bits, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """Bytes ``[BLOCK_ROWS, BLOCK_COLS / 8]`` to a boolean tile ``[BLOCK_ROWS, BLOCK_COLS]``."""
    lanes = tl.arange(0, 8)[None, None, :]
    spread = (bits.to(tl.int32)[:, :, None] >> lanes) & 1
    return tl.reshape(spread, (BLOCK_ROWS, BLOCK_COLS)) != 0


@triton.jit
def load_keep(bits_ptr, rows, byte_col, num_rows, num_bytes, BM: tl.constexpr, BN: tl.constexpr):
    """The stored keep mask at ``rows`` and the BN columns from ``8·byte_col`` on, ``[BM, BN]``.

    ``num_bytes`` of a row comes from the host: there Triton sees what divides it.
    """
    byte_cols = byte_col + tl.arange(0, BN // 8)
    mask = (rows < num_rows)[:, None] & (byte_cols < num_bytes)[None, :]
    offsets = rows.to(tl.int64)[:, None] * num_bytes + byte_cols[None, :]
    return expand_bits(tl.load(bits_ptr + offsets, mask=mask, other=0), BM, BN)


@triton.jit
def rank_tile(
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
    DTYPE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    LOOPED: tl.constexpr,
):
    """One tile of ``scale·mask⊙(u·v) + bias``, ``[BM, BN]`` in float32; v is rounded to DTYPE.

    LOOPED, for ranks beyond BLOCK_R, makes a pipeline of its own, whose buffers are those of the
    loop over K: less shared memory, but that loop loads nothing before this one ends.
    """
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if LOOPED:
        for start in range(0, R, BLOCK_R):
            ranks = start + tl.arange(0, BLOCK_R)
            u = load_tile(u_ptr, rows, ranks, stride_um, stride_ur, M, R)  # [BM, BR]
            v = load_tile(v_ptr, ranks, cols, stride_vr, stride_vn, R, N)  # [BR, BN]
            acc = dot(u, cast(v, DTYPE), acc, PRECISION)
    else:
        ranks = tl.arange(0, BLOCK_R)
        u = load_tile(u_ptr, rows, ranks, stride_um, stride_ur, M, R)
        v = load_tile(v_ptr, ranks, cols, stride_vr, stride_vn, R, N)
        acc = dot(u, cast(v, DTYPE), acc, PRECISION)
    acc *= scale
    if HAS_MASK:
        keep = load_keep(bits_ptr, rows, pid_n * (BLOCK_N // 8), M, num_bytes, BLOCK_M, BLOCK_N)
        acc = tl.where(keep, acc, 0.0)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + cols * stride_bias, mask=cols < N, other=0.0)
        acc += bias.to(tl.float32)[None, :]
    return acc


@triton.jit
def product_tile(
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
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``acc + p[rows, :]·q[:, cols]``, ``[BM, BN]`` in float32; the steps are a block's along K."""
    row_ok = (rows < M)[:, None]
    col_ok = (cols < N)[None, :]
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
    return acc


def precision(dtype: torch.dtype) -> str:
    """``"tf32"`` where torch's own float32 matrix products would use it on CUDA, else ``"ieee"``.

    See ``torch.set_float32_matmul_precision``; 16-bit dtypes are not affected.
    """
    if dtype != torch.float32:
        return "ieee"
    asked = getattr(torch.backends.cuda.matmul, "fp32_precision")  # noqa: B009  not in its stub
    if asked == "none":
        asked = getattr(torch.backends, "fp32_precision")  # noqa: B009
    return "tf32" if asked == "tf32" else "ieee"


TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
}


def ceil_div(length: int, block: int) -> int:
    """How many blocks cover ``length``; `triton.cdiv` takes longer on the host than a launch."""
    return -(-length // block)


def block_of(length: int, least: int = 16, most: int = 64) -> int:
    """The power of two that covers ``length``, within bounds."""
    return max(least, min(most, 1 << (length - 1).bit_length()))


def rank_by_8(thin: Layout) -> bool:
    """Whether rows of ``[M, R]`` come in whole groups of 8, which Triton does not see by itself.

    It knows what 16 divides and no less, and would load each number of rank 8 or 24 alone.
    """
    rank = thin.shape[1]
    return rank % 8 == 0 and thin.stride[0] % 8 == 0 and thin.stride[1] == 1
