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

    They are those that its source calls with one variable; by default not those whose outputs it
    returns apart, of which each may get a backward of its own.

    Args:
        model: carries LoRA; joined anew where it was already.
        group: True for all devices and always, False for none, None for what was said of the model
            before, or else for the devices in `BY_DEFAULT`.
        kinds: the classes of the linears.
    """
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    if group is None:
        said = {choice for x in layers if (choice := x.__dict__.get(_CHOICE)) is not None}
        group = said.pop() if len(said) == 1 else None
    devices = BY_DEFAULT if group is None else None
    families: list[list[Any]] = []
    if group is not False:
        for parent in model.modules():
            if not isinstance(parent, kinds):
                families += _families(parent, kinds, also_apart=bool(group))
    fresh = [family for family in families if not _are_siblings(family, devices)]
    staying = {id(layer) for family in families if family not in fresh for layer in family}
    for layer in layers:
        if id(layer) not in staying:
            for own in ("_lora_siblings", "_lora_slot"):
                layer.__dict__.pop(own, None)
        layer.__dict__[_CHOICE] = group
    for family in fresh:
        Siblings(family, devices=devices)
    if group is False:
        part_feed_forwards(model)
    else:
        fuse_feed_forwards(model, devices)


def forget_groups(model: nn.Module, kinds: tuple[type, ...]) -> None:
    """Take away all that `group_linears` has put there."""
    group_linears(model, False, kinds)
    for layer in model.modules():
        layer.__dict__.pop(_CHOICE, None)


_CHOICE = "_lora_together"


def _are_siblings(layers: list[Any], devices: tuple[str, ...] | None) -> bool:
    """Whether these, and they alone, have been joined already."""
    siblings = layers[0].__dict__.get("_lora_siblings")
    return (
        siblings is not None
        and siblings.devices == devices
        and [id(layer) for layer in siblings.layers()] == [id(layer) for layer in layers]
        and all(layer.__dict__.get("_lora_siblings") is siblings for layer in layers)
    )


def _families(parent: nn.Module, kinds: tuple[type, ...], also_apart: bool) -> Iterator[list[Any]]:
    """Linears of one parent and width that its source calls with one variable."""
    taken: set[int] = set()
    for children, apart in called_together(type(parent)):
        if apart and not also_apart:
            continue
        layers = [layer for child in children for layer in _named(parent, child)]
        layers = [x for x in layers if isinstance(x, kinds) and id(x) not in taken]
        layers = list({id(layer): layer for layer in layers}.values())
        if len(layers) > 1 and len({layer.in_features for layer in layers}) == 1:
            taken |= {id(layer) for layer in layers}
            yield layers


def _named(parent: nn.Module, child: str) -> list[Any]:
    """The modules that an entry of `Together` stands for."""
    if child.endswith(".*"):
        among = parent._modules.get(child[:-2])
        return list(among.children()) if isinstance(among, nn.ModuleList) else []
    name: Any = child
    if child.startswith("="):
        name = parent
        for attribute in child[1:].split("."):
            name = getattr(name, attribute, None)
    module = parent._modules.get(name) if isinstance(name, str) else None
    return [] if module is None else [module]
