"""Linears that turn out to read the same x: the first that is called computes for all of them.

Nothing of the model's code is known or changed. Each layer's own call still happens, with its
hooks; it asks its `Siblings` first, and what it gets of them is what it would have computed. What
was made ahead is handed over once, to the layer it is for, if it comes with the very tensor and
nothing has changed since; else that layer computes by itself.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .autograd import lora_linear_group

# After so many rounds in which something was made for nobody the layers go their own ways.
_PATIENCE = 3
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
    version: int
    mode: tuple[Any, ...]
    ys: dict[int, Tensor]
    marks: dict[int, tuple[Any, ...]]
    thread: int


class Siblings:
    """Layers of one parent and one input width that may be called with one tensor.

    Until they are seen to be, each computes by itself. It holds the layers weakly, and is copied
    and pickled with them: a copy's siblings are the copies.

    Args:
        layers: at least two; each gets this as its ``_lora_siblings``, and its ``_lora_slot``.
        seen: whether it is known already that they are called with one tensor.
        devices: types of those devices on which they are computed together, on a CPU where there
            are many rows; None for all and always.
    """

    def __init__(
        self,
        layers: Sequence[Any],
        *,
        seen: bool = False,
        devices: tuple[str, ...] | None = None,
    ) -> None:
        self.devices = devices
        self._count = len(layers)
        self._together = seen
        self._patience = _PATIENCE
        self._forget()
        for slot, layer in enumerate(layers):
            layer._lora_siblings, layer._lora_slot = self, slot
            self.join(layer)

    def _forget(self) -> None:
        """Begin anew with what no copy takes along."""
        self._members: list[Any] = [None] * self._count
        self._kept: _Kept | None = None
        self._round: dict[int, int] = {}
        self._inputs: list[tuple[Any, int]] = []

    def __getstate__(self) -> dict[str, Any]:
        passing = ("_members", "_kept", "_round", "_inputs")
        return {name: value for name, value in self.__dict__.items() if name not in passing}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def join(self, layer: Any) -> None:
        """Put a layer, new or copied, where its slot says, unless another is there."""
        ref = self._members[layer._lora_slot]
        if ref is None or ref() is None:
            self._members[layer._lora_slot] = weakref.ref(layer)

    @property
    def together(self) -> bool:
        """Whether they have been seen to be called with one tensor."""
        return self._together

    def layers(self) -> list[Any]:
        """Those that are still there."""
        found = [None if ref is None else ref() for ref in self._members]
        return [layer for layer in found if layer is not None]

    def serve(self, layer: Any, x: Tensor) -> Tensor | None:
        """``y`` of a layer that is called with x, or None where it is to compute by itself."""
        slot, kept = layer._lora_slot, self._kept
        ref = self._members[slot]
        if ref is None or ref() is not layer:
            return None  # a shallow copy
        if kept is not None and kept.x is x:
            y = kept.ys.pop(slot, None)
            if not kept.ys:
                self._kept = None
            # None where it is called again: what is left is for the others.
            return y if y is not None and _is_current(kept, slot, x, layer) else None
        if not self._together:
            if not is_compiling():
                self._watch(slot, x)
            return None
        return self._lead(slot, x)

    def _lead(self, slot: int, x: Tensor) -> Tensor | None:
        """Compute for all, keep what is the others'; None where it cannot be done for all."""
        traced = is_compiling()
        if type(x) not in _PLAIN_TYPES or (not traced and x.is_inference()):
            return None  # of these nobody would notice a change
        if x.dim() == 0:
            return None
        if not is_worth_it(x, self.devices):
            return None
        parts: list[Part] = []
        for ref in self._members:
            member = None if ref is None else ref()
            given = None if member is None else member.group_part(x)
            if given is None:
                return None
            part = Part(*given)
            if not _fits(part, x):
                return None
            parts.append(part)
        drops = {
            part.dropout_p if part.training else 0.0 for part in parts if part.lora_a is not None
        }
        if len(drops) > 1:
            return None
        if self._kept is not None and not traced:
            self._missed(self._kept)
        ys = lora_linear_group(
            x,
            [part.weight for part in parts],
            [part.lora_a for part in parts],
            [part.lora_b for part in parts],
            [part.bias for part in parts],
            scales=[part.scale for part in parts],
            dropout_p=max(drops, default=0.0),
            training=True,
        )
        others = {i: y for i, y in enumerate(ys) if i != slot}
        if traced:
            marks: dict[int, tuple[Any, ...]] = dict.fromkeys(others, ())
            self._kept = _Kept(x, 0, (), others, marks, 0)
        else:
            marks = {i: _mark(parts[i]) for i in others}
            thread = threading.get_ident()
            _drop_last(thread)
            self._kept = _Kept(x, x._version, _mode(), others, marks, thread)
            _last[thread] = weakref.ref(self)
        return ys[slot]

    def _missed(self, kept: _Kept) -> None:
        """Something was made for nobody; another thread's may only have been overtaken."""
        if kept.thread == threading.get_ident():
            self._patience -= 1
            if not self._patience:
                self.part()

    def part(self) -> None:
        """Let every layer compute by itself from now on."""
        for layer in self.layers():
            if layer.__dict__.get("_lora_siblings") is self:
                del layer.__dict__["_lora_siblings"]
        self._together, self._kept = False, None

    def _watch(self, slot: int, x: Tensor) -> None:
        """Note the call; once each has been called, those that came with one tensor stay together.

        A layer that is called again before others are at all begins another round, a few times.
        """
        if x.is_inference():
            return
        if slot in self._round:
            self._patience -= 1
            if not self._patience:
                self._settle()
                return
            self._round, self._inputs = {}, []
        which = next(
            (i for i, (ref, v) in enumerate(self._inputs) if ref() is x and v == x._version),
            len(self._inputs),
        )
        if which == len(self._inputs):
            self._inputs.append((weakref.ref(x), x._version))
        self._round[slot] = which
        if len(self._round) == self._count:
            self._settle()

    def _settle(self) -> None:
        """Stay together with those who were called with one tensor."""
        by_input: dict[int, list[Any]] = {}
        for slot, which in self._round.items():
            layer = None if self._members[slot] is None else self._members[slot]()
            if layer is not None:
                by_input.setdefault(which, []).append(layer)
        self._round, self._inputs = {}, []
        if len(by_input) == 1 and sum(map(len, by_input.values())) == self._count:
            self._together, self._patience = True, _PATIENCE
            return
        self.part()
        for layers in by_input.values():
            if len(layers) > 1:
                Siblings(layers, seen=True, devices=self.devices)


