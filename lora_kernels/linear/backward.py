"""The backward kernels and their launchers.

``dxa = scale·dy·B`` and ``db = scale·dyᵀ·xa`` in one pass over dy, which also sums ``dbias``;
``da = dxaᵀ·drop(x)`` in one pass over x; ``dx = dy·W + mask⊙(dxa·A)`` as one product, forward's
sister in `gemm`. ``dW = dyᵀ·x``, asked for only where the base is trained too, is cuBLAS's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels import tuning
from ..kernels.gemm import expand, hopper_gemm, pointer_gemm, suits_tma
from ..kernels.partials import Partial, chunks, slabs_like, sum_partials
from ..kernels.thin import compute_da, compute_db
from ..kernels.tiles import (
    TRITON_DTYPES,
    block_of,
    cast,
    dot,
    launch,
    load_tile,
    num_sms,
    precision,
    rank_by_8,
)
from ..kernels.tuning import Config, Shape
from . import reference
from .reference import Grads, Needs

# Above this rank the passes for dxa, db and da are matrix products worth cuBLAS's while.
_SKINNY_RANK = 128

_Room = tuple[Tensor | None, Tensor | None]


@triton.jit(do_not_specialize=["STEPS"])
def dxa_db_kernel(
    dy_ptr,
    b_ptr,
    xa_ptr,
    dxa_ptr,
    db_ptr,
    dbias_ptr,
    M,
    N,
    R,
    dxa_scale,
    db_scale,
    stride_dym,
    stride_dyn,
    stride_bn,
    stride_br,
    stride_xam,
    stride_xar,
    STEPS,
    DTYPE: tl.constexpr,
    NEED_DXA: tl.constexpr,
    NEED_DB: tl.constexpr,
    NEED_DBIAS: tl.constexpr,
    RANK_BY_8: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    if RANK_BY_8:
        R, stride_bn = (R // 8) * 8, (stride_bn // 8) * 8
    tiles_r = tl.cdiv(R, BLOCK_R)
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_r = tl.program_id(0) % tiles_r
    pid_m = (tl.program_id(0) // tiles_r) % tiles_m
    chunk = tl.program_id(0) // (tiles_r * tiles_m)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    ranks = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    if NEED_DB:
        xa = load_tile(xa_ptr, rows, ranks, stride_xam, stride_xar, M, R)  # [BM, BR]
    acc = tl.zeros((BLOCK_M, BLOCK_R), dtype=tl.float32)
    for step in range(chunk * STEPS, min((chunk + 1) * STEPS, tl.cdiv(N, BLOCK_N))):
        cols = step * BLOCK_N + tl.arange(0, BLOCK_N)
        dy = load_tile(dy_ptr, rows, cols, stride_dym, stride_dyn, M, N)  # [BM, BN]
        if NEED_DXA:
            b = load_tile(b_ptr, cols, ranks, stride_bn, stride_br, N, R)  # [BN, BR]
            acc = dot(dy, cast(b, DTYPE), acc, PRECISION)
        if NEED_DB:
            db = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
            db = dot(tl.trans(dy), xa, db, PRECISION) * db_scale
            db_ptrs = db_ptr + pid_m.to(tl.int64) * N * R
            db_ptrs += cols.to(tl.int64)[:, None] * R + ranks[None, :]
            inside = (cols < N)[:, None] & (ranks < R)[None, :]
            tl.store(db_ptrs, cast(db, db_ptr.dtype.element_ty), mask=inside)
        if NEED_DBIAS and pid_r == 0:
            dbias = tl.sum(dy.to(tl.float32), 0)
            dbias_ptrs = dbias_ptr + pid_m.to(tl.int64) * N + cols
            tl.store(dbias_ptrs, cast(dbias, dbias_ptr.dtype.element_ty), mask=cols < N)
    if NEED_DXA:
        dxa_ptrs = dxa_ptr + chunk.to(tl.int64) * M * R
        dxa_ptrs += rows.to(tl.int64)[:, None] * R + ranks[None, :]
        inside = (rows < M)[:, None] & (ranks < R)[None, :]
        tl.store(dxa_ptrs, cast(acc * dxa_scale, dxa_ptr.dtype.element_ty), mask=inside)


def compute_dxa_db(
    dy: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scale: float,
    *,
    need_dxa: bool = True,
    need_db: bool = True,
    need_dbias: bool = False,
    config: Config,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """``dxa = scale·dy·B``, ``db = scale·dyᵀ·xa``, ``dbias = Σ dy`` in one pass over dy.

    Args:
        dy: ``[M, N]``, float32, float16 or bfloat16, any strides.
        lora_b: ``[N, R]``, of dy's dtype or wider; rounded to dy's dtype.
        xa: ``[M, R]`` of dy's dtype.
        scale: factor on the LoRA branch.
        need_dxa, need_db, need_dbias: what to compute; the rest comes back as None.
        config: block_m, block_n.

    Returns:
        dxa ``[M, R]`` in dy's dtype, db ``[N, R]`` in lora_b's, dbias ``[N]`` in dy's.
    """
    (m, n), r, device = dy.shape, lora_b.shape[1], dy.device
    block_r = block_of(r)
    tiles_m = triton.cdiv(m, config.block_m)
    tiles = tiles_m * triton.cdiv(r, block_r)
    split, steps = chunks(tiles, triton.cdiv(n, config.block_n), num_sms(dy))
    jobs: list[Partial] = []

    def room(needed: bool, slabs: int, shape: tuple[int, ...], dtype: torch.dtype) -> _Room:
        """The result, and where the kernel writes: the same, or slabs still to be summed."""
        if not needed:
            return None, None
        out = torch.empty(shape, dtype=dtype, device=device)
        if slabs == 1:
            return out, out
        jobs.append(Partial(slabs_like(slabs, *shape, device=device), out))
        return out, jobs[-1].partials

    dxa, dxa_target = room(need_dxa, split, (m, r), dy.dtype)
    db, db_target = room(need_db, tiles_m, (n, r), lora_b.dtype)
    dbias, dbias_target = room(need_dbias, tiles_m, (n,), dy.dtype)
    launch(
        dxa_db_kernel,
        tiles * split,
        config.warps,
        config.stages,
        dy_ptr=dy,
        b_ptr=lora_b,
        xa_ptr=xa,
        dxa_ptr=dxa_target,
        db_ptr=db_target,
        dbias_ptr=dbias_target,
        M=m,
        N=n,
        R=r,
        dxa_scale=scale,
        db_scale=scale,
        stride_dym=dy.stride(0),
        stride_dyn=dy.stride(1),
        stride_bn=lora_b.stride(0),
        stride_br=lora_b.stride(1),
        stride_xam=xa.stride(0),
        stride_xar=xa.stride(1),
        STEPS=steps,
        DTYPE=TRITON_DTYPES[dy.dtype],
        NEED_DXA=need_dxa,
        NEED_DB=need_db,
        NEED_DBIAS=need_dbias,
        RANK_BY_8=rank_by_8(lora_b),
        PRECISION=precision(dy.dtype),
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        BLOCK_R=block_r,
    )
    sum_partials(jobs)
    return dxa, db, dbias


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scale: float,
    keep_bits: Tensor | None,
    dropout_p: float,
    needs: Needs,
    capability: tuple[int, int],
) -> Grads:
    """The gradients that ``needs`` asks for; as `reference.backward`, with packed keep bits.

    No dimension may be 0.
    """
    (m, n), (r, k) = dy.shape, lora_a.shape
    shape = Shape(m, n, k, r)
    name = tuning.strategy(
        "dx",
        capability,
        dy.dtype,
        Shape(m, k, n, r),
        dropped=keep_bits is not None,
        tma=suits_tma(dy)
        and dy.stride(1) == 1
        and k % 8 == 0
        and (suits_tma(weight) or not needs.x),  # a stand-in then
        sms=num_sms(x),
    )
    if name == "aten":
        return reference.backward(dy, x, weight, lora_a, lora_b, xa, scale, None, 0.0, needs)

    def config(kernel: str, of: Shape = shape) -> Config:
        return tuning.lookup(kernel, capability, dy.element_size(), of)

    need_dxa = needs.x or needs.lora_a
    dxa = da = db = dbias = dx = None
    if r > _SKINNY_RANK and (need_dxa or needs.lora_b):
        plain = Needs(False, False, False, needs.lora_b, needs.bias)
        _, _, _, db, dbias = reference.backward(
            dy, x, weight, lora_a, lora_b, xa, scale, None, 0.0, plain
        )
        if need_dxa:
            dxa = (dy @ lora_b.to(dy.dtype)).mul_(scale)
    elif need_dxa or needs.lora_b:
        chosen = config("dxa_db")
        apart = need_dxa and needs.lora_b and _slabs_outweigh(m, n, r, chosen)
        dxa, db, dbias = compute_dxa_db(
            dy,
            lora_b,
            xa,
            scale,
            need_dxa=need_dxa,
            need_db=needs.lora_b and not apart,
            need_dbias=needs.bias,
            config=chosen,
        )
        if apart:
            db = compute_db(dy, xa, scale, lora_b.dtype, config=config("da"))
    elif needs.bias:
        dbias = dy.sum(0, dtype=torch.float32).to(dy.dtype)
    if needs.lora_a:
        assert dxa is not None
        if r > _SKINNY_RANK and keep_bits is None:
            da = (dxa.t() @ x).to(lora_a.dtype)
        else:
            da = compute_da(dxa, x, keep_bits, dropout_p, dtype=lora_a.dtype, config=config("da"))
    if needs.x:
        assert dxa is not None
        of = Shape(m, k, n, r)
        if name == "beta1":
            dx = expand(
                dxa, lora_a, keep_bits=keep_bits, dropout_p=dropout_p, config=config("expand", of)
            ).addmm_(dy, weight)
        else:
            gemm, kernel = (hopper_gemm, "hopper") if name == "hopper" else (pointer_gemm, "gemm")
            dx = gemm(
                dy,
                weight,
                dxa,
                lora_a,
                keep_bits=keep_bits,
                dropout_p=dropout_p,
                config=config(kernel, of),
            )
    dweight = dy.t() @ x if needs.weight else None
    return Grads(dx, dweight, da, db, dbias)


def _slabs_outweigh(m: int, n: int, r: int, config: Config) -> bool:
    """Whether db's partial sums would cost more than reading dy once more.

    They are written and read, ``8·M/block_m·N·R`` bytes of float32, beside dy's ``2·M·N``; small
    ones stay in the L2 cache and are free.
    """
    slabs = 4 * triton.cdiv(m, config.block_m) * n * r
    return 4 * r > config.block_m and slabs > 2**24
