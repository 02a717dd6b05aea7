"""What a thread has asked for, also where autograd goes on in a thread of its own."""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch.compiler import is_compiling

Value = TypeVar("Value")


class _Here(threading.local):
    # Of the instance: a compiled graph guards no others, and these in the thread that it runs in.
    def __init__(self, value: object) -> None:
        self.value = value


class PerThread(Generic[Value]):
    """A value that each thread sets for itself, and a default where it has not.

    A backward on a GPU, and the forward that checkpointing runs again in it, run in a thread of
    autograd's: there the value is that of the thread that called backward.
    """

    def __init__(self, name: str, default: Value) -> None:
        self._key = f"lora_kernels.{name}"
        self._default = default
        self._here = _Here(default)

    def get(self) -> Value:
        """The value in this thread; a compiled graph is made anew for each."""
        if is_compiling():
            return self._here.value  # type: ignore[return-value]
        # torch hands these objects on to autograd's threads, as it does for CUDA graphs.
        if torch._C._is_key_in_tls(self._key):
            found: Value = torch._C._get_obj_in_tls(self._key)
            return found
        return self._default

    @contextmanager
    def set(self, value: Value) -> Iterator[None]:
        """Have ``value`` in this thread for the length of the ``with``."""
        before = self.get()
        try:
            self._put(value)
            yield
        finally:
            self._put(before)

    def _put(self, value: Value) -> None:
        self._here.value = value
        if _steals():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(value))
        torch._C._stash_obj_in_tls(self._key, value)


@functools.cache
def _steals() -> bool:
    """Whether torch keeps an object without counting its reference, as 2.11 does, and gives one
    back too many when another takes its place."""
    probe = object()
    before = sys.getrefcount(probe)
    torch._C._stash_obj_in_tls("lora_kernels.probe", probe)
    stolen = sys.getrefcount(probe) == before
    if stolen:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return stolen
