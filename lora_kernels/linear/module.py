"""`LoRALinear`, the drop-in for ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LayerConfig
from .autograd import lora_linear
from .factors import DEFAULT, DTYPES, LoRA, check_adapter_name, factor_dtype
from .holder import ACTIVE, AdapterHolder
from .stacking import stack_adapters


class LoRALinear(AdapterHolder, nn.Linear):
    """``nn.Linear`` with LoRA branches: ``x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ + bias``.

    State-dict keys are ``weight``, ``bias``, ``lora.A.weight``, ``lora.B.weight``: checkpoints of
    the plain linear load with ``strict=False`` or before the swap. Nothing is frozen here, see
    `mark_only_lora_as_trainable`. Hooks on ``lora.A`` and ``lora.B`` do not run: the four tensors
    go to `lora_linear` together. Nor does a forward that somebody has put on ``nn.Linear`` as a
    class: this one is its own, as any subclass's.

    A layer may carry several adapters by name. ``lora`` is the one called ``"default"`` (None on a
    layer that has only others); others are in ``loras``, with keys ``loras.<name>.A.weight``. Which
    of them are computed, `use_lora` says for a model and `use_adapters` for a layer. Several in use
    go to the kernels as one of their total rank. In training each has its own dropout; those of
    equal probability share one mask.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: R, at least 1.
        alpha: numerator of the scale; ``None`` means scale 1.
        dropout: probability in [0, 1) of dropping elements of the branch's input in training.
        use_rslora: scale by ``alpha / sqrt(rank)``.
        lora_dtype: of A and B; by default the weight's, or float32 if that has 16 bits.

    Raises:
        TypeError, ValueError: as `LayerConfig` and `factor_dtype`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        rank: int = 16,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        config = LayerConfig(rank, alpha, dropout, use_rslora)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._begin(DEFAULT, config, lora_dtype)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 16,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
        name: str = DEFAULT,
        lora_dtype: torch.dtype | None = None,
    ) -> LoRALinear:
        """A LoRALinear that shares ``linear``'s parameters, hooks and mode; nothing is copied.

        A and B are made on the weight's device, in the dtype that `factor_dtype` gives;
        ``name`` is the adapter's.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``, its forward was replaced, its
                weight is computed or not of a dtype in `DTYPES`, or ``lora_dtype`` is not.
            ValueError: rank, alpha or dropout out of range, or see `check_adapter_name`.
        """
        config = LayerConfig(rank, alpha, dropout, use_rslora)
        check_adapter_name(name)
        factor_dtype(torch.float32, lora_dtype)
        if type(linear) is not nn.Linear:
            raise TypeError(
                f"linear must be exactly an nn.Linear, got {type(linear).__name__}; a subclass may "
                "compute something else, which LoRA would silently drop"
            )
        if "forward" in linear.__dict__:
            raise TypeError(
                "linear.forward has been replaced on this instance (by an offloading hook, say), "
                "and LoRA would be bypassed; apply LoRA first, then hook"
            )
        if linear._parameters.get("weight") is None:
            raise TypeError(
                "linear.weight is not a parameter but computed (by pruning or weight_norm, say); "
                "make it permanent first"
            )
        if linear.weight.dtype not in DTYPES:
            raise TypeError(
                f"linear.weight must be one of {', '.join(map(str, DTYPES))}, got "
                f"{linear.weight.dtype}; quantised weights are not supported"
            )
        module = cls.__new__(cls)
        module.__dict__.update(_own_copy(linear))
        module._begin(name, config, lora_dtype)
        return module

    def to_linear(self) -> nn.Linear:
        """The plain ``nn.Linear`` that shares this module's weight, bias, hooks and mode."""
        linear = nn.Linear.__new__(nn.Linear)
        linear.__dict__.update(_own_copy(self))
        for name in [name for name in linear.__dict__ if name in _OWN]:
            del linear.__dict__[name]
        for name in ("lora", "loras"):
            linear._modules.pop(name, None)
        return linear

    def _new_lora(self, config: LayerConfig, lora_dtype: torch.dtype | None) -> LoRA:
        weight = self.weight
        return LoRA(
            self.in_features,
            self.out_features,
            config.rank,
            device=weight.device,
            dtype=factor_dtype(weight.dtype, lora_dtype),
        )

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` to ``y [..., N]``, see `lora_linear`."""
        if self._lora_state != ACTIVE:
            return F.linear(x, self.weight, self.bias)
        rows = self.__dict__.get("_lora_rows")
        if rows is not None:
            by_rows: Tensor = rows.serve(self, x)
            return by_rows
        siblings = self.__dict__.get("_lora_siblings")
        if siblings is not None:
            y: Tensor | None = siblings.serve(self, x)
            if y is not None:
                return y
        if self._lora_one is None:
            return self._forward_several(x)
        weight, lora_a, lora_b, bias = self._one_branch(self._lora_one)
        return lora_linear(
            x,
            weight,
            lora_a,
            lora_b,
            bias,
            scale=self._lora_scale,
            dropout_p=self._lora_dropout,
            training=self.training,
        )

    def _one_branch(self, name: str) -> tuple[Any, Any, Any, Any]:
        """weight, A, B and bias with this adapter alone."""
        # By the dictionaries: getattr takes a module several times as long, and it shows on a CPU.
        modules: Any = self._modules
        lora = modules["lora"] if name == DEFAULT else modules["loras"]._modules[name]
        factors = lora._modules
        weight: Any
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            lora_a = factors["A"]._parameters["weight"]
            lora_b = factors["B"]._parameters["weight"]
        except KeyError:  # what is computed, or put in place by FSDP for the length of a call
            weight, bias = self.weight, self.bias
            lora_a, lora_b = lora.A.weight, lora.B.weight
        return weight, lora_a, lora_b, bias

    def _forward_several(self, x: Tensor) -> Tensor:
        """All branches of one dropout are one of a wider rank, and go with the base's product."""
        groups: dict[float, list[tuple[Tensor, Tensor, float]]] = {}
        for name, pair in self.pairs().items():
            dropout = self._lora_configs[name].dropout if self.training else 0.0
            groups.setdefault(dropout, []).append(pair)
        if not groups:
            return F.linear(x, self.weight, self.bias)
        (dropout, pairs), *others = groups.items()
        lora_a, lora_b = stack_adapters(pairs)
        y = lora_linear(
            x,
            self.weight,
            lora_a,
            lora_b,
            self.bias,
            dropout_p=dropout,
            training=self.training,
        )
        for dropout, pairs in others:
            lora_a, lora_b = (factor.to(x.dtype) for factor in stack_adapters(pairs))
            y = y + F.linear(F.linear(F.dropout(x, dropout), lora_a), lora_b)
        return y

    def group_part(self, x: Tensor) -> tuple[Any, ...] | None:
        """weight, A, B, bias, scale, dropout and mode, for a call together with other layers; None
        where not exactly one adapter is computed, the same for all rows."""
        if self._lora_state != ACTIVE or self._lora_one is None or "_lora_rows" in self.__dict__:
            return None
        branch = self._one_branch(self._lora_one)
        return *branch, self._lora_scale, self._lora_dropout, self.training

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        siblings = self.__dict__.get("_lora_siblings")
        if siblings is not None:
            siblings.join(self)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._repr_of_adapters()}"


# What a LoRALinear has and an nn.Linear has not.
_OWN = (
    "_lora_active",
    "_lora_backup",
    "_lora_blocks",
    "_lora_configs",
    "_lora_dropout",
    "_lora_one",
    "_lora_scale",
    "_lora_rows",
    "_lora_siblings",
    "_lora_slot",
    "_lora_state",
    "_lora_together",
)


def _own_copy(module: nn.Module) -> dict[str, Any]:
    """The module's attributes, its registries of parameters and children copied one level deep.

    The dictionaries of hooks are shared on purpose: a handle taken on the old module then removes
    its hook from the new one.
    """
    state = dict(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        state[registry] = dict(state[registry])
    state.pop("_compiled_call_impl", None)  # of `module.compile()`: it would call the old module
    return state
