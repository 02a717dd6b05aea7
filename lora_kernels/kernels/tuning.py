"""Strategies and block sizes: data by compute capability, kernel and bucketed shape.

`benchmarks/tune.py` searches and prints rows; they are pasted here with the date and the gain.
Nothing is tuned inside a call. The rows below that name no measurement come from arithmetic, and
say so: a persistent Triton GEMM is taken to run at 0.93 of cuBLAS, and a matrix product that adds
onto its output to cost one more write and read of it, which for an output of any width breaks even
at a contraction of about 4900 on an H200 (790 TFLOP/s, 4.3 TB/s) and 4000 on an A100.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..per_thread import PerThread

KERNELS = ("xa", "one_kernel", "gemm", "hopper", "expand", "dxa_db", "da")
GROUP_KERNELS = (
    "group_one_kernel",
    "group_y",
    "group_y_hopper",
    "group_expand",
    "group_dxa_db",
    "group_dx",
    "group_dx_hopper",
)
STRATEGIES = {
    "forward": ("one_kernel", "fused", "hopper", "beta1", "aten"),
    "dx": ("fused", "hopper", "beta1", "aten"),
}
# Bytes of shared memory that one block may take.
SHARED_MEMORY = {
    (8, 0): 163 * 1024,
    (8, 6): 99 * 1024,
    (8, 7): 163 * 1024,
    (8, 9): 99 * 1024,
    (9, 0): 227 * 1024,
    (10, 0): 227 * 1024,
    (10, 3): 227 * 1024,
    (11, 0): 227 * 1024,
    (12, 0): 99 * 1024,
    (12, 1): 99 * 1024,
}
LEAST_SHARED_MEMORY = 99 * 1024


class Shape(NamedTuple):
    """``x [m, k]``, ``weight [n, k]``, rank r; for dx, n and k swapped: n is out's columns."""

    m: int
    n: int
    k: int
    r: int


@dataclass(frozen=True)
class Config:
    """Block sizes of one kernel. A size that the kernel does not have is 0.

    Attributes:
        block_m, block_n, block_k: rows, output columns and contraction of a tile.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        group: rows of tiles walked together, for the L2 cache.
        per_sm: programs a multiprocessor holds at once, which `resources` looks into where it is
            more than one; a persistent kernel launches as many.
    """

    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    warps: int = 4
    stages: int = 3
    group: int = 8
    per_sm: int = 1


class Row(NamedTuple):
    """``config`` for a kernel where the capability fits and no dimension exceeds its bound."""

    least: tuple[int, int]  # the row serves capabilities from here on, to the next major version
    kernel: str
    itemsize: int  # bytes of an element of x
    config: Config
    m: int | None = None
    n: int | None = None
    k: int | None = None
    r: int | None = None
    shared: int = 0  # bytes of shared memory that the GPU must have, 0 for any


BIG = 160 * 1024
ANY = (8, 0)

