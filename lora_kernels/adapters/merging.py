"""Fold the adapter into the weights, for good or for a while."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..dispatch import multiplies_by_itself
from ..linear.holder import ACTIVE, MERGED, AdapterHolder
from ..linear.module import LoRALinear
from .carried import lora_layers, require_lora
from .changing import LOCK, change_of, finish
from .experts import put
from .feed_forwards import part_feed_forwards
from .replacing import give_back_bases, parameter_owners, refuse_root
from .rows import refuse_rows
from .sharding import refuse_emptied
from .surgery import refuse_sharded_layers
from .tokens import folded_tokens, has_tokens, refuse_unfoldable
from .wholes import keep_wholes


def merge_lora(model: nn.Module) -> list[str]:
    """Fold ``scale·B·A`` into each weight, in place, and leave plain ``nn.Linear`` modules.

    The sum is taken in float32 (or wider) and rounded once into the weight's dtype. Modules that
    are trained whole keep what they have learnt. Of several adapters those in use are folded in,
    each times its weight, see `use_lora`; the others are dropped.

    The weights themselves are written: another model that shares them has them merged too.

    Returns:
        The names of the merged modules.

    Raises:
        ValueError: the model carries no LoRA or has none in use, is inside `merged_lora` or
            `disable_lora`, a merged weight or token would not be finite in its dtype, or a weight
            is tied, sharded, emptied (DeepSpeed's ZeRO-3), on the meta device or merged just now
            by another model's `merged_lora`. Nothing is changed then. Where something else stops
            it (memory, Ctrl-C), each module is merged or as it was, the model computes what it
            did, and another call merges the rest.
    """
    with LOCK:
        layers = _mergeable(model)
        refuse_root(model)
        unused = [layer for layer in lora_layers(model).values() if not layer.adapters_in_use]
        for name, layer in layers.items():
            # All are known to be good before the first is written, without a second copy of each.
            _refuse_unmergeable(name, layer)
        refuse_unfoldable(model)
        places: dict[nn.Module, list[tuple[nn.Module, str]]] = {}
        for parent in model.modules():
            for attribute, child in parent._modules.items():
                if isinstance(child, AdapterHolder):
                    places.setdefault(child, []).append((parent, attribute))
        *others, last = layers.values()
        for layer in others:
            _merge_one(layer, places[layer])
        # The last layer goes with all that is not a layer: as long as it is there, so is LoRA.
        with change_of(model), folded_tokens(model):
            keep_wholes(model)
            give_back_bases(model, unused)
            part_feed_forwards(model)
            _merge_one(last, places[last])
        return list(layers)


def _merge_one(layer: AdapterHolder, places: list[tuple[nn.Module, str]]) -> None:
    """Write a layer's weight and put its base in its place, both or neither."""
    merged = _merged_weight(layer)
    base = layer.to_linear() if isinstance(layer, LoRALinear) else None
    before = layer.weight.detach().clone()
    try:
        _write(layer, merged)
        for parent, attribute in places:
            put(parent, attribute, base)
    except BaseException:
        _write(layer, before)
        for parent, attribute in places:
            put(parent, attribute, layer)
        raise


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[None]:
    """Run ``model`` with the adapter folded in for the length of the ``with``.

    Afterwards the weights have the very same bits as before: a copy of each adapted weight is
    held meanwhile. A and B do not get gradients inside.

    It may be nested and entered by several threads; the last one out brings the weights back. They
    are changed for whoever reads them: in other threads a forward of this model, or of one that
    shares its weights, is wrong while a block begins or ends, unless it is in such a block itself.

    Raises:
        ValueError: as `merge_lora`. Nothing is changed then, nor where anything else stops it.
    """
    with change_of(model):
        named = _mergeable(model, nested=True)
        kept: list[tuple[AdapterHolder, Tensor]] = []
        try:
            for name, layer in named.items():
                if not layer._lora_blocks:
                    _refuse_unmergeable(name, layer)
                    merged = _merged_weight(layer)
                    kept.append((layer, layer.weight.detach().clone()))
                    _write(layer, merged)
                    layer._lora_backup, layer._lora_state = kept[-1][1], MERGED
                    _FOLDED.add(layer)
                layer._lora_blocks += 1
        except BaseException:
            for layer, weight in kept:
                _write(layer, weight)
            raise
    try:
        yield
    finally:
        finish(lambda: _unfold(model, list(named.values())))


# Layers that are, or were, inside of `merged_lora`: two of them may share a weight.
_FOLDED: weakref.WeakSet[AdapterHolder] = weakref.WeakSet()


def _unfold(model: nn.Module, layers: list[AdapterHolder]) -> None:
    with change_of(model):
        for layer in layers:
            layer._lora_blocks -= 1
            if layer._lora_backup is not None and not layer._lora_blocks:
                _write(layer, layer._lora_backup)
                layer._lora_backup, layer._lora_state = None, ACTIVE
                _FOLDED.discard(layer)


def _write(layer: AdapterHolder, weight: Tensor) -> None:
    with torch.no_grad():
        layer.weight.copy_(weight)


def _mergeable(model: nn.Module, *, nested: bool = False) -> dict[str, AdapterHolder]:
    """The layers with an adapter in use, if they can be merged, or with ``nested`` are merged."""
    carrying = require_lora(model, "merge")
    refuse_rows(model, "merge")
    refuse_sharded_layers(model, carrying)
    layers = {name: layer for name, layer in carrying.items() if layer.adapters_in_use}
    if not layers:
        raise ValueError(
            "cannot merge: no adapter is in use; call use_lora with the names of those to merge"
        )
    touched = {
        name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, AdapterHolder) or has_tokens(module)
        for name, parameter in module.named_parameters(prefix)
    }
    refuse_emptied(touched, "model.parameters()")
    owners = parameter_owners(model)
    for name, layer in layers.items():
        if layer._lora_state == MERGED and nested:
            continue
        if layer._lora_state != ACTIVE:
            raise ValueError(
                f"cannot merge {name!r}: its adapter is {layer._lora_state}; leave the "
                "merged_lora or disable_lora block first"
            )
        if len(owners[id(layer.weight)]) > 1:
            raise ValueError(
                f"cannot merge {name!r}: its weight is tied, held by {owners[id(layer.weight)]}"
            )
    return layers


