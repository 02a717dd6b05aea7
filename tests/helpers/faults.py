"""Faults at every place where a call can be stopped: torch's operations, and lines of our own."""

from __future__ import annotations

import sys
from contextlib import contextmanager

import torch
from places import ROOT
from torch.utils._python_dispatch import TorchDispatchMode

OURS = str(ROOT / "lora_kernels")


class Stop(BaseException):
    """What no handler of errors takes for its own, as Ctrl-C."""


class _Failing(TorchDispatchMode):
    def __init__(self, at, kind):
        super().__init__()
        self.left, self.kind = at, kind

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.left -= 1
        if self.left == 0:
            raise self.kind("injected")
        return func(*args, **(kwargs or {}))


@contextmanager
def failing_operation(at, kind):
    """Raise ``kind`` at the ``at``-th operation of torch; ``left`` is positive if none came."""
    with _Failing(at, kind) as mode:
        yield mode


class _Tracer:
    def __init__(self, at, kind, within):
        self.left, self.kind, self.within = at, kind, within

    def __call__(self, frame, event, arg):
        code = frame.f_code
        ours = code.co_name in self.within and code.co_filename.startswith(OURS)
        return self.line if ours else None

    def line(self, frame, event, arg):
        if event == "line":
            self.left -= 1
            if self.left == 0:
                sys.settrace(None)
                raise self.kind(f"injected at {frame.f_code.co_filename}:{frame.f_lineno}")
        return self.line


@contextmanager
def failing_line(at, kind, within):
    """Raise ``kind`` at the ``at``-th line of the library's functions that are called so."""
    tracer, before = _Tracer(at, kind, within), sys.gettrace()
    learning = torch.is_grad_enabled()
    sys.settrace(tracer)
    try:
        yield tracer
    finally:
        sys.settrace(before)
        # Stopped at the very end of a ``with``, Python does not leave the block.
        torch.set_grad_enabled(learning)


def stopped_everywhere(failing, kind, make, act, look, also=(), stride=1):
    """``act`` on a new ``make()`` with a fault at each place in turn, until it passes; with a
    ``stride`` at each so many.

    ``look(what)`` is asked of each one that was stopped, by the fault or what ``also`` names, which
    a library has made of it. How many there were is given back.
    """
    for at in range(1, 100_000, stride):
        made = make()
        try:
            with failing(at, kind) as mode:
                act(made)
        except (kind, *also):
            look(made)
            continue
        assert mode.left > 0, f"the fault at {at} was swallowed"
        return at - 1
    raise AssertionError("it never passed")
