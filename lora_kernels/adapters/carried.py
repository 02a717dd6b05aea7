"""What a model carries: its LoRALinears, and the adapters on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from ..config import LayerConfig
from ..linear.factors import LoRA
from ..linear.holder import ACTIVE, MERGED, AdapterHolder
from .wording import listed


class Part(NamedTuple):
    """What one layer has of an adapter."""

    lora: LoRA
    config: LayerConfig


def lora_layers(model: nn.Module) -> dict[str, AdapterHolder]:
    """Every LoRALinear, and every LoRAParameter of experts, in ``model`` by its name, in module
    order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, AdapterHolder)
    }


def require_lora(model: nn.Module, caller: str) -> dict[str, AdapterHolder]:
    """As `lora_layers`, or ValueError where there are none."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{caller}: model has no LoRALinear; call apply_lora or load_lora first")
    return layers


def parts(model: nn.Module, adapter: str) -> dict[str, Part]:
    """What each layer has of an adapter, by the layer's name, in module order."""
    return {
        name: Part(layer.adapters()[adapter], layer.lora_configs[adapter])
        for name, layer in lora_layers(model).items()
        if adapter in layer.lora_configs
    }


def require_parts(model: nn.Module, adapter: str, caller: str) -> dict[str, Part]:
    """As `parts`, or ValueError where there are none."""
    require_lora(model, caller)
    known_adapters(model, [adapter])
    return parts(model, adapter)


def lora_adapters(model: nn.Module) -> dict[str, float | None]:
    """The adapters of ``model`` by name: each one's weight, and None for those not in use."""
    layers = lora_layers(model).values()
    used = adapters_in_use(model)
    return {name: used.get(name) for layer in layers for name in layer.lora_configs}


def adapters_in_use(model: nn.Module) -> dict[str, float]:
    """The names of the adapters that ``model`` computes with, and their weights."""
    layers = lora_layers(model).values()
    return {name: w for layer in layers for name, w in layer.adapters_in_use.items()}


def known_adapters(
    model: nn.Module, names: str | Sequence[str], argument: str = "name"
) -> list[str]:
    """``names`` as a list, if the model has adapters called so.

    Raises:
        TypeError: neither a name nor a list of names.
        ValueError: an unknown name, or one that is there twice.
    """
    wanted = [names] if isinstance(names, str) else names
    if not isinstance(wanted, (list, tuple)) or not all(isinstance(n, str) for n in wanted):
        raise TypeError(f"{argument} must be an adapter's name or a list of names, got {names!r}")
    known = lora_adapters(model)
    for name in wanted:
        if name not in known:
            has = listed([*map(repr, known)]) or "none: call apply_lora or load_lora first"
            raise ValueError(f"model has no adapter named {name!r}; it has {has}")
        if wanted.count(name) > 1:
            raise ValueError(f"{argument} has {name!r} twice; name each adapter once")
    return list(wanted)


def refuse_inside_block(model: nn.Module, what: str) -> None:
    """Raise ValueError where a `disable_lora` or `merged_lora` block is being run."""
    states = {layer._lora_state for layer in lora_layers(model).values()} - {ACTIVE}
    if states:
        block = "merged_lora" if MERGED in states else "disable_lora"
        raise ValueError(f"{what} inside {block}; leave the {block} block first")