def _fits(part: Part, x: Tensor) -> bool:
    """Whether the layer's tensors are all there, as an offloaded or a sharded one's may not be."""
    weight, lora_a, lora_b, bias = part[:4]
    return (
        weight.dim() == 2
        and weight.shape[1:] == lora_a.shape[1:] == x.shape[-1:]
        and weight.shape[:1] == lora_b.shape[:1]
        and all(
            t is None or (type(t) in _PLAIN_TYPES and t.device == x.device)
            for t in (weight, lora_a, lora_b, bias)
        )
    )


def _mark(part: Part) -> tuple[Any, ...]:
    """What has to be as it was for a result made ahead to be the layer's own."""
    tensors = [
        (id(t), -1 if t.is_inference() else t._version, t.requires_grad)
        for t in part[:4]
        if t is not None
    ]
    return (*tensors, *part[4:])


def _mode() -> tuple[Any, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_autocast_enabled("cuda"),
    )


def _is_current(kept: _Kept, slot: int, x: Tensor, layer: Any) -> bool:
    """Whether nothing has changed since it was made."""
    if is_compiling():
        return True  # a trace has one version of everything
    part = layer.group_part(x)
    return (
        part is not None
        and x._version == kept.version
        and kept.mode == _mode()
        and kept.marks[slot] == _mark(Part(*part))
    )


def _drop_last(thread: int) -> None:
    """Forget what an earlier call of this thread has made for nobody, after an exception, say."""
    last = _last.pop(thread, None)
    siblings = None if last is None else last()
    if siblings is not None:
        siblings._kept = None


# Of each thread, whose turn it was last: one may hold something made ahead, and no more than one.
_last: dict[int, Any] = {}