# The first row that fits is taken. Small shapes first, then large, then what fits everywhere.
ROWS = (
    # xa: the pass over x is bound by memory; a tile is 8 to 16 KiB and some are in flight.
    Row(ANY, "xa", 2, Config(16, 0, 128, 4, 3), m=1024),
    Row(ANY, "xa", 2, Config(64, 0, 128, 8, 4), r=32, shared=BIG),
    Row(ANY, "xa", 2, Config(64, 0, 64, 8, 3), shared=BIG),
    Row(ANY, "xa", 2, Config(32, 0, 64, 4, 3)),
    Row(ANY, "xa", 4, Config(32, 0, 32, 4, 2)),
    Row(ANY, "one_kernel", 2, Config(16, 64, 64, 4, 3), m=64),
    Row((9, 0), "one_kernel", 2, Config(64, 64, 64, 4, 3), m=1024, r=32),
    Row((9, 0), "one_kernel", 2, Config(128, 128, 64, 8, 3)),
    # Eight warps, because four spill without wgmma.
    Row(ANY, "one_kernel", 2, Config(64, 64, 64, 8, 3), r=32),
    Row(ANY, "one_kernel", 2, Config(32, 64, 64, 4, 3)),
    Row(ANY, "one_kernel", 4, Config(32, 32, 32, 8, 2)),
    Row(ANY, "gemm", 2, Config(64, 64, 64, 8, 3), m=512),
    Row(ANY, "gemm", 2, Config(128, 128, 64, 8, 3), shared=BIG),
    Row(ANY, "gemm", 2, Config(128, 128, 32, 8, 3)),
    Row(ANY, "gemm", 4, Config(64, 64, 32, 8, 2)),
    # Two small programs hide each other's beginning and end, which a short loop cannot.
    Row((9, 0), "hopper", 2, Config(128, 128, 64, 4, 3, per_sm=2), k=2048),
    Row((9, 0), "hopper", 2, Config(128, 128, 64, 8, 4), n=1024),
    Row((9, 0), "hopper", 2, Config(128, 256, 64, 8, 3)),
    Row(ANY, "expand", 2, Config(64, 128, 0, 4, 1)),
    Row(ANY, "expand", 4, Config(32, 64, 0, 8, 1)),
    Row(ANY, "dxa_db", 2, Config(32, 64, 0, 4, 3), m=1024, r=32),
    Row(ANY, "dxa_db", 2, Config(32, 64, 0, 4, 2), m=1024),
    # With three stages there is no room for the second program, which loads while one stores db.
    Row((9, 0), "dxa_db", 2, Config(256, 64, 0, 8, 2, per_sm=2), r=16),
    Row((9, 0), "dxa_db", 2, Config(256, 64, 0, 8, 3), r=32),
    Row((9, 0), "dxa_db", 2, Config(128, 64, 0, 8, 3)),
    Row(ANY, "dxa_db", 2, Config(128, 64, 0, 8, 2), r=32),
    Row(ANY, "dxa_db", 2, Config(64, 64, 0, 8, 2)),
    Row(ANY, "dxa_db", 4, Config(32, 32, 0, 8, 2)),
    Row((9, 0), "da", 2, Config(64, 0, 128, 4, 3)),
    Row(ANY, "da", 2, Config(64, 0, 64, 8, 3)),
    Row(ANY, "da", 4, Config(32, 0, 32, 4, 2)),
    # Of groups. Their tiles are those of the kernels above, picked from among the members.
    Row(ANY, "group_one_kernel", 2, Config(16, 64, 64, 4, 3), m=64),
    Row((9, 0), "group_one_kernel", 2, Config(64, 64, 64, 4, 3), m=1024, r=32),
    Row((9, 0), "group_one_kernel", 2, Config(128, 128, 64, 8, 3)),
    Row(ANY, "group_one_kernel", 2, Config(64, 64, 64, 8, 3), r=32),
    Row(ANY, "group_one_kernel", 2, Config(32, 64, 64, 8, 3)),
    # Beside a member to pick, ptxas makes room for no more.
    Row(ANY, "group_one_kernel", 4, Config(32, 32, 16, 8, 2)),
    Row(ANY, "group_y", 2, Config(64, 64, 64, 8, 3), m=512),
    Row(ANY, "group_y", 2, Config(128, 128, 64, 8, 3), shared=BIG),
    Row(ANY, "group_y", 2, Config(128, 128, 32, 8, 3)),
    Row(ANY, "group_y", 4, Config(64, 64, 32, 8, 2)),
    Row((9, 0), "group_y_hopper", 2, Config(128, 128, 64, 4, 3, per_sm=2), k=2048),
    Row((9, 0), "group_y_hopper", 2, Config(128, 128, 64, 8, 4), n=1024),
    Row((9, 0), "group_y_hopper", 2, Config(128, 256, 64, 8, 3)),
    Row(ANY, "group_expand", 2, Config(64, 128, 0, 4, 1)),
    Row(ANY, "group_expand", 4, Config(32, 64, 0, 8, 1)),
    Row(ANY, "group_dxa_db", 2, Config(32, 64, 0, 4, 3), m=1024, r=32),
    Row(ANY, "group_dxa_db", 2, Config(32, 64, 0, 4, 2), m=1024),
    Row((9, 0), "group_dxa_db", 2, Config(256, 64, 0, 8, 2, per_sm=2), r=16),
    Row((9, 0), "group_dxa_db", 2, Config(256, 64, 0, 8, 3), r=32),
    Row((9, 0), "group_dxa_db", 2, Config(128, 64, 0, 8, 3)),
    Row(ANY, "group_dxa_db", 2, Config(128, 64, 0, 8, 2), r=32),
    Row(ANY, "group_dxa_db", 2, Config(64, 32, 0, 8, 2)),
    Row(ANY, "group_dxa_db", 4, Config(32, 32, 0, 8, 2)),
    Row(ANY, "group_dx", 2, Config(64, 64, 64, 8, 3), m=512),
    Row(ANY, "group_dx", 2, Config(128, 128, 64, 8, 3), shared=BIG),
    Row(ANY, "group_dx", 2, Config(128, 128, 32, 8, 3)),
    Row(ANY, "group_dx", 4, Config(64, 64, 16, 8, 2)),
    # No two programs an SM: with four loops in turn 255 registers would not do for each thread.
    Row((9, 0), "group_dx_hopper", 2, Config(128, 128, 64, 8, 4), k=2048),
    Row((9, 0), "group_dx_hopper", 2, Config(128, 128, 64, 8, 4), n=1024),
    Row((9, 0), "group_dx_hopper", 2, Config(128, 256, 64, 8, 3)),
)


