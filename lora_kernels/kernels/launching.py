"""How a kernel is launched: prepared once with all that stays the same, then called with tensors.

A launch through Triton's `JITFunction` binds and classifies every argument anew, which takes ten
times as long as the launch itself. Here that is done once; the compiled kernel is kept and run
with the new addresses, as long as everything is as it was when Triton chose it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor


class Layout(NamedTuple):
    """What a plan may know of a tensor: everything but where it lies and what is in it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Layout:
        """The layout of a tensor."""
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def t(self) -> Layout:
        """Of the transpose of a matrix."""
        return self._replace(shape=self.shape[::-1], stride=self.stride[::-1])

    def filled(self, rows: int, cols: int) -> Layout:
        """Of a contiguous matrix of this dtype on this device."""
        return self._replace(shape=(rows, cols), stride=(cols, 1))


@overload
def layout_of(tensor: Tensor) -> Layout: ...
@overload
def layout_of(tensor: Tensor | None) -> Layout | None: ...
def layout_of(tensor: Tensor | None) -> Layout | None:
    """As `Layout.of`, and None of None."""
    return None if tensor is None else Layout.of(tensor)


class Launch(NamedTuple):
    """One recorded launch: the kernel, its arguments by name, and Triton's options."""

    kernel: Any
    arguments: dict[str, Any]
    options: dict[str, Any]


class _Recording(NamedTuple):
    launches: list[Launch]
    sms: int


_recording: ContextVar[_Recording | None] = ContextVar("recording", default=None)
_ABSENT_SMS = 4  # of a device that is no GPU


@contextmanager
def recording(sms: int = _ABSENT_SMS) -> Iterator[list[Launch]]:
    """Collect the launches that this thread makes inside the ``with`` instead of running them.

    For tools that compile what a launcher would run, on any machine; outputs stay unwritten, and
    tensors may be on ``meta``.

    Args:
        sms: multiprocessors of the GPU that tensors off any GPU are taken to be on.
    """
    token = _recording.set(_Recording([], sms))
    try:
        yield _recording.get().launches  # type: ignore[union-attr]
    finally:
        _recording.reset(token)


def is_recording() -> bool:
    """Whether launches of this thread are recorded."""
    return _recording.get() is not None


def record(launch: Launch) -> None:
    """Add a launch to what this thread records."""
    recorded = _recording.get()
    assert recorded is not None, "there is no recording"
    recorded.launches.append(launch)


def num_sms(x: Tensor | Layout) -> int:
    """Multiprocessors of x's device; off any GPU a small number, or what `recording` says."""
    if x.device.type != "cuda":
        recorded = _recording.get()
        return _ABSENT_SMS if recorded is None else recorded.sms
    return _sms_of(x.device)


@functools.cache
def _sms_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class Box(NamedTuple):
    """A matrix as TMA shall read or write it: ``[rows, cols]`` by blocks, rows ``pitch`` apart."""

    shape: tuple[int, int]
    pitch: int
    block: tuple[int, int]

    def over(self, tensor: Tensor) -> TensorDescriptor:
        """The descriptor of a tensor's memory; raises AssertionError where TMA cannot read it."""
        return TensorDescriptor(tensor, list(self.shape), [self.pitch, 1], list(self.block))


class _Direct(NamedTuple):
    """A compiled kernel as `JITFunction.run` calls it, on one device.

    Triton 3.6 to 3.9 agree in this: ``run(*grid, stream, function, metadata, launch_metadata,
    enter_hook, exit_hook, *arguments)``, with an integer for the address of a pointer.
    """

    kernel: CompiledKernel  # kept, for Triton unloads what nobody has
    run: Any
    function: Any
    metadata: Any
    device: int
    templates: tuple[TensorDescriptor, ...]  # without their base


