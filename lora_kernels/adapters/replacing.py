"""Layers put in place of others in a model, wherever they are held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from ..linear.holder import AdapterHolder
from ..linear.module import LoRALinear
from .experts import release_experts
from .feed_forwards import part_feed_forwards


def refuse_root(model: nn.Module) -> None:
    """Raise ValueError where the model itself is the layer, which nobody holds as a child."""
    if isinstance(model, LoRALinear):
        raise ValueError(
            "model itself is a LoRALinear and cannot be replaced from inside; put it into a "
            "module first, or use merged_lora or to_linear"
        )


def give_back_bases(model: nn.Module, layers: Sequence[AdapterHolder]) -> None:
    """Put back what these layers were before they had adapters."""
    linears = {id(layer): layer.to_linear() for layer in layers if isinstance(layer, LoRALinear)}
    replace_modules(model, linears)
    release_experts(model, layers)
    if not any(isinstance(module, AdapterHolder) for module in model.modules()):
        part_feed_forwards(model)


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new[id(old)]`` wherever old is a child, under every name it has."""
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if id(child) in new:
                parent._modules[attribute] = new[id(child)]


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners
