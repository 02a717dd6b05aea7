"""The maths of a gated feed-forward with LoRA in plain torch: the CPU path, and the truth.

Symbols: ``x [M, K]``, ``gate``, ``up`` and ``h`` ``[M, I]``, ``y [M, N]``; the three projections'
tensors stand in the order gate, up, down. ``xa [M, ΣR]`` is of gate and up, which share x and a
mask, ``ha [M, R]`` of down. ``h = act(gate)·up`` is made anew in backward.

Eagerly it goes by pieces of rows: what has h's width lives in the cache then, and of that width
gate and up alone are ever held whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..kernels.activations import activate, gate_backward, gate_forward, slope_times
from ..kernels.dropout import unpack_bits
from ..linear.reference import WIDENED_ROWS, as_dtype, is_narrow
from . import reference
from .reference import GroupGrads, GroupNeeds

# Rows of a piece at most. With fewer the products lose more than the cache gains: at MiniMind's
# 512 and 768 features pieces of 256 took 4 % longer, and all 4096 rows at once as much.
MOST_ROWS = 1024
GATE_UP, DOWN = slice(0, 2), slice(2, 3)
Masks = tuple[Tensor | None, ...]  # over x and over h


class Projections(NamedTuple):
    """Of each kind one for gate, up and down; A, B and bias may be None."""

    weights: tuple[Tensor, ...]
    lora_as: tuple[Tensor | None, ...]
    lora_bs: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]

    def to(self, dtype: torch.dtype) -> Projections:
        """The same with every tensor in ``dtype``."""
        return self.each(lambda tensor: tensor.to(dtype))

    def each(self, function: Callable[[Tensor], Tensor]) -> Projections:
        """``function`` of every tensor that there is."""
        kinds: Any = [tuple(None if t is None else function(t) for t in kind) for kind in self]
        return Projections(*kinds)

    def part(self, which: slice) -> Projections:
        """Some of the three."""
        return Projections(*(kind[which] for kind in self))  # type: ignore[arg-type]


class Settings(NamedTuple):
    """What is no tensor: scales of the three branches, dropout, `activations.ACTIVATIONS`, path."""

    scales: tuple[float, ...]
    dropout_p: float
    activation: str
    path: str


class Piece(NamedTuple):
    """What backward reads of some rows; xa and ha are None without LoRA."""

    gate: Tensor | None
    up: Tensor | None
    xa: Tensor | None
    ha: Tensor | None


def needs_part(needs: GroupNeeds, which: slice, x: bool) -> GroupNeeds:
    """The needs of some of the three, whose input is needed where ``x`` says so."""
    return GroupNeeds(x, *(kind[which] for kind in needs[1:]))


def inner(needs: GroupNeeds) -> bool:
    """Whether a gradient is asked for that comes by way of dh."""
    return needs.x or any(any(kind[GATE_UP]) for kind in needs[1:])


def forward(
    x: Tensor,
    projections: Projections,
    bits: Masks,
    settings: Settings,
    keeps: bool,
) -> tuple[Tensor, list[Piece]]:
    """``y`` in x's dtype, and the pieces for backward if ``keeps``.

    ``bits`` are the packed masks over x and over h, None where nothing is dropped.
    """
    few = not is_compiling() and x.shape[0] < WIDENED_ROWS
    wide = settings.path == "widened" and not few
    if wide:
        projections = projections.to(torch.float32)
    y = None
    pieces: list[Piece] = []
    for rows in pieces_of(x.shape[0]):
        own = tuple(_rows(packed, rows) for packed in bits)
        part, piece = _forward_rows(_rows(x, rows), projections, own, settings, wide)
        if keeps:
            pieces.append(piece)
        del piece  # or the next one would be made beside it
        y = _joined(y, part, rows, x.shape[0], x.dtype)
    assert y is not None
    return y, pieces


def _forward_rows(
    x: Tensor,
    projections: Projections,
    bits: Masks,
    settings: Settings,
    wide: bool,
) -> tuple[Tensor, Piece]:
    scales, p, activation, _ = settings
    dtype = x.dtype
    if wide:
        x = x.float()
    both, down = projections.part(GATE_UP), projections.part(DOWN)
    keep = _unpacked(bits[0], x.shape[1])
    (gate, up), xa = reference.forward(x, *both, scales[GATE_UP], keep, p)
    h = gate_forward(gate, up, activation)
    keep = _unpacked(bits[1], h.shape[1])
    (y,), ha = reference.forward(h, *down, scales[DOWN], keep, p)
    return y, Piece(as_dtype(gate, dtype), as_dtype(up, dtype), xa, ha)


def backward(
    dy: Tensor,
    x: Tensor,
    projections: Projections,
    pieces: Sequence[Piece],
    bits: Masks,
    settings: Settings,
    needs: GroupNeeds,
) -> GroupGrads:
    """The gradients that ``needs`` asks for, from ``dy [M, N]`` of any strides.

    Down's as `reference.backward` has them, with ``dh`` for its dx; then ``dgate =
    dh·up·act'(gate)``, ``dup = dh·act(gate)``, and gate's and up's with x's.
    """
    weights, lora_as, lora_bs, _ = projections
    if settings.path == "widened":
        projections = projections.to(torch.float32)
    dx = None
    sums: list[Tensor | None] = [None] * 12
    spans = list(pieces_of(x.shape[0]))
    for rows, piece in zip(spans, pieces, strict=True):
        own = tuple(_rows(packed, rows) for packed in bits)
        operands = _rows(dy, rows), _rows(x, rows), projections, piece, own
        part = _backward_rows(*operands, settings, needs)
        if part.dx is not None:
            dx = _joined(dx, part.dx, rows, x.shape[0], x.dtype)
        for i, gradient in enumerate(grad for kind in part[1:] for grad in kind):
            sums[i] = _added(sums[i], gradient, alone=len(spans) == 1)
    found = GroupGrads(dx, *(tuple(sums[i : i + 3]) for i in range(0, 12, 3)))
    return reference.in_their_dtypes(found, x, weights, lora_as, lora_bs)


def _backward_rows(
    dy: Tensor,
    x: Tensor,
    projections: Projections,
    piece: Piece,
    bits: Masks,
    settings: Settings,
    needs: GroupNeeds,
) -> GroupGrads:
    scales, p, activation, path = settings
    if path == "widened":
        dy, x = dy.float(), x.float()
        piece = Piece(*(None if t is None else t.float() for t in piece))
    gate, up, xa, ha = piece
    weights, lora_as, lora_bs, _ = projections.part(DOWN)
    h = act = None
    if gate is not None and up is not None:
        act = activate(gate, activation)
        if needs.lora_as[2] or needs.weights[2]:
            h = act * up
    width = weights[0].shape[1]
    keep = _unpacked(bits[1], width)

    def of_down(read: Tensor, asked: GroupNeeds) -> GroupGrads:
        operands = (dy,), read, weights, lora_as, lora_bs, ha
        return reference.backward(*operands, scales[DOWN], keep, p, asked)

    asked = needs_part(needs, DOWN, inner(needs))
    stand_in = dy.new_empty(()).expand(dy.shape[0], width)
    if h is None:
        found = of_down(stand_in, asked)
    else:
        found = of_down(h, asked._replace(x=False))
        del h  # before dh comes
        if asked.x:
            alone = GroupNeeds(True, (False,), (False,), (False,), (False,))
            found = found._replace(dx=of_down(stand_in, alone).dx)
    if found.dx is None or act is None or gate is None or up is None:
        return together(None, found)
    dys = gate_backward(found.dx, act, gate, up, activation)
    weights, lora_as, lora_bs, _ = projections.part(GATE_UP)
    keep = _unpacked(bits[0], x.shape[1])
    asked = needs_part(needs, GATE_UP, needs.x)
    of_both = reference.backward(
        dys, x, weights, lora_as, lora_bs, xa, scales[GATE_UP], keep, p, asked
    )
    return together(of_both, found)


def plain_forward(
    x: Tensor,
    projections: Projections,
    keeps: Masks,
    settings: Settings,
) -> Tensor:
    """``y`` as torch itself differentiates, batches and exports it; the masks are boolean."""
    scales, p, activation, _ = settings
    both, down = projections.part(GATE_UP), projections.part(DOWN)
    gate, up = reference.plain_forward(x, *both, scales[GATE_UP], keeps[0], p)
    h = activate(gate, activation) * up
    (y,) = reference.plain_forward(h, *down, scales[DOWN], keeps[1], p)
    return y


def backward_with_graph(
    dy: Tensor,
    x: Tensor,
    projections: Projections,
    keeps: Masks,
    settings: Settings,
    needs: GroupNeeds,
    dtype: torch.dtype,
) -> GroupGrads:
    """`backward` by products that torch can differentiate again, taken in ``dtype``."""
    scales, p, activation, _ = settings
    x, projections = x.to(dtype), projections.to(dtype)
    both, down = projections.part(GATE_UP), projections.part(DOWN)
    gate, up = reference.plain_forward(x, *both, scales[GATE_UP], keeps[0], p)
    act = activate(gate, activation)

    def again(
        dys: Sequence[Tensor], into: Tensor, three: Projections, part: slice, asked: GroupNeeds
    ) -> GroupGrads:
        ranks = [None if a is None else a.shape[0] for a in three.lora_as]
        keep = keeps[1] if part == DOWN else keeps[0]
        return reference.backward_with_graph(
            dys, None, into, *three[:3], None, ranks, scales[part], keep, p, asked, dtype
        )

    asked = needs_part(needs, DOWN, inner(needs))
    of_down = again((dy,), act * up, down, DOWN, asked)
    dh = of_down.dx
    if dh is None:
        return together(None, of_down)
    dys = slope_times(dh * up, gate, activation), dh * act
    asked = needs_part(needs, GATE_UP, needs.x)
    of_both = again(dys, x, both, GATE_UP, asked)
    return together(of_both, of_down)


def together(of_both: GroupGrads | None, of_down: GroupGrads) -> GroupGrads:
    """The gradients of all three, dx being gate's and up's."""
    if of_both is None:
        kinds: Any = [(None, None, *kind) for kind in of_down[1:]]
        return GroupGrads(None, *kinds)
    kinds = [(*first, *last) for first, last in zip(of_both[1:], of_down[1:], strict=True)]
    return GroupGrads(of_both.dx, *kinds)


def pieces_of(rows: int) -> Iterator[slice]:
    """Pieces of rows of nearly equal size; all at once for a compiler, which sees to it itself."""
    if is_compiling() or rows <= MOST_ROWS:
        yield slice(None)
        return
    each = -(-rows // -(-rows // MOST_ROWS))
    for start in range(0, rows, each):
        yield slice(start, start + each)


def _rows(tensor: Any, rows: slice) -> Any:
    return tensor if tensor is None or rows == slice(None) else tensor[rows]


def _unpacked(bits: Tensor | None, cols: int) -> Tensor | None:
    return None if bits is None else unpack_bits(bits, cols)


def _joined(
    whole: Tensor | None, part: Tensor, rows: slice, count: int, dtype: torch.dtype
) -> Tensor:
    """``part`` put into its place of the whole, which the first one makes."""
    if rows == slice(None):
        # torch 2.11 traces an output converted to what it is into gradients silently zero.
        return as_dtype(part, dtype)
    if whole is None:
        whole = part.new_empty((count, part.shape[1]), dtype=dtype)
    whole[rows] = part
    return whole


def _added(total: Tensor | None, part: Tensor | None, alone: bool) -> Tensor | None:
    """The sum so far and one more, at least in float32 unless there is but one."""
    if part is None or alone:
        return part
    if total is None:
        return part.float() if is_narrow(part) else part
    return total.add_(part)