def shared_memory(capability: tuple[int, int]) -> int:
    """Bytes of shared memory that one block may take on this capability."""
    return SHARED_MEMORY.get(capability, LEAST_SHARED_MEMORY)


def lookup(kernel: str, capability: tuple[int, int], itemsize: int, shape: Shape) -> Config:
    """The first row that fits; with m rounded up to a power of two, so that calls share kernels.

    Raises:
        LookupError: no row fits, which is a fault of the table.
    """
    m = 1 << max(0, shape.m - 1).bit_length()
    for row in rows_for(capability):
        if (
            row.kernel == kernel
            and row.itemsize == itemsize
            and (row.m is None or m <= row.m)
            and (row.n is None or shape.n <= row.n)
            and (row.k is None or shape.k <= row.k)
            and (row.r is None or shape.r <= row.r)
        ):
            return row.config
    raise LookupError(f"no row for {kernel} on sm_{capability[0]}{capability[1]} at {shape}")


def rows_for(capability: tuple[int, int]) -> list[Row]:
    """The rows that may serve this capability, in order."""
    shared = shared_memory(capability)
    return [
        row
        for row in ROWS
        if row.shared <= shared
        and (capability[0] == row.least[0] or row.least == ANY)
        and capability >= row.least
    ]


class _Forced(NamedTuple):
    forward: str | None
    dx: str | None


_forced = PerThread("strategy", _Forced(None, None))


def asked() -> tuple[str | None, str | None, int]:
    """Everything but its arguments that `strategy` and `lookup` go by, to be compared."""
    return *_forced.get(), id(ROWS)


@contextmanager
def use_strategy(forward: str | None = None, dx: str | None = None) -> Iterator[None]:
    """Force the strategy of the Triton path for every call inside the ``with``, in this thread.

    A backward goes by where it is called, not by where its forward was. A forced strategy that
    cannot serve a call raises there. None leaves the choice to the table.

    Raises:
        ValueError: an unknown name.
    """
    for argument, name in (("forward", forward), ("dx", dx)):
        if name is not None and name not in STRATEGIES[argument]:
            known = ", ".join(STRATEGIES[argument])
            raise ValueError(f"{argument} must be one of {known}; got {name!r}")
    with _forced.set(_Forced(forward, dx)):
        yield


def strategy(
    role: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    shape: Shape,
    *,
    dropped: bool,
    tma: bool,
    sms: int,
    alike: bool = True,
) -> str:
    """How to compute ``"forward"`` or ``"dx"``: a name of `STRATEGIES`.

    Args:
        role: ``"forward"`` or ``"dx"``.
        capability, dtype: of the GPU and of x.
        shape: see `Shape`.
        dropped: whether dropout is applied.
        tma: whether the big operands' strides and addresses suit TMA descriptors.
        sms: multiprocessors of the GPU.
        alike: whether the weights of a group have the same strides.

    Raises:
        RuntimeError: `use_strategy` asked for one that cannot serve this call.
    """
    asked = _forced.get().forward if role == "forward" else _forced.get().dx
    if asked is not None:
        refusal = _refusal(asked, capability, dtype, shape, dropped, tma)
        if not alike and asked not in ("beta1", "aten"):
            refusal = "the weights of the group differ in their strides"
        if refusal:
            raise RuntimeError(f"strategy {asked!r} was asked for {role}, but {refusal}")
        return asked
    found = _by_arithmetic(role, capability, dtype, shape, dropped, tma, sms)
    if not alike and found not in ("beta1", "aten"):
        return "beta1" if dropped else "aten"
    return found


