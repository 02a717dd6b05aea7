"""The Triton path as two operators, ``torch.ops.lora_kernels.forward`` and ``backward``.

Opaque to tracers: what strategy and which kernels a call takes is decided inside, from its real
shapes, so a graph with a dynamic number of rows stays one graph. The autograd Function is outside,
in `autograd`: `torch.library.register_autograd` would cost a third more host time a call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active

from ..dispatch import capability_of
from . import reference
from .reference import Grads, Needs

FORWARD = "lora_kernels::forward"
BACKWARD = "lora_kernels::backward"

torch.library.define(
    FORWARD,
    "(Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? seed, "
    "float scale, float dropout_p) -> (Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    BACKWARD,
    "(Tensor dy, Tensor x, Tensor weight, Tensor lora_a, Tensor lora_b, Tensor xa, "
    "Tensor? keep_bits, float scale, float dropout_p, bool[] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, xa, keep_bits)`` of 2-D x by the kernels; without a seed the bits are None or empty."""
    if 0 in weight.shape or not x.shape[0]:
        y, xa = reference.forward(x, weight, lora_a, lora_b, bias, scale, None, 0.0)
        return y, xa, bits_like(x, seed)
    with on_device_of(x):
        found: tuple[Tensor, Tensor, Tensor | None] = _kernels("forward").forward(
            x, weight, lora_a, lora_b, bias, scale, seed, dropout_p, capability_for(x)
        )
    return found


@torch.library.impl(FORWARD, ("CUDA", "CPU"))
def _forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`; the bits are empty ``[0, 0]`` without a seed, for an operator gives tensors."""
    y, xa, bits = forward(x, weight, lora_a, lora_b, bias, seed, scale, dropout_p)
    return y, xa, bits_like(x, None) if bits is None else bits


@torch.library.register_fake(FORWARD)
def _forward_fake(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, x.new_empty(x.shape[0], lora_a.shape[0]), bits_like(x, seed)


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    keep_bits: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
) -> Grads:
    """The gradients that ``needs`` asks for, by the kernels."""
    if 0 in weight.shape or not x.shape[0]:
        return reference.backward(dy, x, weight, lora_a, lora_b, xa, scale, None, 0.0, needs)
    with on_device_of(x):
        grads: Grads = _kernels("backward").backward(
            dy,
            x,
            weight,
            lora_a,
            lora_b,
            xa,
            scale,
            keep_bits,
            dropout_p,
            needs,
            capability_for(x),
        )
    return grads


@torch.library.impl(BACKWARD, ("CUDA", "CPU"))
def _backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    keep_bits: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> list[Tensor]:
    """Those of dx, dweight, da, db and dbias that ``needs`` asks for, in this order."""
    operands = dy, x, weight, lora_a, lora_b, xa, keep_bits
    grads = backward(*operands, scale, dropout_p, Needs(*needs))
    return [grad for grad in grads if grad is not None]


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    keep_bits: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: list[bool],
) -> list[Tensor]:
    like = (x, weight, lora_a, lora_b, weight[:, 0] if needs[4] else weight)
    return [
        tensor.new_empty(tensor.shape) for tensor, needed in zip(like, needs, strict=True) if needed
    ]


def bits_like(x: Tensor, seed: Tensor | None) -> Tensor:
    shape = (0, 0) if seed is None else (x.shape[0], (x.shape[1] + 7) // 8)
    return x.new_empty(shape, dtype=torch.uint8)


@functools.cache
def _kernels(name: str) -> ModuleType:
    """The module of the kernels; imported at the first call, because Triton may be absent."""
    return importlib.import_module(f".{name}", __package__)


def capability_for(x: Tensor) -> tuple[int, int]:
    # The interpreter stands in for the GPU with the most kernels.
    return capability_of(x.get_device()) if x.is_cuda else (9, 0)


def on_device_of(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Triton launches on the current device, which need not be x's."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


_HERE = contextlib.nullcontext()
_PLAIN = {Tensor, nn.Parameter}


def watched(*tensors: Tensor | None) -> bool:
    """Whether somebody should see the operators, or may take their place.

    Where nobody does, `forward` and `backward` are called themselves: torch's dispatcher takes
    as long as a product of a small layer.
    """
    return (
        torch._C._len_torch_dispatch_stack() > 0  # fakes, tracers, selective checkpointing
        or _are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
        or any(t is not None and type(t) not in _PLAIN for t in tensors)
    )
