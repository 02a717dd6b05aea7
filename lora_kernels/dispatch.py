"""Which implementation serves a call, and why. Policy only: no kernel is imported here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .per_thread import PerThread

__all__ = ["Choice", "choose", "explain", "is_named", "multiplies_by_itself", "use_backend"]

BACKENDS = ("triton", "reference")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LEAST_CAPABILITY = (8, 0)
MOST_RANK = 512
_PLAIN = (Tensor, nn.Parameter)
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None

# What `use_backend` asked for, None outside of it.
_asked: PerThread[str | None] = PerThread("backend", None)


class Choice(NamedTuple):
    """An implementation and the reason it was taken.

    Attributes:
        backend: of `BACKENDS`.
        reason: in words.
        widened: the reference takes its products in float32 although x is narrower.
    """

    backend: str
    reason: str
    widened: bool = False


def _no_cuda(device_type: str) -> str:
    return f"x is on {device_type}, the kernels run on cuda"


_ON_CPU = Choice("reference", _no_cuda("cpu"))
_ASKED_FOR = Choice("reference", "asked for by use_backend")


def choose(
    x: Tensor,
    weight: Tensor | None = None,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    bias: Tensor | None = None,
) -> Choice:
    """The implementation for a call on these tensors, looked at anew in each call.

    Devices, dtypes and the rank decide; the number of rows does not, so that a compiled graph
    serves every batch.

    Raises:
        RuntimeError: `use_backend` named one that cannot serve this call.
    """
    if weight is not None and type(weight) not in _PLAIN and multiplies_by_itself(type(weight)):
        return _by_itself(type(weight).__name__)
    asked_for = _asked.get()
    if asked_for == "reference":
        return _on_cpu(_ASKED_FOR, x)
    if asked_for is None and not x.is_cuda:
        return _on_cpu(_ON_CPU, x) if x.is_cpu else Choice("reference", _no_cuda(x.device.type))
    tensors = [t for t in (x, weight, lora_a, lora_b, bias) if t is not None]
    rank = None if lora_a is None else lora_a.shape[0]
    refusal = _device_refusal(x.device.type, x.device.index) or _tensor_refusal(tensors, rank)
    if asked_for == "triton":
        if refusal:
            _refuse(refusal)
        return Choice("triton", "asked for by use_backend")
    if refusal:
        return Choice("reference", refusal)
    return Choice("triton", f"the kernels serve {x.dtype} on {x.device}")


def _refuse(refusal: str) -> None:
    raise RuntimeError(
        f"use_backend('triton') was asked for, but Triton cannot serve this call: {refusal}. "
        "Leave the `with`, or ask for 'reference'."
    )


def multiplies_by_itself(kind: type) -> bool:
    """Whether a weight of this class knows products of its own, as torchao's quantised ones do.

    Classes of torch's own are served as tensors are.
    """
    own = kind.__torch_dispatch__ is not Tensor.__torch_dispatch__  # type: ignore[attr-defined]
    return own and not kind.__module__.startswith("torch.")


def _by_itself(kind: str) -> Choice:
    reason = f"the weight is a {kind}, which multiplies by itself"
    if _asked.get() == "triton":
        _refuse(reason)
    return Choice("reference", reason)


def asked() -> str | None:
    """What `use_backend` asked for on this thread, to be compared."""
    return _asked.get()


def is_named() -> bool:
    """Whether `use_backend` asked for a backend, which then serves the call or nothing does."""
    return _asked.get() is not None


def _on_cpu(choice: Choice, x: Tensor) -> Choice:
    """The reference, with its products in float32 on a CPU without instructions for x's dtype.

    There torch multiplies it an element at a time: on two cores with AVX2 dx of MiniMind's layers
    took 50 to 100 times as long as by way of float32, the two conversions included.
    """
    if x.dtype not in _NARROW_SUPPORT or not x.is_cpu or _cpu_multiplies(x.dtype):
        return choice
    also = f"products in float32, since this CPU is slow to multiply {x.dtype}"
    return Choice("reference", f"{choice.reason}; {also}", widened=True)


# torch's own questions before it hands a product to oneDNN.
_NARROW_SUPPORT = {
    torch.bfloat16: "_is_mkldnn_bf16_supported",
    torch.float16: "_is_mkldnn_fp16_supported",
}


@functools.cache
def _supported(dtype: torch.dtype) -> bool:
    ask = getattr(torch.ops.mkldnn, _NARROW_SUPPORT[dtype], None)  # absent without oneDNN
    return ask is not None and bool(ask())


def _cpu_multiplies(dtype: torch.dtype) -> bool:
    return _supported(dtype)  # apart, because a tracer takes the function behind a cache


def _device_refusal(device_type: str, index: int | None) -> str:
    """Why Triton does not run on this device, empty where it does."""
    if device_type == "cpu" and _interpreting():
        return ""
    if device_type != "cuda":
        return _no_cuda(device_type)
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if torch.version.hip:
        return "this torch is built for ROCm, the kernels are for NVIDIA GPUs"
    capability = capability_of(index)
    if capability < LEAST_CAPABILITY:
        return (
            f"the GPU's compute capability is {capability[0]}.{capability[1]}, "
            f"the kernels need {LEAST_CAPABILITY[0]}.{LEAST_CAPABILITY[1]}"
        )
    return ""


@functools.cache
def capability_of(index: int | None) -> tuple[int, int]:
    """The compute capability of a GPU, asked of the driver once."""
    return torch.cuda.get_device_capability(index)


# A tracer takes the answer as it is: the device is a constant, and imports cannot be traced. This
# is all that torch.compiler.assume_constant_result does, but that imports the whole compiler.
_device_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]
_cpu_multiplies._dynamo_marked_constant = True  # type: ignore[attr-defined]
multiplies_by_itself._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _tensor_refusal(tensors: list[Tensor], rank: int | None) -> str:
    """Why the kernels do not take these tensors, empty where they do."""
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            return f"a tensor is {tensor.dtype}, the kernels take float32, float16 and bfloat16"
        if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
            return f"a tensor is a {type(tensor).__name__}, the kernels take plain tensors"
    if rank is not None and rank > MOST_RANK:
        return f"the rank is {rank}, the kernels take up to {MOST_RANK}"
    return ""


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter, which takes CPU tensors."""
    return TRITON_INSTALLED and importlib.import_module("triton").knobs.runtime.interpret


@contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Take ``"triton"`` or ``"reference"`` for every call inside the ``with``, in this thread.

    Other threads go on as they were; one that this starts has to ask for itself. A backward goes
    the way of its forward.

    What is asked for by name never falls back: a call that the backend cannot serve raises
    RuntimeError with the reason.

    Raises:
        ValueError: an unknown name.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
    with _asked.set(backend):
        yield


def explain(module_or_tensors: nn.Module | Tensor | tuple[Any, ...] | list[Any]) -> str:
    """Say which path a call would take and why, as ``"<backend>: <reason>"``.

    Where `use_backend` asked for what cannot serve the call, the backend is ``none``. Of a model it
    says, too, which layers are computed together.

    Args:
        module_or_tensors: a module (its first floating-point parameter stands for its input), a
            tensor, or the arguments of `lora_linear` in order, beginning with x.

    Raises:
        TypeError: anything else.
        ValueError: a module without floating-point parameters.
    """
    if isinstance(module_or_tensors, nn.Module):
        tensors: list[Any] = _tensors_of(module_or_tensors)
        if not tensors:
            return "reference: no adapter is in use, torch's own linear is called"
    elif isinstance(module_or_tensors, (tuple, list)) and module_or_tensors:
        tensors = list(module_or_tensors)
    else:
        tensors = [module_or_tensors]
    if not all(isinstance(t, torch.Tensor) or (i and t is None) for i, t in enumerate(tensors)):
        came = ", ".join(type(t).__name__ for t in tensors)
        raise TypeError(
            f"module_or_tensors must be a module, a tensor or a tuple of tensors, got {came}"
        )
    try:
        choice = choose(*tensors[:5])
    except RuntimeError as refusal:
        return f"none: {refusal}"
    said = together(module_or_tensors) if isinstance(module_or_tensors, nn.Module) else ""
    path = f"{choice.backend}: {choice.reason}"
    return f"{path}; computed together where they read one tensor: {said}" if said else path


def together(model: nn.Module) -> str:
    """Which layers of a model are computed together, by the last parts of their names."""
    names = {id(module): name for name, module in model.named_modules()}
    groups = {id(s): s for m in model.modules() if (s := getattr(m, "_lora_siblings", None))}
    counts: dict[str, int] = {}
    for group in groups.values():
        known = [names[id(layer)] for layer in group.layers() if id(layer) in names]
        if len(known) > 1:
            members = " + ".join(name.rpartition(".")[2] for name in known)
            counts[members] = counts.get(members, 0) + 1
    whole = sum("_lora_base" in type(module).__dict__ for module in model.modules())
    said = [f"{members} ({n} times)" for members, n in counts.items()]
    return ", ".join(said + [f"feed-forward as a whole ({whole} times)"] * bool(whole))


def _tensors_of(module: nn.Module) -> list[Any]:
    """Stand-ins for a call's arguments: the weight for x, and A and B where the module has them.

    Nothing of a LoRALinear without an adapter in use.
    """
    floating = next((p for p in module.parameters() if p.is_floating_point()), None)
    if floating is None:
        raise ValueError(
            f"{type(module).__name__} has no floating-point parameter to judge by; "
            "pass the input tensor instead"
        )
    factors = getattr(module, "lora_factors", None)
    if callable(factors):
        pair = factors()
        return [module.weight, module.weight, *pair] if pair else []
    return [floating]
