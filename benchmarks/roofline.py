"""The floor on paper: what two ceilings allow, and what each strategy would cost under them.

``python -m benchmarks.roofline --tflops 790 --tbps 4.3`` prints ratios to the frozen linear, and
those of projections that share x to their frozen linears and the sums of their dx.

A kernel takes as long as its FLOPs at the arithmetic ceiling or its bytes at the memory ceiling,
whichever is longer; kernels follow one another. Bytes are those that must move once each, so the
model knows neither caches nor launch costs, and what is measured can only be slower.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import NamedTuple

from .shapes import LINEARS

MASK_BYTES = 1 / 8  # of our packed mask, per element; torch keeps a whole byte


@dataclass(frozen=True)
class Ceilings:
    """Of a device, at one dtype.

    Attributes:
        flops: FLOP/s of its largest matrix products.
        bandwidth: bytes a second between memory and processor, read and written together.
        fused: share of ``flops`` that our own fused products reach.
    """

    flops: float
    bandwidth: float
    fused: float = 1.0


class Size(NamedTuple):
    """``x [m, k]``, ``weight [n, k]``, rank r, bytes of an element."""

    m: int
    k: int
    n: int
    r: int
    itemsize: int = 2


class Kernel(NamedTuple):
    """FLOPs, bytes, and whether it is a product of our own."""

    flops: float
    bytes: float
    fused: bool = False


def seconds(kernels: list[Kernel], ceilings: Ceilings) -> float:
    """Time of kernels that run one after the other."""
    return sum(
        max(
            kernel.flops / (ceilings.flops * (ceilings.fused if kernel.fused else 1.0)),
            kernel.bytes / ceilings.bandwidth,
        )
        for kernel in kernels
    )


def frozen(size: Size, direction: str = "both") -> list[Kernel]:
    """``x·Wᵀ`` and ``dy·W``."""
    m, k, n, _, itemsize = size
    product = Kernel(2 * m * k * n, itemsize * (m * k + k * n + m * n))
    return [product] * (2 if direction == "both" else 1)


def floor(size: Size, ceilings: Ceilings, direction: str = "both") -> float:
    """The least time: all FLOPs of LoRA at one ceiling or all bytes, once each, at the other.

    Args:
        size: of the linear.
        ceilings: of the device.
        direction: ``forward``, ``backward`` or ``both``, whose halves follow one another.

    Returns:
        Seconds.
    """
    m, k, n, r, itemsize = size
    base = frozen(size, "forward")[0]
    factors = itemsize * r * (k + n + m)
    forward = Kernel(base.flops + 2 * m * r * (k + n), base.bytes + factors)
    # dy, W, x, A, B and xa are read, dx, da and db are written.
    backward = Kernel(
        base.flops + 4 * m * r * (k + n),
        itemsize * (m * n + k * n + 2 * m * k) + factors + itemsize * r * (k + n),
    )
    halves = {"forward": [forward], "backward": [backward], "both": [forward, backward]}
    return seconds(halves[direction], ceilings)


def _gemm(size: Size, k: int, n: int, fused: bool = False, columns: int = 0) -> Kernel:
    """``[m, k]·[k, n]``, its contraction run on over ``columns`` more."""
    m, itemsize = size.m, size.itemsize
    moved = m * k + k * n + m * n + columns * (m + n)
    return Kernel(2 * m * n * (k + columns), itemsize * moved, fused)


def _pass(size: Size, elements: float, products: int = 0, thin: int = 0) -> Kernel:
    """Over ``elements``, with thin products of so many columns in all and thin tensors moved."""
    return Kernel(2 * products * size.r * size.m, size.itemsize * (elements + thin * size.r))


def fused(size: Size, dropout: bool = False) -> tuple[list[Kernel], list[Kernel]]:
    """xa in one pass, each product's loop running on over the rank; three thin passes."""
    m, k, n, r, itemsize = size
    mask = MASK_BYTES * m * k / itemsize * dropout
    forward = [_pass(size, m * k + mask, k, m + k), _gemm(size, k, n, True, r)]
    dx = _gemm(size, n, k, True, r)
    dx = dx._replace(bytes=dx.bytes + mask * itemsize)
    return forward, [
        _pass(size, m * n, 2 * n, 2 * m + 2 * n),
        dx,
        _pass(size, m * k + mask, k, m + k),
    ]


