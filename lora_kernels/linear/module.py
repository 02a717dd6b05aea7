"""`LoRA`, the pair of factors, and `LoRALinear`, the drop-in for ``nn.Linear``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LayerConfig, check_rank
from .autograd import lora_linear

# What a LoRALinear computes: the sum, the base alone (inside `disable_lora`), or the base into
# which the branch has been folded (inside `merged_lora`).
ACTIVE, DISABLED, MERGED = "active", "disabled", "merged"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class _Factor(nn.Linear):
    """A bias-free linear that keeps LoRA's initialisation when it is reset.

    torch's meta-device initialisers call `reset_parameters` on every module, children last, which
    would make B non-zero.
    """

    def __init__(self, in_features: int, out_features: int, std: float, **factory: Any) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=False, **factory)

    def reset_parameters(self) -> None:
        if self.std:
            nn.init.normal_(self.weight, std=self.std)
        else:
            nn.init.zeros_(self.weight)

    def _get_name(self) -> str:
        return "Linear"


class LoRA(nn.Module):
    """The trained factors: ``B(A(x))``, with A ~ N(0, 0.02²) and B = 0.

    Args:
        in_features: K.
        out_features: N.
        rank: R, at least 1. ``A.weight`` is ``[R, K]``, ``B.weight`` is ``[N, R]``.
        device, dtype: as for ``nn.Linear``.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 16,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank = check_rank(rank)
        self.A = _Factor(in_features, rank, std=0.02, device=device, dtype=dtype)
        self.B = _Factor(rank, out_features, std=0.0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` to ``[..., N]``, without scale or dropout."""
        return self.B(self.A(x))


class LoRALinear(nn.Linear):
    """``nn.Linear`` with a LoRA branch: ``x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ + bias``.

    State-dict keys are ``weight``, ``bias``, ``lora.A.weight``, ``lora.B.weight``: checkpoints of
    the plain linear load with ``strict=False`` or before the swap. Nothing is frozen here, see
    `mark_only_lora_as_trainable`. Hooks on ``lora.A`` and ``lora.B`` do not run: the four tensors
    go to `lora_linear` together. Nor does a forward that somebody has put on ``nn.Linear`` as a
    class: this one is its own, as any subclass's.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``.
        rank: R, at least 1.
        alpha: numerator of the scale; ``None`` means scale 1.
        dropout: probability in [0, 1) of dropping elements of the branch's input in training.
        use_rslora: scale by ``alpha / sqrt(rank)``.

    Raises:
        TypeError, ValueError: as `LayerConfig`.
    """

    lora: LoRA

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
    ) -> None:
        config = LayerConfig(rank, alpha, dropout, use_rslora)
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._add_lora(config)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        rank: int = 16,
        *,
        alpha: float | None = None,
        dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> LoRALinear:
        """A LoRALinear that shares ``linear``'s parameters, hooks and mode; nothing is copied.

        A and B are made in the weight's dtype, on its device.

        Raises:
            TypeError: ``linear`` is not exactly an ``nn.Linear``, its forward was replaced, or its
                weight is computed or not of a dtype in `DTYPES`.
            ValueError: rank, alpha or dropout out of range.
        """
        config = LayerConfig(rank, alpha, dropout, use_rslora)
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
        module._add_lora(config)
        return module

    def to_linear(self) -> nn.Linear:
        """The plain ``nn.Linear`` that shares this module's weight, bias, hooks and mode."""
        linear = nn.Linear.__new__(nn.Linear)
        linear.__dict__.update(_own_copy(self))
        for name in ("_lora_config", "_lora_scale", "_lora_dropout", "_lora_state"):
            del linear.__dict__[name]
        del linear._modules["lora"]
        return linear

    def _add_lora(self, config: LayerConfig) -> None:
        self._lora_config = config
        self._lora_scale, self._lora_dropout = config.scale, config.dropout
        self._lora_state = ACTIVE
        weight = self.weight
        self.lora = LoRA(
            self.in_features,
            self.out_features,
            config.rank,
            device=weight.device,
            dtype=weight.dtype,
        )
        self.lora.train(self.training)

    @property
    def lora_config(self) -> LayerConfig:
        """Rank, alpha, dropout and rsLoRA of this layer."""
        return self._lora_config

    @property
    def rank(self) -> int:
        """R."""
        return self._lora_config.rank

    @property
    def alpha(self) -> float | None:
        """Numerator of the scale, None for scale 1."""
        return self._lora_config.alpha

    @property
    def scale(self) -> float:
        """Factor on the LoRA branch."""
        return self._lora_scale

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of the branch's input in training."""
        return self._lora_config.dropout

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` to ``y [..., N]``, see `lora_linear`."""
        if self._lora_state != ACTIVE:
            return F.linear(x, self.weight, self.bias)
        # By the dictionaries: getattr takes a module several times as long, and it shows on a CPU.
        lora = self._modules["lora"]._modules  # type: ignore[union-attr]
        weight: Any
        try:
            weight, bias = self._parameters["weight"], self._parameters["bias"]
            lora_a: Any = lora["A"]._parameters["weight"]  # type: ignore[union-attr]
            lora_b: Any = lora["B"]._parameters["weight"]  # type: ignore[union-attr]
        except KeyError:  # what is computed, or put in place by FSDP for the length of a call
            weight, bias = self.weight, self.bias
            lora_a, lora_b = self.lora.A.weight, self.lora.B.weight
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

    def delta_weight(self) -> Tensor:
        """``scale·B·A [N, K]``, in float32 or wider: what merging adds to the weight."""
        factor_a, factor_b = self.lora.A.weight.detach(), self.lora.B.weight.detach()
        wide = torch.promote_types(factor_a.dtype, torch.float32)
        return (factor_b.to(wide) @ factor_a.to(wide)).mul_(self.scale)

    def __getstate__(self) -> dict[str, Any]:
        # A copy taken inside `disable_lora` or `merged_lora` has no block that would end for it.
        if self._lora_state == MERGED:
            raise RuntimeError("cannot copy or pickle inside merged_lora; leave the block first")
        return {**self.__dict__, "_lora_state": ACTIVE}

    def extra_repr(self) -> str:
        text = f"{super().extra_repr()}, rank={self.rank}, scale={self.scale:g}"
        if self.dropout:
            text += f", dropout={self.dropout:g}"
        return text if self._lora_state == ACTIVE else f"{text}, {self._lora_state}"


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
