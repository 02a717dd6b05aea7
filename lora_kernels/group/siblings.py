"""Linears that read the same x: the first that is called computes for all of them.

Nothing of the model's code is changed. Each layer's own call still happens, with its hooks; it asks
its `Siblings` first, and what it gets of them is what it would have computed. What was made ahead
is handed over once, to the layer it is for, if it comes with the very tensor, on the same thread,
and nothing has changed since; else that layer computes for all anew. So a call that is made again,
as activation checkpointing does, goes the way it went before, whatever was left over meanwhile.

What no version counter tells is not noticed: values written through ``.data`` or another library's
view between the calls of two siblings with one tensor. While somebody looks into the products
(``torch.compile``, ``torch.func``, forward mode) each layer computes by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.nn.modules import module as nn_module

from .. import dispatch
from ..kernels import tuning
from .autograd import lora_linear_group, spent

_PLAIN_TYPES = (Tensor, nn.Parameter)
# On a CPU the Python of one call for all takes longer than that of several, and with fewer rows
# than these it shows.
_LEAST_ROWS_ON_CPU = 256


def is_worth_it(x: Tensor, devices: tuple[str, ...] | None) -> bool:
    """Whether a call with x is made together: None says always, else it depends on device and
    number of rows."""
    if devices is None:
        return True
    if x.device.type not in devices:
        return False
    return not x.is_cpu or is_compiling() or x.numel() >= _LEAST_ROWS_ON_CPU * x.shape[-1]


class Part(NamedTuple):
    """What a layer gives to the group's call."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scale: float
    dropout_p: float
    training: bool


class _Kept(NamedTuple):
    """What was made ahead of the calls it is for."""

    x: Tensor
    of_x: tuple[Any, ...]
    mode: tuple[Any, ...]
    saving: Any
    ys: dict[int, Tensor]
    marks: dict[int, tuple[Any, ...]]


