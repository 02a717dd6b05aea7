"""`FastLinear`, PEFT's LoRA linear on these kernels. The only file that imports peft.

`accelerate` imports it when it is called, and unpickling an accelerated model does; both need peft
anyhow. The class adds no attribute of its own, so that turning a layer's ``__class__`` to it and
back is all there is to taking it and giving it back; `grouping` puts two there and takes them away.

The road not taken: a ``forward`` bound to each layer. Such a model cannot be pickled, and a deep
copy of it computes with the weights of the original.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from ..linear.autograd import lora_linear
from ..linear.module import DTYPES
from ..linear.stacking import stack_adapters

if not hasattr(Linear, "resolve_lora_variant"):
    raise ImportError("its lora.Linear has no variants")


def _own_forward(cls: type) -> Any:
    """The class's forward as its own file has it, or None where another has been put there."""
    forward, init = cls.__dict__.get("forward"), cls.__dict__.get("__init__")
    files = {getattr(getattr(f, "__code__", None), "co_filename", f) for f in (forward, init)}
    return forward if len(files) == 1 else None


# What the kernels stand in for. Whoever replaces one of them on the class wants to be called.
_FORWARDS = {cls: _own_forward(cls) for cls in (Linear, nn.Linear)}


class Parts(NamedTuple):
    """What `lora_linear` takes besides x."""

    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    bias: Tensor | None
    scale: float
    dropout_p: float
    training: bool


# Computed as plain LoRA; it differs in how it begins, and freezes B. Newer releases have it.
_MICA = getattr(variants, "MiCALinearVariant", None)


class _Branch(NamedTuple):
    lora_a: Tensor
    lora_b: Tensor
    scale: float
    dropout_p: float
    training: bool


_WATCHED = "a hook or a replaced forward sits on its base, factors or dropout"


class FastLinear(Linear):
    """``peft.tuners.lora.layer.Linear`` whose plain case is one `lora_linear`.

    Each call looks at the layer as it is then: its active adapter, scaling, dropout and dtypes.
    Several active adapters are one of a wider rank. What `lora_linear` does not compute goes to
    PEFT's own forward.
    """

    def _get_name(self) -> str:
        return "Linear"  # for PEFT's status, printing, and whoever asks by name

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x [..., K]`` to ``y [..., N]``, as PEFT's forward."""
        siblings = self.__dict__.get("_lora_siblings")
        if siblings is not None and not args and not kwargs:
            y: Tensor | None = siblings.serve(self, x)
            if y is not None:
                return y
        parts = "more arguments than x" if args or kwargs else self.parts()
        if isinstance(parts, str) or _input_refusal(x, parts, self.cast_input_dtype_enabled):
            return super().forward(x, *args, **kwargs)
        weight, lora_a, lora_b, bias, scale, dropout_p, training = parts
        return lora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            bias,
            scale=scale,
            dropout_p=dropout_p,
            training=training,
        )

    def group_part(self, x: Tensor) -> tuple[Any, ...] | None:
        """The same for a call together with other layers, see `LoRALinear.group_part`."""
        parts = self.parts()
        if isinstance(parts, str) or type(parts.lora_a) is not nn.Parameter:
            return None  # the latter is made anew in each call, of several adapters
        return None if _input_refusal(x, parts, self.cast_input_dtype_enabled) else tuple(parts)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        siblings = self.__dict__.get("_lora_siblings")
        if siblings is not None:
            siblings.join(self)

    def parts(self) -> Parts | str:
        """What a call would hand to `lora_linear`, or the reason why PEFT's forward serves it."""
        if self._disable_adapters:
            return "its adapters are disabled"
        if self.merged_adapters:
            return "an adapter is merged into its weight"
        if Linear.forward is not _FORWARDS[Linear] or nn.Linear.forward is not _FORWARDS[nn.Linear]:
            return "the forward of PEFT's lora.Linear or of nn.Linear was replaced on the class"
        # An adapter may be active in the model and absent here.
        names = [name for name in self.active_adapters if name in self.lora_A]
        if not names:
            return "none of its adapters is active"
        if reason := _base_refusal(self):
            return reason
        base: Any = self.base_layer
        if _is_watched(base):
            return _WATCHED
        if nn_module._has_any_global_hook():
            return "hooks on every module are registered with torch"
        if torch._C._are_functorch_transforms_active() or torch.jit.is_tracing():
            return "a torch.func transform or torch.jit.trace is at work"
        branches = []
        for name in names:
            branch = self._branch(name)
            if isinstance(branch, str):
                return branch
            if reason := _weights_refusal(base.weight, branch.lora_a, branch.lora_b, base.bias):
                return reason
            branches.append(branch)
        first = branches[0]
        lora_a, lora_b, scale = first.lora_a, first.lora_b, first.scale
        if len(branches) > 1:
            if any(branch.training and branch.dropout_p for branch in branches):
                return "several of its adapters are active, and each drops elements of its own"
            same = all(branch.scale == scale for branch in branches)
            lora_a, lora_b = stack_adapters(
                [(each.lora_a, each.lora_b, 1.0 if same else each.scale) for each in branches]
            )
            scale = scale if same else 1.0
        return Parts(base.weight, lora_a, lora_b, base.bias, scale, first.dropout_p, first.training)

    def _branch(self, name: str) -> _Branch | str:
        """One adapter's part of the sum, or the reason why `lora_linear` does not compute it."""
        variant = self.lora_variant.get(name)
        if variant is not None and type(variant) is not _MICA:
            return f"adapter {name!r} is not plain LoRA ({type(variant).__name__})"
        factor_a: Any = self.lora_A[name]
        factor_b: Any = self.lora_B[name]
        dropout: Any = self.lora_dropout[name]
        if type(factor_a) is not nn.Linear or type(factor_b) is not nn.Linear:
            return "its lora_A or lora_B is not exactly an nn.Linear"
        if factor_a.bias is not None or factor_b.bias is not None:
            return f"adapter {name!r} has a bias (lora_bias)"
        if any(_is_watched(module) for module in (factor_a, factor_b, dropout)):
            return _WATCHED
        dropout_p = 0.0
        if type(dropout) is nn.Dropout:
            dropout_p = dropout.p
            if dropout_p >= 1.0:
                return "its dropout drops everything"
        elif type(dropout) is not nn.Identity:
            return f"its dropout is a {type(dropout).__name__}"
        scale = self.scaling[name]
        if not isinstance(scale, (int, float)):
            return f"its scaling is a {type(scale).__name__}, not a number"
        return _Branch(factor_a.weight, factor_b.weight, scale, dropout_p, dropout.training)


