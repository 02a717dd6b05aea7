"""What kernels of a group take of each of its members, and how a program picks its own.

A group is projections that share their input, up to `MOST` of them. Of each, a kernel takes so many
parameters, numbered; what there is no member for is 0 or None.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import accumulate
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launching import Layout

MOST = 4

Tensors = Sequence[Tensor | None]


@triton.jit
def pick(member, of0, of1, of2, of3, MEMBERS: tl.constexpr):
    """The member's of up to four; those from MEMBERS on may be anything."""
    picked = of0
    if MEMBERS > 1:
        picked = tl.where(member == 1, of1, picked)
    if MEMBERS > 2:
        picked = tl.where(member == 2, of2, picked)
    if MEMBERS > 3:
        picked = tl.where(member == 3, of3, picked)
    return picked


@triton.jit
def member_of(tile, end0, end1, end2, MEMBERS: tl.constexpr):
    """Whose a tile is, where the members' tiles end there one after the other."""
    member = 0 * tile
    if MEMBERS > 1:
        member += (tile >= end0).to(tl.int32)
    if MEMBERS > 2:
        member += (tile >= end1).to(tl.int32)
    if MEMBERS > 3:
        member += (tile >= end2).to(tl.int32)
    return member


class Members:
    """What kernels are told of the members' widths and rank parts, which some may lack.

    Args:
        ns: columns of the members' outputs.
        factors: layouts of ``[N_i, R_i]``, the members' B; None without a rank part, not for all.
        scales: factors on the rank parts.

    Attributes:
        arguments: of a kernel, by name; ``at`` is where a member's columns of the rank begin.
        ranks: R_i, 0 without a rank part.
        rank: the largest of them.
        dtype: the widest of the factors.
    """

    def __init__(
        self, ns: Sequence[int], factors: Sequence[Layout | None], scales: Sequence[float]
    ) -> None:
        self.ranks = [0 if factor is None else factor.shape[1] for factor in factors]
        self.rank = max(self.ranks)
        self.dtype = reduce(
            torch.promote_types, (factor.dtype for factor in factors if factor is not None)
        )
        self.arguments: dict[str, object] = {
            **numbered("n", ns),
            **numbered("r", self.ranks),
            **numbered("at", starts(self.ranks)),
            **numbered("scale", [float(scale) for scale in scales], 1.0),
            "MEMBERS": len(ns),
        }

    def factors(self, factors: Tensors) -> list[Tensor | None]:
        """The members' B as a kernel takes them: contiguous, and of one dtype."""
        return stood_in(
            [None if factor is None else factor.to(self.dtype).contiguous() for factor in factors]
        )


def bias_arguments(ns: Sequence[int], biases: Sequence[Layout | None]) -> dict[str, object]:
    """What a kernel is told of the biases; ``biased`` is how many numbers of one there are."""
    lengths = [0 if bias is None else n for bias, n in zip(biases, ns, strict=True)]
    return {**numbered("biased", lengths), "HAS_BIAS": any(lengths)}


def contiguous(tensors: Tensors) -> list[Tensor | None]:
    """`stood_in` of contiguous ones."""
    return stood_in([None if tensor is None else tensor.contiguous() for tensor in tensors])


def stood_in(tensors: Tensors) -> list[Tensor | None]:
    """As many as a kernel takes; any other's, of which nothing is read, where a member has none."""
    other = next((tensor for tensor in tensors if tensor is not None), None)
    return filled([other if tensor is None else tensor for tensor in tensors])


def alike(matrices: Sequence[Layout]) -> bool:
    """Whether one pair of strides serves all of them."""
    return len({matrix.stride for matrix in matrices}) == 1


def layout_of_stacked(layouts: Sequence[Layout | None]) -> Layout:
    """Of the matrices that are there one below the other, in the widest of their dtypes."""
    found = [layout for layout in layouts if layout is not None]
    if len(found) == 1:
        return found[0]
    dtype = reduce(torch.promote_types, (layout.dtype for layout in found))
    rows, cols = sum(layout.shape[0] for layout in found), found[0].shape[1]
    return found[0].filled(rows, cols)._replace(dtype=dtype)


def starts(lengths: Sequence[int]) -> list[int]:
    """Where each begins if they follow one another."""
    return [*accumulate(lengths, initial=0)][:-1]


def empty_outputs(
    m: int, ns: Sequence[int], dtype: torch.dtype, device: torch.device, packed: bool
) -> tuple[Tensor, ...]:
    """Room for ``[M, N_i]`` each, or for all of them in one ``[M, ΣN]``."""
    if packed:
        return torch.empty(m, sum(ns), dtype=dtype, device=device).split(list(ns), 1)
    return tuple(torch.empty(m, n, dtype=dtype, device=device) for n in ns)


def numbered(name: str, values: Sequence[Any], rest: Any = 0) -> dict[str, object]:
    """``values`` as the arguments ``name0`` to ``name3``, ``rest`` where there is no member."""
    return {f"{name}{i}": value for i, value in enumerate([*values, *[rest] * MOST][:MOST])}


def filled(tensors: Tensors) -> list[Tensor | None]:
    """As many as a kernel takes, None for members that there are not."""
    return [*tensors, *[None] * (MOST - len(tensors))]
