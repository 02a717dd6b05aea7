"""Find the linears of a model that may read one tensor, and have them computed together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..group.siblings import Siblings
from ..linear.module import LoRALinear
from .feed_forwards import fuse_feed_forwards, part_feed_forwards
from .shared_calls import called_together

# Where grouping has been measured to pay: `benchmarks/test_groups.py`. No GPU is among them yet.
BY_DEFAULT = ("cpu",)


def check_group(group: Any) -> None:
    """Raise TypeError where it is none of True, False and None."""
    if group is not None and not isinstance(group, bool):
        raise TypeError(f"group must be True, False or None, got {group!r}")


def group_linears(
    model: nn.Module, group: bool | None, kinds: tuple[type, ...] = (LoRALinear,)
) -> None:
    """Join the linears of each module that may be called with one tensor, or let them part; and the
    feed-forwards, see `fuse_feed_forwards`.

    Those that its source calls with one variable are joined at once; of others with one input
    width it is watched whether they are.

    Args:
        model: carries LoRA; joined anew where it was already.
        group: None for the devices in `BY_DEFAULT`, True for all and always, False for none.
        kinds: the classes of the linears.
    """
    devices = BY_DEFAULT if group is None else None
    families: list[tuple[list[Any], bool]] = []
    if group is not False:
        for parent in model.modules():
            if not isinstance(parent, kinds):
                families += _families(parent, kinds)
    fresh = [family for family in families if not _are_siblings(family[0], devices)]
    staying = {id(layer) for family in families if family not in fresh for layer in family[0]}
    for layer in model.modules():
        if isinstance(layer, kinds) and id(layer) not in staying:
            layer.__dict__.pop("_lora_siblings", None)
            layer.__dict__.pop("_lora_slot", None)
    for layers, seen in fresh:
        Siblings(layers, seen=seen, devices=devices)
    if group is False:
        part_feed_forwards(model)
    else:
        fuse_feed_forwards(model, devices)


def _are_siblings(layers: list[Any], devices: tuple[str, ...] | None) -> bool:
    """Whether these, and they alone, have been joined already."""
    siblings = layers[0].__dict__.get("_lora_siblings")
    return (
        siblings is not None
        and siblings.devices == devices
        and [id(layer) for layer in siblings.layers()] == [id(layer) for layer in layers]
        and all(layer.__dict__.get("_lora_siblings") is siblings for layer in layers)
    )


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
