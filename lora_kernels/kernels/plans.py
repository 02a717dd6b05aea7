"""What was worked out for a call, kept for the next one like it.

A plan holds strategy, block sizes, grids, arguments and compiled kernels: all of a call that its
tensors' contents and addresses do not change. It keeps no tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from . import tuning
from .launching import is_recording
from .tiles import precision

# Of a few kilobytes each. A model has a few dozen for each length of its batches.
MOST = 1024

_plans: dict[Hashable, Callable[..., Any]] = {}


def key(role: str, tensors: tuple[Tensor | None, ...], settings: Hashable) -> Hashable:
    """All that a plan depends on; ``settings`` is what the role adds to it.

    That is layouts and device, what `tuning` was told, and how float32 is multiplied. Of addresses
    a plan knows nothing: a launch looks at them anew.
    """
    first = tensors[0]
    assert first is not None
    return (
        role,
        settings,
        first.get_device(),
        tuning.asked(),
        precision(first.dtype),
        *[None if t is None else (t.shape, t.stride(), t.dtype) for t in tensors],
    )


def find(key: Hashable) -> Callable[..., Any] | None:
    """The plan kept for such a call, if there is one."""
    return None if is_recording() else _plans.get(key)


def keep(key: Hashable, plan: Callable[..., Any]) -> Callable[..., Any]:
    """Keep a plan, forgetting all others once there are too many; gives it back.

    Two threads may make the same plan; either serves.
    """
    if is_recording():
        return plan  # the GPU that is recorded for is not the one of the key
    if len(_plans) >= MOST:
        _plans.clear()
    _plans[key] = plan
    return plan


def clear() -> None:
    """Forget every plan."""
    _plans.clear()


def count() -> int:
    """How many plans are kept."""
    return len(_plans)