def _by_arithmetic(
    role: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    shape: Shape,
    dropped: bool,
    tma: bool,
    sms: int,
) -> str:
    m, n, k, r = shape
    # Without dropout no kernel of ours need draw a mask.
    cublas = "beta1" if dropped else "aten"
    if dtype == torch.float32:
        # Triton's IEEE float32 product is far from cuBLAS's.
        return "beta1"
    if m <= 64:
        # Bound by launches and by reading W, which cuBLAS splits over the whole GPU.
        return cublas
    hopper = not _refusal("hopper", capability, dtype, shape, dropped, tma)
    work = 2 * m * n * k
    # x·Aᵀ once more for each column of tiles can cost less than reading x twice, while a launch
    # counts for more than what the better products gain: some 30 µs of work.
    narrow = n * r < 184 * (128 if hopper else 64) and r <= ONE_KERNEL_RANK
    if role == "forward" and narrow and work < (24e9 if hopper else 8e9):
        return "one_kernel"
    if 4 * m * n < 3 * sms * 128 * (128 if n <= 1024 or not hopper else 256):
        # Too few tiles for the GPU, and ours do not split the contraction.
        return cublas
    if k <= (4096 if hopper else 2048):
        return "hopper" if hopper else "fused"
    return "beta1"


# The rank tile of the one-kernel forward sits in registers beside the output tile.
ONE_KERNEL_RANK = 64


def _refusal(
    name: str,
    capability: tuple[int, int],
    dtype: torch.dtype,
    shape: Shape,
    dropped: bool,
    tma: bool,
) -> str:
    if name == "one_kernel" and shape.r > ONE_KERNEL_RANK:
        return f"it holds ranks up to {ONE_KERNEL_RANK}, and this one is {shape.r}"
    if name == "hopper":
        if not any(row.kernel == "hopper" for row in rows_for(capability)):
            return f"there is no row for sm_{capability[0]}{capability[1]}"
        if dtype == torch.float32:
            return "it takes 16-bit dtypes, and x is float32"
        if not tma:
            return "an operand's strides or address do not suit TMA (16 bytes, last stride 1)"
    if name == "aten" and dropped:
        return "it takes no dropout"
    return ""


def candidates(kernel: str, capability: tuple[int, int], itemsize: int = 2) -> list[Config]:
    """What a tuner should try for a kernel; some may not fit the GPU and fail to compile.

    Raises:
        ValueError: an unknown kernel.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")
    wide = shared_memory(capability) >= BIG
    blocks = {
        "xa": [(16, 0, 256), (32, 0, 128), (32, 0, 256), (64, 0, 64), (64, 0, 128), (128, 0, 64)],
        "one_kernel": [(16, 64, 128), (64, 64, 64), (128, 64, 64), (128, 128, 64)],
        "gemm": [(64, 64, 64), (128, 64, 64), (128, 128, 32), (128, 128, 64), (128, 256, 64)],
        "hopper": [(128, 128, 64), (128, 256, 64), (256, 128, 64), (128, 256, 32)],
        "expand": [(32, 128, 0), (64, 128, 0), (64, 256, 0), (128, 128, 0)],
        "dxa_db": [(32, 64, 0), (64, 64, 0), (128, 64, 0), (256, 32, 0), (256, 64, 0)],
        "da": [(32, 0, 128), (64, 0, 64), (64, 0, 128), (64, 0, 256), (128, 0, 128)],
    }[kernel]
    depths = (1,) if kernel == "expand" else (2, 3, 4, 5) if wide else (2, 3)
    return [
        replace(Config(*block), warps=warps, stages=stages, per_sm=per_sm)
        for block in blocks
        for warps in (4, 8)
        for stages in depths
        for per_sm in ((1, 2) if kernel == "hopper" else (1,))
    ]
