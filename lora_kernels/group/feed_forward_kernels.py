"""A gated feed-forward with LoRA by the kernels, as `feed_forward_reference` has it in torch.

Gate and up are a group, down is a linear; between them lies one elementwise pass each way. Where
a compiler or somebody else sees to tensors that hold nothing, that pass is torch's.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

from ..kernels import activations
from ..linear import ops
from ..linear.reference import Grads, Needs, dbias_of
from . import ops as group_ops
from .feed_forward_reference import (
    GATE_UP,
    Masks,
    Piece,
    Projections,
    Settings,
    inner,
    needs_part,
    together,
)
from .reference import GroupGrads, GroupNeeds


def forward(
    x: Tensor, projections: Projections, seeds: Masks, settings: Settings
) -> tuple[Tensor, list[Piece], Masks]:
    """``y``, the one piece for backward, and the packed masks over x and over h."""
    scales, p, activation, _ = settings
    (gate, up), xa, x_bits = _group_forward(
        x, projections.part(GATE_UP), seeds[0], scales[GATE_UP], p
    )
    h = _gate_forward(gate, up, activation)
    y, ha, h_bits = _linear_forward(h, *_down(projections), seeds[1], scales[2], p)
    return y, [Piece(gate, up, xa, ha)], (x_bits, h_bits)


def backward(
    dy: Tensor,
    x: Tensor,
    projections: Projections,
    pieces: Sequence[Piece],
    bits: Masks,
    settings: Settings,
    needs: GroupNeeds,
) -> GroupGrads:
    """The gradients that ``needs`` asks for; as `feed_forward_reference.backward`."""
    scales, p, activation, _ = settings
    (piece,) = pieces
    gate, up, xa, ha = piece
    asked = Needs(inner(needs), *(kind[2] for kind in needs[1:]))
    reads_h = asked.weight or asked.lora_a

    def of_down(h: Tensor | None, asked: Needs) -> Grads:
        read = dy.new_empty(()).expand(dy.shape[0], width) if h is None else h
        own = _down(projections)[:3]
        return _linear_backward(dy, read, *own, ha, bits[1], scales[2], p, asked)

    width = projections.weights[2].shape[1]
    if not asked.x:
        h = None
        if reads_h and gate is not None and up is not None:
            h = _gate_forward(gate, up, activation)
        return together(None, _as_group(of_down(h, asked)))
    assert gate is not None and up is not None
    # What reads h waits for the pass that makes it, which reads dh.
    grads = of_down(None, asked._replace(weight=False, lora_a=False))
    assert grads.dx is not None
    h, *dys = _gate_backward(grads.dx, gate, up, activation, reads_h)
    if h is not None:
        later = of_down(h, asked._replace(x=False, lora_b=False, bias=False))
        grads = grads._replace(dweight=later.dweight, da=later.da)
        del h, later
    both = _group_backward(
        dys,
        x,
        projections.part(GATE_UP),
        xa,
        bits[0],
        scales[GATE_UP],
        p,
        needs_part(needs, GATE_UP, needs.x),
    )
    return together(both, _as_group(grads))


def _down(
    projections: Projections,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    weights, lora_as, lora_bs, biases = projections
    return weights[2], lora_as[2], lora_bs[2], biases[2]


def _as_group(grads: Grads) -> GroupGrads:
    """Down's gradients as those of a group of one; dh is nobody's."""
    dweight, da, db, dbias = grads[1:]
    return GroupGrads(None, (dweight,), (da,), (db,), (dbias,))


def _group_forward(
    x: Tensor,
    members: Projections,
    seed: Tensor | None,
    scales: tuple[float, ...],
    dropout_p: float,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """``(ys, xa, keep_bits)`` of gate and up."""
    operands = x, *members, seed, scales, dropout_p
    if not (is_compiling() or ops.watched(x, *(t for kind in members for t in kind), seed)):
        return group_ops.forward(*operands)
    found = torch.ops.lora_kernels.group_forward(*operands)
    ys, rest = tuple(found[:2]), list(found[2:])
    xa = rest.pop(0) if any(lora_a is not None for lora_a in members.lora_as) else None
    return ys, xa, rest.pop(0) if rest else None


def _group_backward(
    dys: list[Tensor],
    x: Tensor,
    members: Projections,
    xa: Tensor | None,
    bits: Tensor | None,
    scales: tuple[float, ...],
    dropout_p: float,
    needs: GroupNeeds,
) -> GroupGrads:
    """The gradients of gate and up."""
    weights, lora_as, lora_bs, _ = members
    if not (is_compiling() or ops.watched(x, *dys, *weights, *lora_as, *lora_bs)):
        return group_ops.backward(
            dys, x, weights, lora_as, lora_bs, xa, bits, scales, dropout_p, needs
        )
    asked = [needs.x, *(needed for kind in needs[1:] for needed in kind)]
    found = iter(
        torch.ops.lora_kernels.group_backward(
            dys, x, weights, lora_as, lora_bs, xa, bits, scales, dropout_p, asked
        )
    )
    dx, *flat = [next(found) if there else None for there in group_ops.there(dys, asked, 2)]
    return GroupGrads(dx, *(tuple(flat[i : i + 2]) for i in range(0, 8, 2)))


def _linear_forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``(y, xa, keep_bits)`` of one projection."""
    if lora_a is None or lora_b is None:
        return F.linear(x, weight, bias), None, None
    operands = x, weight, lora_a, lora_b, bias, seed
    seen = is_compiling() or ops.watched(*operands)
    call = torch.ops.lora_kernels.forward if seen else ops.forward
    y, xa, bits = call(*operands, scale, dropout_p)
    return y, xa, None if seed is None else bits


def _linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    xa: Tensor | None,
    bits: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
) -> Grads:
    """The gradients of one projection; x and xa need only have a shape where they are not read."""
    if lora_a is None or lora_b is None:
        return Grads(
            dy.mm(weight) if needs.x else None,
            dy.t().mm(x) if needs.weight else None,
            None,
            None,
            dbias_of(dy) if needs.bias else None,
        )
    if xa is None:
        xa = dy.new_empty(()).expand(dy.shape[0], lora_a.shape[0])
    operands = dy, x, weight, lora_a, lora_b, xa
    if not (is_compiling() or ops.watched(*operands)):
        return ops.backward(*operands, bits, scale, dropout_p, needs)
    found = iter(torch.ops.lora_kernels.backward(*operands, bits, scale, dropout_p, list(needs)))
    return Grads(*(next(found) if needed else None for needed in needs))


def _gate_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    if is_compiling() or ops.watched(gate, up) or not gate.numel():
        return activations.gate_forward(gate, up, activation)
    with ops.on_device_of(gate):
        return _gated().gate_forward(gate, up, activation)


def _gate_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, need_h: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``(h, dgate, dup)``, h where it is needed."""
    if is_compiling() or ops.watched(dh, gate, up) or not gate.numel():
        act = activations.activate(gate, activation)
        h = act * up if need_h else None
        return h, *activations.gate_backward(dh, act, gate, up, activation)
    with ops.on_device_of(gate):
        return _gated().gate_backward(dh, gate, up, activation, need_h)


@functools.cache
def _gated() -> ModuleType:
    """The module of the elementwise kernels; imported when called, because Triton may be absent."""
    return importlib.import_module("lora_kernels.kernels.gated")
