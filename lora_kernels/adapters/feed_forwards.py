"""Find the gated feed-forwards of a model, and have each computed as a whole.

A module of which the form is known is turned to a subclass of its own class whose forward is one
`lora_feed_forward`, where that computes what the module's own forward would; each call looks anew.

The road not taken: a ``forward`` bound to each module. Such a model cannot be pickled, and a deep
copy of it computes with the weights of the original.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..group.feed_forward import lora_feed_forward
from ..group.siblings import is_worth_it
from .feed_forward_form import Form, child_name, form_of, valued

# By module and name of the class, for what need not be imported.
_ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
    "transformers.activations.GELUTanh": "gelu_tanh",
    "transformers.activations.PytorchGELUTanh": "gelu_tanh",
    "transformers.activations.NewGELUActivation": "gelu_tanh",
}
_PLAIN_TYPES = (Tensor, nn.Parameter)


class Part(NamedTuple):
    """What one projection gives to the call; A and B are None without LoRA."""

    weight: Tensor
    lora_a: Tensor | None
    lora_b: Tensor | None
    bias: Tensor | None
    scale: float
    dropout_p: float
    training: bool


def feed_forwards(model: nn.Module) -> list[str]:
    """Names of the modules that `fuse_feed_forwards` computes as a whole, in module order.

    Their forward is ``down(act(gate(x)) * up(x))`` with SiLU or GELU, by its source; gate, up and
    down are linears, of which at least one has LoRA.
    """
    return [name for name, module in model.named_modules() if _is_one(module)]


def fuse_feed_forwards(model: nn.Module, devices: tuple[str, ...] | None = None) -> list[str]:
    """Compute each of `feed_forwards` as a whole from now on, in place; gives their names.

    With ``devices`` only on devices of these types, and on a CPU only with many rows.

    For backward only gate and up are kept of what has the hidden width; gate and up share one
    dropout mask. Parameters, names and printing stay as they are, and so do copies and pickles.
    Where a call cannot be made as a whole the module's own forward serves it: a hook or replaced
    forward on a child, several adapters or none in use, merged, unlike dropout, weights that are
    sharded or quantised ….
    """
    modules = dict(model.named_modules())
    names = feed_forwards(model)
    for name in names:
        module = modules[name]
        if not isinstance(module, _Whole):
            module.__class__ = _whole_class(type(module))  # type: ignore[arg-type]
        module.__dict__["_lora_devices"] = devices
    return names


def part_feed_forwards(model: nn.Module) -> None:
    """Undo `fuse_feed_forwards`: each module has its own class and forward again."""
    for module in model.modules():
        kind: Any = type(module)
        if "_lora_base" in kind.__dict__:  # and not a class that somebody has derived of ours
            module.__class__ = kind._lora_base
            module.__dict__.pop("_lora_devices", None)


class _Whole(nn.Module):
    """What a module's class becomes a subclass of, before its own; see `_whole_class`."""

    _lora_base: Any
    _lora_forward: Any  # the base's, of which the form is known
    _lora_form: Form

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """``x [..., K]`` to ``y [..., N]``, as the module's own forward."""
        call = None if args or kwargs else self._lora_call(x)
        if call is None:
            return super().forward(x, *args, **kwargs)
        parts, activation, dropout_p = call
        weights, lora_as, lora_bs, biases, scales, _, _ = zip(*parts, strict=True)
        return lora_feed_forward(
            x,
            weights,
            lora_as,
            lora_bs,
            biases,
            scales=scales,
            activation=activation,
            dropout_p=dropout_p,
            training=True,
        )

    def _lora_call(self, x: Tensor) -> tuple[list[Part], str, float] | None:
        """What a call would hand to `lora_feed_forward`; None where the own forward serves it."""
        if self._lora_base.forward is not self._lora_forward or type(x) not in _PLAIN_TYPES:
            return None
        if x.dim() == 0 or not is_worth_it(x, self.__dict__.get("_lora_devices")):
            return None
        if nn_module._has_any_global_hook() or torch.jit.is_tracing():
            return None
        activation = _activation(self, self._lora_form)
        children = _children(self, self._lora_form)
        if activation is None or children is None:
            return None
        parts: list[Part] = []
        into = x
        for child in children:
            if len(parts) == 2:  # down, which gets something of the hidden width
                into = x.new_empty(()).expand(parts[0].weight.shape[0])
            part = part_of(child, into)
            if part is None:
                return None
            parts.append(part)
        drops = {
            part.dropout_p if part.training else 0.0 for part in parts if part.lora_a is not None
        }
        if len(drops) != 1 or not _fit(parts, x):  # without LoRA there are none
            return None
        return parts, activation, drops.pop()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """The base's own was called for the base; this is no class that somebody has written."""

    def _get_name(self) -> str:
        return self._lora_base.__name__

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made when it is needed, and no pickle could name it.
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        _, (_, *arguments), *rest = reduced
        return (_anew, (self._lora_base, *arguments), *rest)