class Siblings:
    """Layers of one parent and one input width that are called with one tensor.

    It holds the layers weakly, and is copied and pickled with them: a copy's siblings are the
    copies.

    Args:
        layers: at least two; each gets this as its ``_lora_siblings``, and its ``_lora_slot``.
        devices: types of those devices on which they are computed together, on a CPU where there
            are many rows; None for all and always.
    """

    def __init__(self, layers: Sequence[Any], *, devices: tuple[str, ...] | None = None) -> None:
        self.devices = devices
        self._count = len(layers)
        self._forget()
        for slot, layer in enumerate(layers):
            layer._lora_siblings, layer._lora_slot = self, slot
            self.join(layer)

    def _forget(self) -> None:
        """Begin anew with what no copy takes along."""
        self._members: list[Any] = [None] * self._count
        # By thread: each has its own turn.
        self._kept: dict[int, _Kept] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {n: value for n, value in self.__dict__.items() if n not in ("_members", "_kept")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def join(self, layer: Any) -> None:
        """Put a layer, new or copied, where its slot says, unless another is there."""
        ref = self._members[layer._lora_slot]
        if ref is None or ref() is None:
            self._members[layer._lora_slot] = weakref.ref(layer)

    def layers(self) -> list[Any]:
        """Those that are still there."""
        found = [None if ref is None else ref() for ref in self._members]
        return [layer for layer in found if layer is not None]

    def serve(self, layer: Any, x: Tensor) -> Tensor | None:
        """``y`` of a layer that is called with x, or None where it is to compute by itself."""
        slot = layer._lora_slot
        ref = self._members[slot]
        if is_compiling() or ref is None or ref() is not layer:  # the latter of a shallow copy
            return None
        if type(x) not in _PLAIN_TYPES or x.dim() == 0 or x.is_inference():
            return None
        if _are_functorch_transforms_active() or forward_ad._current_level >= 0:
            return None
        thread = threading.get_ident()
        kept = self._kept.get(thread)
        y = None if kept is None or kept.x is not x else kept.ys.pop(slot, None)
        if kept is not None and y is not None and _is_current(kept, slot, x, layer, y):
            if not kept.ys:
                del self._kept[thread]
            return y
        return self._lead(slot, x, thread)

    def _lead(self, slot: int, x: Tensor, thread: int) -> Tensor | None:
        """Compute for all, keep what is the others'; None where it cannot be done for all."""
        self._kept.pop(thread, None)
        if not is_worth_it(x, self.devices) or nn_module._has_any_global_hook():
            return None
        parts: list[Part] = []
        for ref in self._members:
            member = None if ref is None else ref()
            if member is None or _gets_another(member):
                return None
            given = member.group_part(x)
            if given is None:
                return None
            part = Part(*given)
            if not _fits(part, x):
                return None
            parts.append(part)
        drops = {part.dropout_p if part.training else 0.0 for part in parts}
        if len(drops) > 1:
            return None
        ys = lora_linear_group(
            x,
            [part.weight for part in parts],
            [part.lora_a for part in parts],
            [part.lora_b for part in parts],
            [part.bias for part in parts],
            scales=[part.scale for part in parts],
            dropout_p=max(drops),
            training=True,
        )
        # The model's code may view them as it could a linear's.
        ys = tuple(y if y.is_contiguous() else y.contiguous() for y in ys)
        others = {i: y for i, y in enumerate(ys) if i != slot}
        marks = {i: _mark(parts[i]) for i in others}
        _forget_last(thread)
        self._kept[thread] = _Kept(x, _of_x(x), _mode(x), _saving(), others, marks)
        _last[thread] = weakref.ref(self)
        return ys[slot]


def _gets_another(layer: nn.Module) -> bool:
    """Whether hooks may give the layer another tensor than it is called with."""
    return bool(layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def _fits(part: Part, x: Tensor) -> bool:
    """Whether the layer's tensors are all there and of one kind, as an offloaded one's, a sharded
    one's or one's that gets x in another dtype may not be."""
    weight, lora_a, lora_b, bias = part[:4]
    casting = torch.is_autocast_enabled(x.device.type)
    return (
        weight.dim() == 2
        and weight.shape[1:] == lora_a.shape[1:] == x.shape[-1:]
        and lora_b.shape == (weight.shape[0], lora_a.shape[0])
        and (bias is None or bias.shape == weight.shape[:1])
        and all(
            t is None
            or (
                type(t) in _PLAIN_TYPES
                and t.device == x.device
                and t.dtype.is_floating_point
                and (casting or factor or t.dtype == x.dtype)
            )
            for t, factor in ((weight, False), (lora_a, True), (lora_b, True), (bias, False))
        )
    )


def _state(tensor: Tensor) -> tuple[Any, ...]:
    version = -1 if tensor.is_inference() else tensor._version
    return id(tensor), tensor.data_ptr(), version, tensor.requires_grad


def _of_x(x: Tensor) -> tuple[Any, ...]:
    """What has to be as it was of x; the node it came of is compared by identity."""
    return *_state(x), x.grad_fn


def _mark(part: Part) -> tuple[Any, ...]:
    """What has to be as it was of the layer."""
    return (*(_state(t) for t in part[:4] if t is not None), *part[4:])


def _mode(x: Tensor) -> tuple[Any, ...]:
    kind = x.device.type
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        dispatch.asked(),
        tuning.asked(),
    )


def _saving() -> Any:
    """By whom tensors are saved for backward: each checkpoint has hooks of its own."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is None:
        return None
    try:
        return weakref.ref(hooks[0])
    except TypeError:
        return hooks[0]


def _is_current(kept: _Kept, slot: int, x: Tensor, layer: Any, y: Tensor) -> bool:
    """Whether nothing has changed since it was made, and nobody has gone backward through it."""
    part = layer.group_part(x)
    return (
        part is not None
        and kept.of_x == _of_x(x)
        and kept.mode == _mode(x)
        and kept.saving == _saving()
        and kept.marks[slot] == _mark(Part(*part))
        and not spent(y)
    )


def _forget_last(thread: int) -> None:
    """Drop what an earlier call has made for nobody, after an exception, say: of this thread, and
    of threads that have ended."""
    ended = set()
    if len(_last) > 1:
        ended = _last.keys() - {each.ident for each in threading.enumerate()}
    for one in {thread, *ended}:
        last = _last.pop(one, None)
        siblings = None if last is None else last()
        if siblings is not None:
            siblings._kept.pop(one, None)


# Of each thread, whose turn it was last: one may hold something made ahead, and no more than one.
_last: dict[int, Any] = {}
