"""The products over groups as two operators, ``torch.ops.lora_kernels.grouped_forward`` and so on.

Where each group's rows lie is data, which a tracer does not have: to it these are opaque. Where
nobody traces, the functions are called themselves, so that counters of FLOPs see their products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling

from ..linear.reference import Grads, Needs
from . import grouped, reference
from .products import padded

FORWARD = "lora_kernels::grouped_forward"
BACKWARD = "lora_kernels::grouped_backward"
# How the products are taken.
LOOP, WIDENED, GROUPED = "loop", "widened", "grouped"
FORWARDS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    LOOP: reference.forward,
    WIDENED: reference.widened_forward,
    GROUPED: grouped.forward,
}
BACKWARDS: dict[str, Callable[..., Grads]] = {
    LOOP: reference.backward,
    WIDENED: reference.widened_backward,
    GROUPED: grouped.backward,
}

torch.library.define(
    FORWARD,
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor offsets, Tensor? bias, "
    "Tensor? keep, float scale, float dropout_p, str path) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    BACKWARD,
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor offsets, Tensor xa, "
    "Tensor? keep, float scale, float dropout_p, bool[] needs, str path) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def forward(*operands: Any) -> tuple[Tensor, Tensor]:
    """``(y, xa)``; the operands are the operator's."""
    if _is_opaque(operands[4]):
        found: tuple[Tensor, Tensor] = torch.ops.lora_kernels.grouped_forward(*operands)
        return found
    return FORWARDS[operands[-1]](*operands[:-1])


def backward(*operands: Any) -> Grads:
    """The gradients, with `Needs` in place of the operator's list."""
    *tensors, needs, path = operands
    if not _is_opaque(tensors[5]):
        return BACKWARDS[path](*tensors, needs)
    found = iter(torch.ops.lora_kernels.grouped_backward(*tensors, list(needs), path))
    return Grads(*(next(found) if needed else None for needed in needs))


def _is_opaque(offsets: Tensor) -> bool:
    return is_compiling() or offsets.is_meta or isinstance(offsets, FakeTensor)


@torch.library.impl(FORWARD, ("CUDA", "CPU"))
def _forward(*operands: Any) -> tuple[Tensor, Tensor]:
    return FORWARDS[operands[-1]](*operands[:-1])


@torch.library.register_fake(FORWARD)
def _forward_fake(x: Tensor, weight: Tensor, lora_a: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    path = others[-1]
    xa = x.new_empty(x.shape[0], lora_a.shape[1])
    if path == WIDENED:
        xa = xa.float()
    return x.new_empty(x.shape[0], weight.shape[1]), padded(xa, 1) if path == GROUPED else xa


@torch.library.impl(BACKWARD, ("CUDA", "CPU"))
def _backward(*operands: Any) -> list[Tensor]:
    """Those of dx, dweight, da, db and dbias that ``needs`` asks for, in this order."""
    *tensors, needs, path = operands
    return [grad for grad in BACKWARDS[path](*tensors, Needs(*needs)) if grad is not None]


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    dy: Tensor, x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, *others: Any
) -> list[Tensor]:
    needs = others[-2]
    like = (x, weight, lora_a, lora_b, dy.new_empty(weight.shape[:2]))
    return [t.new_empty(t.shape) for t, needed in zip(like, needs, strict=True) if needed]
