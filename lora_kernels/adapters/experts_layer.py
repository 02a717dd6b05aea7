"""What the experts of a transformers 5 model compute once they carry adapters.

Its experts modules keep the weights of all experts in 3-D parameters, and their flags say how
(``is_transposed``, ``has_bias``, ``has_gate``); whatever implementation the model was asked for, it
is called with tokens, their experts and weights. A module that carries adapters is of a subclass
that is called in the same way.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from ..experts.module import LoRAParameter, frozen, matrices
from ..experts.routing import gathered, route, spread
from ..linear.autograd import autocasts
from ..linear.holder import ACTIVE

# A parameter's adapters are a child of this name and the parameter's.
PREFIX = "lora_of_"


class ExpertsWithLoRA(nn.Module):
    """An experts module with `LoRAParameter` children; see `with_lora`."""

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states [T, H]``, ``top_k_index`` and ``top_k_weights [T, top_k]`` to ``[T, H]``.

        Without an adapter in use, or with one folded in, it is the model's own forward.
        """
        if not any(h._lora_state == ACTIVE and h.adapters_in_use for h in holders(self).values()):
            found: Tensor = super().forward(hidden_states, top_k_index, top_k_weights)
            return found
        layer: Any = self
        up = "gate_up_proj" if layer.has_gate else "up_proj"
        x = hidden_states
        if not autocasts(x):
            x = x.to(getattr(layer, up).dtype)
        routing = route(top_k_index, getattr(layer, up).shape[0])
        inner = _product(layer, up, spread(x, routing), routing.offsets)
        inner = layer._apply_gate(inner) if layer.has_gate else layer.act_fn(inner)
        rows = _product(layer, "down_proj", inner, routing.offsets)
        if getattr(layer, "has_post_expert_norm", False):
            rows = layer.post_expert_norm(rows)
        return gathered(rows, top_k_weights, routing).to(hidden_states.dtype)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class was made here and has no name by which pickle would find it.
        reduced: Any = super().__reduce_ex__(2)
        return _empty, (base_of(type(self)),), reduced[2]


def _product(layer: nn.Module, name: str, x: Tensor, offsets: Tensor) -> Tensor:
    holder = layer._modules.get(PREFIX + name)
    if holder is not None:
        found: Tensor = holder(x, offsets)
        return found
    weight, bias = matrices(layer, name, layer.is_transposed)  # type: ignore[arg-type]
    if not autocasts(x):
        x = x.to(weight.dtype)
    return frozen(x, weight, offsets, bias)


def holders(module: nn.Module) -> dict[str, LoRAParameter]:
    """The adapters of an experts module by the parameter that they adapt."""
    return {
        child.parameter_name: child
        for child in module.children()
        if isinstance(child, LoRAParameter)
    }


@functools.cache
def with_lora(kind: Any) -> Any:
    """The subclass of an experts class that computes adapters, the same one each time."""
    return type(f"LoRA{kind.__name__}", (ExpertsWithLoRA, kind), {"__module__": __name__})


def base_of(kind: type) -> Any:
    """The class that `with_lora` made ``kind`` of."""
    return kind.__mro__[kind.__mro__.index(ExpertsWithLoRA) + 1]


def _empty(kind: Any) -> Any:
    """A module of the class with adapters, to be filled by unpickling."""
    made = with_lora(kind)
    return made.__new__(made)
