"""What a layer that carries adapters has in common with every other such layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..config import LayerConfig, check_dropout
from .factors import DEFAULT, LoRA, check_adapter_name
from .stacking import stack_adapters

# What a layer computes: the sum, the base alone (inside `disable_lora`), or the base into which
# the branch has been folded (inside `merged_lora`).
ACTIVE, DISABLED, MERGED = "active", "disabled", "merged"


class AdapterHolder(nn.Module):
    """A module with adapters by name over one weight: which there are, and which are computed.

    ``lora`` is the one called ``"default"`` (None where there are only others); others are in
    ``loras``, with keys ``loras.<name>.A.weight``.
    """

    lora: LoRA
    loras: nn.ModuleDict
    weight: Any
    # The blocks of `disable_lora` or `merged_lora` that it is inside of, in all threads, and what
    # the last of the latter brings back.
    _lora_blocks: int = 0
    _lora_backup: Tensor | None = None

    def _begin(self, name: str, config: LayerConfig, lora_dtype: torch.dtype | None) -> None:
        self.register_module("lora", None)
        self._lora_configs: dict[str, LayerConfig] = {}
        self._lora_state = ACTIVE
        self.add_adapter(name, config, lora_dtype)
        self.use_adapters({name: 1.0})

    def _new_lora(self, config: LayerConfig, lora_dtype: torch.dtype | None) -> LoRA:
        """A pair of factors that fits the weight."""
        raise NotImplementedError

    def add_adapter(
        self, name: str, config: LayerConfig, lora_dtype: torch.dtype | None = None
    ) -> LoRA:
        """Give the layer one more adapter, which is not in use yet.

        Raises:
            TypeError, ValueError: see `check_adapter_name` and `factor_dtype`, or the layer has one
                of this name.
        """
        if check_adapter_name(name) in self._lora_configs:
            raise ValueError(f"the layer has an adapter named {name!r} already; take another name")
        lora = self._new_lora(config, lora_dtype)
        lora.train(self.training)
        if name == DEFAULT:
            self.lora = lora
        else:
            if "loras" not in self._modules:
                self.loras = nn.ModuleDict().train(self.training)
            self.loras[name] = lora
        self._lora_configs[name] = config
        return lora

    def remove_adapter(self, name: str) -> None:
        """Take one adapter out, and out of use.

        Raises:
            KeyError: the layer has none of this name.
        """
        del self._lora_configs[name]
        if name == DEFAULT:
            self.lora = None  # type: ignore[assignment]
        else:
            del self.loras[name]
            if not self.loras:
                del self.loras
        self.use_adapters(self._lora_active)

    def use_adapters(self, weights: Mapping[str, float]) -> None:
        """Compute with these adapters, each times its weight; names the layer lacks are passed
        over, and with none of its own it is the base alone."""
        configs = self._lora_configs
        self._lora_active = {name: float(w) for name, w in weights.items() if name in configs}
        names = list(self._lora_active)
        # Forward reads these three; the name is None where there is more to it than one branch.
        self._lora_one = names[0] if len(names) == 1 else None
        config = self.lora_config
        weight = self._lora_active[names[0]] if self._lora_one else 1.0
        self._lora_scale, self._lora_dropout = config.scale * weight, config.dropout

    def set_dropout(self, dropout: float) -> None:
        """Change the dropout of the adapters in use: to train on with another.

        Raises:
            TypeError, ValueError: it is no number in [0, 1).
        """
        check_dropout(dropout)
        for name in self._lora_active:
            self._lora_configs[name] = replace(self._lora_configs[name], dropout=dropout)
        self.use_adapters(self._lora_active)

    def adapters(self) -> dict[str, LoRA]:
        """Every adapter of the layer by its name, in use or not, in the order they came."""
        return {n: self.lora if n == DEFAULT else self.loras[n] for n in self._lora_configs}  # type: ignore[misc]

    @property
    def adapters_in_use(self) -> dict[str, float]:
        """The names of those that are computed, and their weights."""
        return dict(self._lora_active)

    @property
    def lora_configs(self) -> dict[str, LayerConfig]:
        """Rank, alpha, dropout and rsLoRA of each adapter by its name."""
        return dict(self._lora_configs)

    @property
    def lora_config(self) -> LayerConfig:
        """Rank, alpha, dropout and rsLoRA of the adapter in use.

        Several in use count as one of their total rank, of scale 1 and the greatest dropout; with
        none in use it is the first one's. See `lora_configs`.
        """
        configs = [self._lora_configs[name] for name in self._lora_active]
        if len(configs) > 1:
            rank = sum(config.rank for config in configs)
            return LayerConfig(rank, dropout=max(config.dropout for config in configs))
        return next(iter(configs or self._lora_configs.values()), LayerConfig())

    @property
    def rank(self) -> int:
        """R, see `lora_config`."""
        return self.lora_config.rank

    @property
    def alpha(self) -> float | None:
        """Numerator of the scale, None for scale 1."""
        return self.lora_config.alpha

    @property
    def scale(self) -> float:
        """Factor on the LoRA branch: that of `lora_config` times the weight in use."""
        return self._lora_scale

    @property
    def dropout(self) -> float:
        """Probability of dropping an element of the branch's input in training."""
        return self._lora_dropout

    def pairs(self) -> dict[str, tuple[Tensor, Tensor, float]]:
        """A, B and the factor on the branch, of each adapter in use."""
        adapters = self.adapters()
        return {
            name: (
                adapters[name].A.weight,
                adapters[name].B.weight,
                weight * self._lora_configs[name].scale,
            )
            for name, weight in self._lora_active.items()
        }

    def lora_factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B as the layer's product gets them: those of several
        adapters in use stacked, with scale 1. None where no adapter is in use."""
        pairs = list(self.pairs().values())
        if len(pairs) > 1:
            return stack_adapters(pairs)
        return pairs[0][:2] if pairs else None

    def delta_weight(self) -> Tensor:
        """``Σ scale·B·A [N, K]`` of the adapters in use, in float32 or wider: what merging adds to
        the weight."""
        total = None
        for factor_a, factor_b, scale in self.pairs().values():
            wide = torch.promote_types(factor_a.dtype, torch.float32)
            delta = (factor_b.detach().to(wide) @ factor_a.detach().to(wide)).mul_(scale)
            total = delta if total is None else total + delta
        if total is None:
            wide = torch.promote_types(self.weight.dtype, torch.float32)
            total = torch.zeros_like(self.weight, dtype=wide)
        return total.detach()

    def __getstate__(self) -> dict[str, Any]:
        # A copy taken inside `disable_lora` or `merged_lora` has no block that would end for it.
        if self._lora_state == MERGED:
            raise RuntimeError("cannot copy or pickle inside merged_lora; leave the block first")
        return {**self.__dict__, "_lora_state": ACTIVE, "_lora_blocks": 0}

    def _repr_of_adapters(self) -> str:
        configs, active = self._lora_configs, self._lora_active
        parts = []
        for name, config in configs.items():
            part = f"rank={config.rank}, scale={config.scale:g}"
            if config.dropout:
                part += f", dropout={config.dropout:g}"
            if name not in active:
                part += ", not in use"
            elif active[name] != 1.0:
                part += f", weight={active[name]:g}"
            parts.append(part if list(configs) == [DEFAULT] else f"{name}: {part}")
        text = "; ".join(parts)
        return text if self._lora_state == ACTIVE else f"{text}, {self._lora_state}"
