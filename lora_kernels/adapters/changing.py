"""A change of a model is made whole or not at all, and by one thread at a time.

What a change puts in and takes out are attributes of modules, which are cheap to remember. Values
that it writes into tensors are its own to bring back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import reshard
from .wholes import ASIDE, Aside

# A change asks and acts in one step: between the two no other thread may change anything.
LOCK = threading.RLock()

# Dictionaries of a module that a change writes into; hooks' handles know them by identity.
_WRITTEN = (
    "_parameters",
    "_buffers",
    "_modules",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_lora_configs",
    ASIDE,
)


@contextmanager
def change_of(model: nn.Module) -> Iterator[None]:
    """Hold `LOCK`, and where the block raises bring back every module as it was before.

    That is for whatever stops it: a refusal, memory that runs out, Ctrl-C.
    """
    with LOCK:
        reshard(model)  # or what FSDP has put in place for a while would be brought back
        before = [_Before(module) for module in model.modules()]
        try:
            yield
        except BaseException:
            for module in before:
                module.bring_back()
            raise


def finish(step: Callable[[], None]) -> None:
    """Run what ends a block, a step that is whole or not at all, and again if something stops it.

    A Ctrl-C that comes just then is heard, and the block has ended all the same.
    """
    try:
        step()
    except BaseException:
        step()
        raise


class _Before:
    """A module's attributes, and what is in those that a change writes into."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.own = dict(vars(module))
        self.inside = [(self.own[key], dict(self.own[key])) for key in _WRITTEN if key in self.own]
        asides: Iterable[Aside] = self.own.get(ASIDE, {}).values()
        self.asides: list[tuple[Any, ...]] = []
        for aside in asides:
            values = [(value, value.data) for value in aside.others.values()]
            fields = {**vars(aside), "others": dict(aside.others), "frozen": set(aside.frozen)}
            self.asides.append((aside, fields, values))

    def bring_back(self) -> None:
        if type(self.module) is not self.kind:
            self.module.__class__ = self.kind
        own = vars(self.module)
        own.clear()
        own.update(self.own)
        for written, before in self.inside:
            written.clear()
            written.update(before)
        for aside, fields, values in self.asides:
            vars(aside).update(fields)
            for value, data in values:
                if (value.dtype, value.device) != (data.dtype, data.device):
                    with torch.inference_mode(False):
                        value.data = data


def write_together(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair into the first, or leave all of them as they were.

    Takes a copy of what is overwritten first, so that nothing is written where memory is short.
    """
    with torch.no_grad():
        kept = [(target, value, target.detach().clone()) for target, value in pairs]
        try:
            for target, value, _ in kept:
                target.copy_(value)
        except BaseException:
            for target, _, before in kept:
                target.copy_(before)
            raise
