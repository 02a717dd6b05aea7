"""Adapters of one parameter that holds the weights of many experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import LayerConfig, check_rank
from ..linear.factors import DEFAULT, LoRA, factor_dtype
from ..linear.holder import ACTIVE, AdapterHolder
from ..linear.stacking import stack_adapters
from .autograd import lora_grouped_linear


class _Factor(nn.Module):
    """One factor of every expert, ``weight [G, out, in]``."""

    def __init__(self, shape: tuple[int, int, int], std: float, **factory: Any) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(shape, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.std:
            nn.init.normal_(self.weight, std=self.std)
        else:
            nn.init.zeros_(self.weight)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.weight.shape))


class GroupLoRA(LoRA):
    """The trained factors of every expert: ``A.weight [G, R, K]``, ``B.weight [G, N, R]``.

    They begin as `LoRA`'s do.
    """

    def __init__(
        self,
        groups: int,
        in_features: int,
        out_features: int,
        rank: int = 16,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.rank = check_rank(rank)
        factory = {"device": device, "dtype": dtype}
        self.A: Any = _Factor((groups, rank, in_features), 0.02, **factory)
        self.B: Any = _Factor((groups, out_features, rank), 0.0, **factory)

    def forward(self, x: Tensor) -> Tensor:
        raise TypeError("the factors of experts take rows with offsets, see LoRAParameter")


class LoRAParameter(AdapterHolder):
    """Adapters of the parameter ``name`` of ``owner``, a weight of every expert.

    The parameter stays the owner's, of which this is a child: what it holds itself are A and B.

    Args:
        owner: the module with the parameter, ``[G, N, K]``, or ``[G, K, N]`` if ``transposed``.
        name: of the parameter; a bias, where there is one, is called ``<name>_bias [G, N]``.
        config: of the first adapter, which is in use at once.
        transposed: how the parameter is stored.
        adapter: the adapter's name.
        lora_dtype: of A and B, see `factor_dtype`.
    """

    def __init__(
        self,
        owner: nn.Module,
        name: str,
        config: LayerConfig,
        *,
        transposed: bool = False,
        adapter: str = DEFAULT,
        lora_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.parameter_name, self.transposed = name, transposed
        self._owner = (owner,)  # in a tuple, where nn.Module takes it for no child of its own
        self._begin(adapter, config, lora_dtype)
        self.train(owner.training)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The owner's parameter as it is stored."""
        found: Tensor = getattr(self._owner[0], self.parameter_name)
        return found

    def _new_lora(self, config: LayerConfig, lora_dtype: torch.dtype | None) -> LoRA:
        weight = self.weight
        return new_group_lora(weight, self.transposed, config, lora_dtype, weight.device)

    def delta_weight(self) -> Tensor:
        """``Σ scale·B·A`` as the parameter is stored, see `AdapterHolder.delta_weight`."""
        if not self.adapters_in_use:
            return super().delta_weight()
        delta = super().delta_weight()
        return delta.mT if self.transposed else delta

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """``x [M, K]``, sorted by expert, to ``y [M, N]``, see `lora_grouped_linear`."""
        weight, bias = matrices(self._owner[0], self.parameter_name, self.transposed)
        branches: dict[float, list[tuple[Tensor, Tensor, float]]] = {}
        if self._lora_state == ACTIVE:
            for name, pair in self.pairs().items():
                dropout = self._lora_configs[name].dropout if self.training else 0.0
                branches.setdefault(dropout, []).append(pair)
        if not branches:
            return frozen(x, weight, offsets, bias)
        (dropout, pairs), *others = branches.items()
        y = _branch(x, weight, offsets, bias, pairs, dropout)
        for dropout, pairs in others:  # of adapters with dropouts of their own: the branch alone
            nothing = weight.new_zeros(()).expand(weight.shape)
            y = y + _branch(x, nothing, offsets, None, pairs, dropout)
        return y

    def extra_repr(self) -> str:
        return f"{self.parameter_name}, {self._repr_of_adapters()}"


def new_group_lora(
    weight: Tensor,
    transposed: bool,
    config: LayerConfig,
    lora_dtype: torch.dtype | None,
    device: Any,
) -> GroupLoRA:
    """Factors that fit a parameter of experts."""
    groups, n, k = weight.mT.shape if transposed else weight.shape
    dtype = factor_dtype(weight.dtype, lora_dtype)
    return GroupLoRA(groups, k, n, config.rank, device=device, dtype=dtype)


def matrices(owner: nn.Module, name: str, transposed: bool) -> tuple[Tensor, Tensor | None]:
    """The weights ``[G, N, K]`` and biases ``[G, N]`` of a parameter of experts."""
    weight = getattr(owner, name)
    return weight.mT if transposed else weight, getattr(owner, f"{name}_bias", None)


def frozen(x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None) -> Tensor:
    """``x·W_gᵀ + bias_g``: a branch of rank 1 that is zero costs next to nothing."""
    groups, n, k = weight.shape
    nothing = weight.new_zeros(())
    factors = nothing.expand(groups, 1, k), nothing.expand(groups, n, 1)
    return lora_grouped_linear(x, weight, *factors, offsets, bias)


def _branch(
    x: Tensor,
    weight: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    pairs: list[tuple[Tensor, Tensor, float]],
    dropout: float,
) -> Tensor:
    """`lora_grouped_linear` with adapters of one dropout, as one of their total rank."""
    lora_a, lora_b, scale = pairs[0]
    if len(pairs) > 1:
        (lora_a, lora_b), scale = stack_adapters(pairs), 1.0
    return lora_grouped_linear(
        x, weight, lora_a, lora_b, offsets, bias, scale=scale, dropout_p=dropout, training=True
    )