def lasting_refusal(layer: BaseTunerLayer) -> str | None:
    """Why a layer of PEFT's is not to be made a `FastLinear`; None where it is to be."""
    if type(layer) is not Linear:
        return f"a {type(layer).__module__}.{type(layer).__name__}, not exactly PEFT's lora.Linear"
    if "forward" in layer.__dict__:
        return "its forward was replaced, by an offloading hook, say; accelerate first, then hook"
    return _base_refusal(layer)


def _base_refusal(layer: Linear) -> str | None:
    if layer.fan_in_fan_out:
        return "its weight is transposed (fan_in_fan_out)"
    if type(layer.base_layer) is not nn.Linear:
        return f"its base is a {type(layer.base_layer).__name__}, not exactly an nn.Linear"
    return None


def _is_watched(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _weights_refusal(
    weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None
) -> str | None:
    for tensor in (weight, lora_a, lora_b) if bias is None else (weight, lora_a, lora_b, bias):
        if type(tensor) is not nn.Parameter and type(tensor) is not Tensor:
            return f"a weight of it is a {type(tensor).__name__}, not an ordinary tensor"
        if tensor.dtype not in DTYPES:
            return f"a weight of it is {tensor.dtype}"
        if tensor.device != weight.device or tensor.is_meta:
            return "its weights are on the meta device, or on several devices"
    if weight.dim() != 2 or (bias is not None and bias.dtype != weight.dtype):
        return "its weight and bias are not those of an nn.Linear"
    rank = lora_a.shape[0]
    if lora_a.shape != (rank, weight.shape[1]) or lora_b.shape != (weight.shape[0], rank):
        return "its lora_A and lora_B do not fit its weight"
    return None


def _input_refusal(x: Tensor, parts: Parts, casting: bool) -> str | None:
    weight, lora_a, lora_b = parts[:3]
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided or x.is_nested:
        return "x is not an ordinary tensor"
    if x.dim() < 1 or x.shape[-1] != weight.shape[1] or x.device != weight.device:
        return "x does not fit the weight"  # PEFT's forward raises as ever
    if x.dtype not in DTYPES:
        return f"x is {x.dtype}"
    if torch.is_autocast_enabled(x.device.type):
        if torch.float64 in (x.dtype, weight.dtype, lora_a.dtype, lora_b.dtype):
            return "autocast leaves float64 alone"
    elif x.dtype != weight.dtype or lora_a.dtype != lora_b.dtype:
        return "the dtypes differ"
    elif x.dtype != lora_a.dtype and not casting:
        return "PEFT's casting of the input is switched off"
    return None