def beta1(size: Size, dropout: bool = False) -> tuple[list[Kernel], list[Kernel]]:
    """The rank part written first, the vendor's product adding onto it."""
    m, k, n, _, itemsize = size
    mask = MASK_BYTES * m * k / itemsize * dropout

    def onto(inner: int, outer: int) -> Kernel:
        product = _gemm(size, inner, outer)
        return product._replace(bytes=product.bytes + itemsize * m * outer)

    forward = [
        _pass(size, m * k + mask, k, m + k),
        _pass(size, m * n, n, m + n),
        onto(k, n),
    ]
    backward = [
        _pass(size, m * n, 2 * n, 2 * m + 2 * n),
        _pass(size, m * k + mask, k, m + k),
        onto(n, k),
        _pass(size, m * k + mask, k, m + k),
    ]
    return forward, backward


def one_kernel(
    size: Size, dropout: bool = False, block_n: int = 128
) -> tuple[list[Kernel], list[Kernel]]:
    """xa made again in the product for every column of tiles; backward as `fused`."""
    m, k, n, r, itemsize = size
    tiles = -(-n // block_n)
    product = _gemm(size, k, n, True, r)
    product = product._replace(
        flops=product.flops + 2 * m * k * r * tiles, bytes=product.bytes + itemsize * k * r
    )
    return [product], fused(size, dropout)[1]


def three_calls(size: Size, dropout: bool = False) -> tuple[list[Kernel], list[Kernel]]:
    """A linear, a thin product and ``addmm``, differentiated by torch."""
    m, k, n, _, itemsize = size
    backward = [
        _pass(size, m * n, n, m + n),
        _pass(size, m * n, n, m + n),
        _pass(size, m * k, k, m + k),
        _gemm(size, n, k),
        _pass(size, 3 * m * k),
        _pass(size, m * k, k, m + k),
    ]
    forward = [
        _gemm(size, k, n),
        _pass(size, m * k, k, m + k),
        _pass(size, 2 * m * n, n, m + n),
    ]
    return _with_torch_dropout(size, forward, backward, dropout)


def peft(size: Size, dropout: bool = False) -> tuple[list[Kernel], list[Kernel]]:
    """Three linears, the scale and the sum, each a pass of its own."""
    m, k, n, _, _ = size
    forward = [
        _gemm(size, k, n),
        _pass(size, m * k, k, m + k),
        _pass(size, m * n, n, m + n),
        _pass(size, 2 * m * n),
        _pass(size, 3 * m * n),
    ]
    backward = [_pass(size, 2 * m * n), *three_calls(size)[1]]
    return _with_torch_dropout(size, forward, backward, dropout)


def _with_torch_dropout(
    size: Size, forward: list[Kernel], backward: list[Kernel], dropout: bool
) -> tuple[list[Kernel], list[Kernel]]:
    if not dropout:
        return forward, backward
    # Reads one activation, writes another and reads or writes a mask of bytes, in each direction.
    masked = Kernel(0, size.m * size.k * (2 * size.itemsize + 1))
    return [masked, *forward], [*backward, masked]


STRATEGIES = {
    "one_kernel": one_kernel,
    "fused": fused,
    "beta1": beta1,
    "three calls": three_calls,
    "peft": peft,
}


def modelled(
    strategy: str, size: Size, ceilings: Ceilings, direction: str = "both", dropout: bool = False
) -> float:
    """Seconds that a strategy would take if every kernel met its ceiling.

    Raises:
        ValueError: no such strategy.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {', '.join(STRATEGIES)}; got {strategy!r}")
    forward, backward = STRATEGIES[strategy](size, dropout)
    halves = {"forward": forward, "backward": backward, "both": forward + backward}
    return seconds(halves[direction], ceilings)


class Group(NamedTuple):
    """Projections that share ``x [m, k]``: their outputs, one rank, bytes of an element."""

    m: int
    k: int
    ns: tuple[int, ...]
    r: int
    itemsize: int = 2

    def sizes(self) -> list[Size]:
        """Of each by itself."""
        return [Size(self.m, self.k, n, self.r, self.itemsize) for n in self.ns]


# Llama-3-8B's: contraction and outputs.
GROUPS = {"q, k, v": (4096, (4096, 1024, 1024)), "gate, up": (4096, (14336, 14336))}


def frozen_group(group: Group) -> list[Kernel]:
    """The frozen linears one by one, and the sums of their dx that autograd makes."""
    return [kernel for size in group.sizes() for kernel in frozen(size)] + _sums_of_dx(group)


def _sums_of_dx(group: Group) -> list[Kernel]:
    added = Kernel(0, 3 * group.itemsize * group.m * group.k)
    return [added] * (len(group.ns) - 1)


def _apart(strategy: str, group: Group, dropout: bool) -> list[Kernel]:
    kernels = _sums_of_dx(group)
    for size in group.sizes():
        forward, backward = STRATEGIES[strategy](size, dropout)
        kernels += forward + backward
    return kernels


def fused_group(group: Group, dropout: bool = False) -> list[Kernel]:
    """x read once for every xa, by the products and once for every da; one product for dx."""
    m, k, ns, r, itemsize = group
    n, count = sum(ns), len(ns)
    whole = Size(m, k, n, r, itemsize)
    mask = MASK_BYTES * m * k / itemsize * dropout
    thin = _pass(whole, m * k + mask, count * k, count * (m + k))
    y = _gemm(whole, k, n, True)
    y = Kernel(y.flops + 2 * m * n * r, y.bytes + itemsize * r * (count * m + n), True)
    dx = _gemm(whole, n, k, True, count * r)
    dx = dx._replace(bytes=dx.bytes + mask * itemsize)
    return [thin, y, _pass(whole, m * n, 2 * n, 2 * count * m + 2 * n), thin, dx]


def beta1_group(group: Group, dropout: bool = False) -> list[Kernel]:
    """The rank parts written first, and the vendor's products adding on, one a member."""
    m, k, ns, r, itemsize = group
    n, count = sum(ns), len(ns)
    whole = Size(m, k, n, r, itemsize)
    mask = MASK_BYTES * m * k / itemsize * dropout
    thin = _pass(whole, m * k + mask, count * k, count * (m + k))
    kernels = [thin, _pass(whole, m * n, n, count * m + n)]
    kernels += [_pass(whole, m * n, 2 * n, 2 * count * m + 2 * n), thin, thin]
    for size in group.sizes():
        for inner, outer in ((k, size.n), (size.n, k)):
            product = _gemm(size, inner, outer)
            kernels.append(product._replace(bytes=product.bytes + itemsize * m * outer))
    return kernels


def modelled_group(group: Group, dropout: bool = False) -> dict[str, list[Kernel]]:
    """Forward and backward of a group by each way to compute it."""
    return {
        "fused": fused_group(group, dropout),
        "beta1": beta1_group(group, dropout),
        "fused, one by one": _apart("fused", group, dropout),
        "peft": _apart("peft", group, dropout),
    }


def main(arguments: list[str] | None = None) -> None:
    """Print the table for one device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.roofline", description=__doc__)
    parser.add_argument("--tflops", type=float, required=True, help="matrix products, TFLOP/s")
    parser.add_argument("--tbps", type=float, required=True, help="memory, TB/s")
    parser.add_argument("--fused", type=float, default=1.0, help="share reached by our products")
    parser.add_argument("--m", type=int, default=8192, help="tokens")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--itemsize", type=int, default=2, help="bytes of an element")
    parser.add_argument("--dropout", action="store_true")
    options = parser.parse_args(arguments)
    for name in ("tflops", "tbps", "fused", "m", "rank", "itemsize"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} must be more than 0, got {getattr(options, name)}")
    ceilings = Ceilings(options.tflops * 1e12, options.tbps * 1e12, options.fused)
    print(f"Ratio to the frozen linear, forward and backward, M = {options.m}, r = {options.rank}")
    print("| K, N | floor | " + " | ".join(STRATEGIES) + " |")
    print("|---|" + "---|" * (len(STRATEGIES) + 1))
    for k, n in dict.fromkeys((linear.k, linear.n) for linear in LINEARS):
        size = Size(options.m, k, n, options.rank, options.itemsize)
        base = seconds(frozen(size), ceilings)
        ratios = [floor(size, ceilings) / base]
        for name in STRATEGIES:
            ratios.append(modelled(name, size, ceilings, dropout=options.dropout) / base)
        print(f"| {k}, {n} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")
    _print_groups(options, ceilings)


def _print_groups(options: argparse.Namespace, ceilings: Ceilings) -> None:
    print("\nSharing x: ratio to the frozen linears and the sums of their dx")
    for index, (name, (k, ns)) in enumerate(GROUPS.items()):
        group = Group(options.m, k, ns, options.rank, options.itemsize)
        base = seconds(frozen_group(group), ceilings)
        ways = modelled_group(group, options.dropout)
        if not index:
            print("| | " + " | ".join(ways) + " |")
            print("|---|" + "---|" * len(ways))
        ratios = (seconds(kernels, ceilings) / base for kernels in ways.values())
        print(f"| {name} | " + " | ".join(f"{ratio:.3f}" for ratio in ratios) + " |")


if __name__ == "__main__":
    main()