@functools.cache
def _whole_class(base: Any) -> type[nn.Module]:
    """The subclass of a class of known form, under the same name."""
    attributes = {
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "_lora_base": base,
        "_lora_forward": staticmethod(base.forward),
        "_lora_form": form_of(base.forward),
    }
    return type(base.__name__, (_Whole, base), attributes)


def _anew(base: Any, *arguments: Any) -> nn.Module:
    """An empty module for unpickling: of the whole class, or of its own where this has changed."""
    kind = base if form_of(base.forward) is None else _whole_class(base)
    return kind.__new__(kind, *arguments)


def _is_one(module: nn.Module) -> bool:
    kind: Any = type(module)
    form = kind._lora_form if isinstance(module, _Whole) else form_of(kind.forward)
    if form is None or "forward" in module.__dict__ or kind.__call__ is not nn.Module.__call__:
        return False
    children = _children(module, form)
    if children is None or _activation(module, form) is None:
        return False
    kinds: list[Any] = [type(child) for child in children]
    lora = [_gives_parts(kind) for kind in kinds]
    return any(lora) and all(one or k is nn.Linear for one, k in zip(lora, kinds, strict=True))


def _children(module: nn.Module, form: Form) -> list[nn.Module] | None:
    """gate, up and down, if they are children, each by its own name and not watched."""
    found: list[nn.Module] = []
    for term in form[:3]:
        name = child_name(term, module)
        child = None if name is None else module._modules[name]
        if child is None or _is_watched(child):
            return None
        found.append(child)
    return found if len({id(child) for child in found}) == 3 else None


def _activation(module: nn.Module, form: Form) -> str | None:
    """Which of `activations.ACTIVATIONS` the module has, None for any other."""
    act = valued(form.activation, module)
    if act is F.silu:
        return "silu"
    if act is F.gelu:
        return "gelu"
    if not isinstance(act, nn.Module) or _is_watched(act):
        return None
    kind = type(act)
    if isinstance(act, nn.GELU) and kind is nn.GELU:
        return "gelu_tanh" if act.approximate == "tanh" else "gelu"
    return _ACTIVATIONS.get(f"{kind.__module__}.{kind.__qualname__}")


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _gives_parts(kind: type) -> bool:
    """Whether layers of a class tell, by ``group_part``, what their forward computes with."""
    return _owns_both(kind)


@functools.cache
def _owns_both(kind: Any) -> bool:
    owner = next((k for k in kind.__mro__ if "group_part" in k.__dict__), None)
    return owner is not None and next(k for k in kind.__mro__ if "forward" in k.__dict__) is owner


# To a tracer the answer is a constant; it would look behind the cache, and warn.
_gives_parts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def part_of(layer: nn.Module, x: Tensor) -> Part | None:
    """What a linear gives to a call with x, None where its own forward is to be called."""
    kind: Any = type(layer)
    if kind is nn.Linear:
        if kind.forward is not _LINEAR_FORWARD:
            return None
        weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
        return None if weight is None else Part(weight, None, None, bias, 1.0, 0.0, False)
    if not _gives_parts(kind):
        return None
    given = layer.group_part(x)  # type: ignore[operator]
    return None if given is None else Part(*given)


_LINEAR_FORWARD = nn.Linear.forward


def _fit(parts: list[Part], x: Tensor) -> bool:
    """Whether all tensors are there, plain ones of the right sizes, on x's device."""
    if x.dim() == 0 or x.layout != torch.strided or x.is_nested:
        return False
    gate, up, down = (part.weight for part in parts)
    if not (gate.dim() == down.dim() == 2 and gate.shape == up.shape):
        return False
    if gate.shape[1] != x.shape[-1] or down.shape[1] != gate.shape[0]:
        return False
    casting = torch.is_autocast_enabled(x.device.type)
    for part in parts:
        for tensor in part[:4]:
            if tensor is not None and (
                type(tensor) not in _PLAIN_TYPES or tensor.device != x.device or tensor.is_meta
            ):
                return False
        if not casting and part.weight.dtype != x.dtype:
            return False
    return True
