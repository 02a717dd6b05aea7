"""The Triton path of groups as two operators, ``torch.ops.lora_kernels.group_forward`` and so on.

As in `linear.ops`: opaque to tracers, called around where nobody watches. An operator takes lists
of tensors and of optional ones, and gives a list; what is absent in it is left out.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

from ..linear.ops import bits_like, capability_for, on_device_of
from . import reference
from .reference import Factors, GroupGrads, GroupNeeds

FORWARD = "lora_kernels::group_forward"
BACKWARD = "lora_kernels::group_backward"

torch.library.define(
    FORWARD,
    "(Tensor x, Tensor[] weights, Tensor?[] lora_as, Tensor?[] lora_bs, Tensor?[] biases, "
    "Tensor? seed, float[] scales, float dropout_p) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    BACKWARD,
    "(Tensor?[] dys, Tensor x, Tensor[] weights, Tensor?[] lora_as, Tensor?[] lora_bs, Tensor? xa, "
    "Tensor? keep_bits, float[] scales, float dropout_p, bool[] needs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors,
    seed: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
    apart: bool = False,
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """``(ys, xa, keep_bits)`` of 2-D x by the kernels; without a seed the bits are None.

    ``apart`` as in the kernels' `forward`.
    """
    if not x.numel() or any(0 in weight.shape for weight in weights):
        ys, xa = reference.forward(x, weights, lora_as, lora_bs, biases, scales, None, 0.0)
        return ys, xa, None if seed is None else bits_like(x, seed)
    with on_device_of(x):
        capability, kernels = capability_for(x), _kernels("forward")
        found: tuple[tuple[Tensor, ...], Tensor | None, Tensor | None] = kernels.forward(
            x, weights, lora_as, lora_bs, biases, scales, seed, dropout_p, capability, apart
        )
    return found


@torch.library.impl(FORWARD, ("CUDA", "CPU"))
def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors,
    seed: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
) -> list[Tensor]:
    """The ys, then xa and the bits, each where there is one; the ys as tensors of their own."""
    operands = x, weights, lora_as, lora_bs, biases, seed, scales, dropout_p
    ys, xa, bits = forward(*operands, apart=True)  # slices would have to be copied
    return _of_their_own([*ys, *(t for t in (xa, bits) if t is not None)])


@torch.library.register_fake(FORWARD)
def _forward_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors,
    seed: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
) -> list[Tensor]:
    found = [x.new_empty(x.shape[0], weight.shape[0]) for weight in weights]
    rank = sum(lora_a.shape[0] for lora_a in lora_as if lora_a is not None)
    if rank:
        found.append(x.new_empty(x.shape[0], rank))
    if seed is not None:
        found.append(bits_like(x, seed))
    return found


def backward(
    dys: Factors,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    xa: Tensor | None,
    keep_bits: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
    needs: GroupNeeds,
) -> GroupGrads:
    """The gradients that ``needs`` asks for, by the kernels."""
    if not x.numel() or any(0 in weight.shape for weight in weights):
        return reference.backward(dys, x, weights, lora_as, lora_bs, xa, scales, None, 0.0, needs)
    with on_device_of(x):
        grads: GroupGrads = _kernels("backward").backward(
            dys,
            x,
            weights,
            lora_as,
            lora_bs,
            xa,
            scales,
            keep_bits,
            dropout_p,
            needs,
            capability_for(x),
        )
    return grads


@torch.library.impl(BACKWARD, ("CUDA", "CPU"))
def _backward(
    dys: Factors,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    xa: Tensor | None,
    keep_bits: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients there are, in the order of `flat`."""
    asked = unflat_needs(needs, len(weights))
    grads = backward(dys, x, weights, lora_as, lora_bs, xa, keep_bits, scales, dropout_p, asked)
    return _of_their_own([grad for grad in flat(grads) if grad is not None])


def _of_their_own(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same contiguous, none in the storage of another: an operator may not give aliases."""
    found, taken = [], set[int]()
    for tensor in tensors:
        tensor, storage = tensor.contiguous(), tensor.untyped_storage().data_ptr()
        again = storage in taken and tensor.untyped_storage().data_ptr() == storage
        found.append(tensor.clone() if again else tensor)
        taken.add(storage)
    return found


@torch.library.register_fake(BACKWARD)
def _backward_fake(
    dys: Factors,
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    xa: Tensor | None,
    keep_bits: Tensor | None,
    scales: Sequence[float],
    dropout_p: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    like: list[Tensor | None] = [x, *weights, *lora_as, *lora_bs]
    like += [weight[:, 0] for weight in weights]
    return [
        tensor.new_empty(tensor.shape)
        for tensor, needed in zip(like, there(dys, needs, len(weights)), strict=True)
        if needed and tensor is not None
    ]


def flat(grads: GroupGrads) -> list[Tensor | None]:
    """dx, then the weights', A's, B's and biases' gradients, of the members in their order."""
    return [grads.dx, *grads.dweights, *grads.das, *grads.dbs, *grads.dbiases]


def unflat_needs(needs: Sequence[bool], count: int) -> GroupNeeds:
    """What `flat` would make of needs, taken apart again."""
    parts = [tuple(needs[1 + i * count : 1 + (i + 1) * count]) for i in range(4)]
    return GroupNeeds(needs[0], *parts)


def there(dys: Factors, needs: Sequence[bool], count: int) -> list[bool]:
    """Which gradients there are: those asked for whose dy is there; dx where any is."""
    each = [needed and dys[i % count] is not None for i, needed in enumerate(needs[1:])]
    return [needs[0] and any(dy is not None for dy in dys), *each]


@functools.cache
def _kernels(name: str) -> ModuleType:
    """The module of the kernels; imported at the first call, because Triton may be absent."""
    return importlib.import_module(f".{name}", __package__)
