"""The second stage of every split sum: partial sums in float32, added in a fixed order.

A split over programs needs either float atomics, whose order changes between runs, or this: one
slab a program and one small pass that adds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Prepared
from .tiles import cast, ceil_div

# Sixteen slabs at a time, or a program would wait for one load after the other.
_BLOCK, _SLABS = 256, 16


class Partial(NamedTuple):
    """``out = scale·Σ partials`` over the first dimension; out is contiguous, of any dtype."""

    partials: Tensor
    out: Tensor
    scale: float = 1.0


@triton.jit
def _sum_slabs(
    partials_ptr,
    out_ptr,
    slabs,
    size,
    scale,
    block,
    BLOCK: tl.constexpr,
    SLABS: tl.constexpr,
):
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.arange(0, SLABS)
    total = tl.zeros((SLABS, BLOCK), dtype=tl.float32)
    ptrs = partials_ptr + rows.to(tl.int64)[:, None] * size + at[None, :]
    for start in range(0, slabs, SLABS):
        mask = (start + rows < slabs)[:, None] & (at < size)[None, :]
        total += tl.load(ptrs, mask=mask, other=0.0)
        ptrs += tl.cast(size, tl.int64) * SLABS
    result = cast(tl.sum(total, 0) * scale, out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, result, mask=at < size)


@triton.jit(do_not_specialize=["slabs0", "slabs1", "slabs2", "blocks0", "blocks1"])
def sum_partials_kernel(
    partials0_ptr,
    partials1_ptr,
    partials2_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    slabs0,
    slabs1,
    slabs2,
    size0,
    size1,
    size2,
    scale0,
    scale1,
    scale2,
    blocks0,
    blocks1,
    JOBS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLABS: tl.constexpr,
):
    block = tl.program_id(0)
    if block < blocks0:
        _sum_slabs(partials0_ptr, out0_ptr, slabs0, size0, scale0, block, BLOCK, SLABS)
    if JOBS >= 2 and block >= blocks0 and block < blocks0 + blocks1:
        _sum_slabs(partials1_ptr, out1_ptr, slabs1, size1, scale1, block - blocks0, BLOCK, SLABS)
    if JOBS == 3 and block >= blocks0 + blocks1:
        later = block - blocks0 - blocks1
        _sum_slabs(partials2_ptr, out2_ptr, slabs2, size2, scale2, later, BLOCK, SLABS)


class Sum(NamedTuple):
    """What a plan knows of a `Partial`: the number of slabs, the size of out, the scale."""

    slabs: int
    size: int
    scale: float = 1.0


def plan_sums(sums: Sequence[Sum]) -> Callable[[Sequence[tuple[Tensor, Tensor]]], None]:
    """What adds up to three ``(partials, out)`` of these sizes in one launch."""
    if not sums:
        return lambda pairs: None
    blocks = [ceil_div(one.size, _BLOCK) for one in sums]
    arguments: dict[str, object] = {"blocks0": blocks[0], "blocks1": (blocks + [0])[1]}
    for index, (slabs, size, scale) in enumerate(_padded(sums)):
        arguments |= {f"slabs{index}": slabs, f"size{index}": size, f"scale{index}": scale}
    arguments |= {"JOBS": len(sums), "BLOCK": _BLOCK, "SLABS": _SLABS}
    launch = Prepared(sum_partials_kernel, sum(blocks), 4, 1, arguments)

    def run(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
        (partials0, out0), (partials1, out1), (partials2, out2) = _padded(pairs)
        launch(partials0, partials1, partials2, out0, out1, out2)

    return run


_Any = TypeVar("_Any")


def _padded(jobs: Sequence[_Any]) -> list[_Any]:
    return [*jobs, jobs[0], jobs[0]][:3]


def sum_partials(jobs: Sequence[Partial]) -> None:
    """Up to three sums in one launch; partials are contiguous float32 ``[slabs, *out.shape]``."""
    sums = [Sum(job.partials.shape[0], job.out.numel(), job.scale) for job in jobs]
    plan_sums(sums)([(job.partials, job.out) for job in jobs])


def slabs_like(count: int, *shape: int, device: torch.device) -> Tensor:
    """Room for ``count`` partial sums of this shape."""
    return torch.empty(count, *shape, dtype=torch.float32, device=device)


def chunks(tiles: int, steps: int, sms: int) -> tuple[int, int]:
    """How to split a loop of ``steps`` so that ``tiles`` programs fill the GPU: (chunks, steps).

    About two programs a multiprocessor, and one chunk where the tiles nearly fill it already.
    """
    wanted = 1 if 4 * tiles >= 3 * sms else max(1, 2 * sms // tiles)
    each = ceil_div(steps, max(1, min(wanted, steps)))
    return max(1, ceil_div(steps, each)) if steps else 1, each
