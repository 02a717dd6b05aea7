"""Find the linears of a model that may read one tensor, and have them computed together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..group.siblings import Siblings
from ..linear.module import LoRALinear
from .shared_calls import called_together

# Where grouping has been measured to pay: `benchmarks/test_groups.py`. No GPU is among them yet.
BY_DEFAULT = ("cpu",)


def group_linears(
    model: nn.Module, group: bool | None, kinds: tuple[type, ...] = (LoRALinear,)
) -> None:
    """Join the linears of each module that may be called with one tensor, or let them part.

    Those that its source calls with one variable are joined at once; of others with one input
    width it is watched whether they are.

    Args:
        model: carries LoRA; joined anew where it was already.
        group: None for the devices in `BY_DEFAULT`, True for all, False for none.
        kinds: the classes of the linears.
    """
    for layer in model.modules():
        if isinstance(layer, kinds):
            layer.__dict__.pop("_lora_siblings", None)
            layer.__dict__.pop("_lora_slot", None)
    if group is False:
        return
    devices = BY_DEFAULT if group is None else None
    for parent in model.modules():
        if isinstance(parent, kinds):
            continue
        for layers, seen in _families(parent, kinds):
            Siblings(layers, seen=seen, devices=devices)


def _families(parent: nn.Module, kinds: tuple[type, ...]) -> Iterator[tuple[list[Any], bool]]:
    """Linears of one parent and width, and whether its source calls them with one variable."""
    children: dict[str, Any] = dict(_own_children(parent))
    children = {name: layer for name, layer in children.items() if isinstance(layer, kinds)}
    for names in called_together(type(parent)):  # type: ignore[arg-type]
        layers = [children[name] for name in names if name in children]
        if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
            for name in names:
                children.pop(name, None)
            yield layers, True
    by_width: dict[int, list[Any]] = {}
    for layer in children.values():
        by_width.setdefault(layer.in_features, []).append(layer)
    for layers in by_width.values():
        if len(layers) > 1:
            yield layers, False


def _own_children(parent: nn.Module) -> Iterator[tuple[str, Any]]:
    """Children, and those in its lists and dictionaries of modules."""
    if isinstance(parent, (nn.ModuleList, nn.ModuleDict)):
        return
    seen: set[int] = set()
    for name, child in parent.named_children():  # each once
        inner = child.children() if isinstance(child, (nn.ModuleList, nn.ModuleDict)) else ()
        for one_name, one in [(name, child), *((f"{name}.{i}", c) for i, c in enumerate(inner))]:
            if id(one) not in seen:
                seen.add(id(one))
                yield one_name, one