class Prepared:
    """A kernel with its grid, its options and all of its arguments but the tensors.

    Called with the tensors, or None for those that it does without, in the order of its
    parameters, of which they are the first. A tensor's dtype must be the same in every call, and
    so must be which of them are None and, where a `Box` describes one, its strides.

    Args:
        kernel: decorated with `triton.jit`.
        programs: the size of the grid.
        warps, stages: Triton's ``num_warps`` and ``num_stages``.
        arguments: every parameter of the kernel by name but the tensors.
        boxes: of the first tensors, those that the kernel takes as descriptors.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        warps: int,
        stages: int,
        arguments: Mapping[str, Any],
        boxes: tuple[Box, ...] = (),
    ) -> None:
        # Fused multiply-adds are said outright, because Triton is changing its default.
        self.options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
        self.kernel, self.programs, self.boxes = kernel, programs, boxes
        names = list(kernel.arg_names)
        count = len(names) - len(arguments)
        rest = names[count:]
        if set(rest) != set(arguments):
            wrong = ", ".join(sorted(set(rest) ^ set(arguments)))
            raise TypeError(f"{kernel.__name__}: missing, or not of its parameters: {wrong}")
        self.rest = tuple(arguments[name] for name in rest)
        self._direct: _Direct | None = None

    def __call__(self, *tensors: Tensor | None) -> None:
        """Launch on these tensors, which are on the current device, on the current stream."""
        direct = self._direct
        if direct is None or _recording.get() is not None or not undisturbed(self.kernel):
            self._launch(tensors)
            return
        low, arguments = 0, []
        for tensor in tensors:
            address = None if tensor is None else tensor.data_ptr()
            low |= address or 0
            arguments.append(address)
        if low % 16:
            self._launch(tensors)  # Triton has another kernel for these
            return
        for index, template in enumerate(direct.templates):
            arguments[index] = _over(template, tensors[index])
        stream = driver.active.get_current_stream(direct.device)
        direct.run(
            self.programs, 1, 1, stream, direct.function, direct.metadata, None, None, None,
            *arguments, *self.rest,
        )  # fmt: skip

    def _launch(self, tensors: tuple[Tensor | None, ...]) -> None:
        """By Triton's own way, from which the compiled kernel is kept."""
        first: list[Any] = list(tensors)
        for index, box in enumerate(self.boxes):
            first[index] = box.over(first[index])
        if is_recording():
            arguments = dict(zip(self.kernel.arg_names, (*first, *self.rest), strict=True))
            record(Launch(self.kernel, arguments, self.options))
            return
        compiled = self.kernel[(self.programs,)](*first, *self.rest, **self.options)
        if self._direct is None and undisturbed(self.kernel):
            self._direct = _direct(compiled, tensors, first[: len(self.boxes)])


def _over(descriptor: TensorDescriptor, tensor: Tensor | None) -> TensorDescriptor:
    """The same of another tensor, without asking again what held for the first."""
    other = TensorDescriptor.__new__(TensorDescriptor)
    other.__dict__.update(descriptor.__dict__)
    other.base = tensor
    return other


def undisturbed(kernel: Any) -> bool:
    """Whether nobody watches launches, or has Triton compile otherwise than it would by itself."""
    runtime, enter, leave = knobs.runtime, "launch_enter_hook", "launch_exit_hook"
    for hook in (getattr(runtime, enter), getattr(runtime, leave)):
        if getattr(hook, "calls", hook):  # a chain of them, one, or None
            return False
    return not (runtime.debug or runtime.add_stages_inspection_hook or kernel.pre_run_hooks)


def _direct(
    compiled: Any, tensors: tuple[Tensor | None, ...], described: list[TensorDescriptor]
) -> _Direct | None:
    """What to run from now on, None where Triton's own way is to be taken."""
    if not isinstance(compiled, CompiledKernel):
        return None  # the interpreter gives nothing
    if any(tensor is not None and tensor.data_ptr() % 16 for tensor in tensors):
        return None
    run = compiled.run
    if not _is_known(type(run)):  # type: ignore[arg-type]
        return None
    templates = tuple(_over(one, None) for one in described)
    device = driver.active.get_current_device()
    return _Direct(compiled, run, compiled.function, compiled.packed_metadata, device, templates)


_GRID = ("self", "gridX", "gridY", "gridZ", "stream", "function")
_HOOKS = ("kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook")


@functools.cache
def _is_known(launcher: Any) -> bool:
    """Whether it is called as `_Direct` says, as far as its signature tells."""
    names = tuple(inspect.signature(launcher.__call__).parameters)
    return names in ((*_GRID, "args"), (*_GRID, *_HOOKS, "args"))