def _refuse_unmergeable(name: str, layer: AdapterHolder) -> None:
    if multiplies_by_itself(type(layer.weight)):
        raise ValueError(
            f"cannot merge {name!r}: its weight is a {type(layer.weight).__name__}, quantised; "
            "load the model without quantization and the adapter onto it, and merge there"
        )
    if layer.weight.is_meta:
        raise ValueError(f"cannot merge {name!r}: its weight is on the meta device; load it first")
    if 0 in layer.weight.stride():
        raise ValueError(f"cannot merge {name!r}: its weight is an expanded view; clone it first")
    folded = [other.weight for other in _FOLDED if other._lora_backup is not None]
    if any(layer.weight.data_ptr() == weight.data_ptr() for weight in folded):
        raise ValueError(
            f"cannot merge {name!r}: its weight is merged for another model that shares it; "
            "leave the merged_lora block of that one first"
        )
    if not _surely_finite(layer) and not torch.isfinite(_merged_weight(layer)).all():
        raise ValueError(f"cannot merge {name!r}: the sum would hold NaN or infinity")


def _surely_finite(layer: AdapterHolder) -> bool:
    """Whether the largest values of the weight, A and B leave the sum no room to overflow."""
    pairs = layer.pairs().values()
    operands = [layer.weight, *(factor for a, b, _ in pairs for factor in (a, b))]
    operands = [operand.detach() for operand in operands]
    if not all(t.numel() for t in operands):
        return False
    bound, *largest = (max(map(abs, torch.stack(t.aminmax()).tolist())) for t in operands)
    for (factor, _, scale), a, b in zip(pairs, largest[::2], largest[1::2], strict=True):
        bound += max(1.0, abs(scale)) * factor.shape[-2] * a * b  # NaN if there is one anywhere
    return bound < 0.99 * min(torch.finfo(t.dtype).max for t in operands)


def _merged_weight(layer: AdapterHolder) -> Tensor:
    """The weight with the branch folded in: summed in the widest of the dtypes, rounded once."""
    weight = layer.weight.detach()
    return (layer.delta_weight() + weight).to(weight.dtype)
