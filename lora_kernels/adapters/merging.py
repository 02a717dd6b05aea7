"""Fold the adapter into the weights, for good or for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..dispatch import multiplies_by_itself
from ..linear.holder import ACTIVE, MERGED
from ..linear.module import LoRALinear
from .carried import lora_layers, require_lora
from .sharding import refuse_emptied
from .surgery import parameter_owners, refuse_root, refuse_sharded_layers, replace_modules
from .tokens import fold_tokens, has_tokens, refuse_unfoldable
from .wholes import keep_wholes


def merge_lora(model: nn.Module) -> list[str]:
    """Fold ``scale·B·A`` into each weight, in place, and leave plain ``nn.Linear`` modules.

    The sum is taken in float32 (or wider) and rounded once into the weight's dtype. Modules that
    are trained whole keep what they have learnt. Of several adapters those in use are folded in,
    each times its weight, see `use_lora`; the others are dropped.

    Returns:
        The names of the merged modules.

    Raises:
        ValueError: the model carries no LoRA or has none in use, is inside `merged_lora` or
            `disable_lora`, a merged weight or token would not be finite in its dtype, or a weight
            is tied, sharded, emptied (DeepSpeed's ZeRO-3) or on the meta device. Nothing is changed
            then.
    """
    layers = _mergeable(model)
    refuse_root(model)
    unused = [layer for layer in lora_layers(model).values() if not layer.adapters_in_use]
    for name, layer in layers.items():
        # All are known to be good before the first is written, without a second copy of each.
        _refuse_unmergeable(name, layer)
    refuse_unfoldable(model)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(_merged_weight(layer))
    fold_tokens(model)
    keep_wholes(model)
    all_layers = (*layers.values(), *unused)
    replace_modules(model, {id(layer): layer.to_linear() for layer in all_layers})
    return list(layers)


@contextmanager
def merged_lora(model: nn.Module) -> Iterator[None]:
    """Run ``model`` with the adapter folded in for the length of the ``with``.

    Afterwards the weights have the very same bits as before: a copy of each adapted weight is
    held meanwhile. A and B do not get gradients inside.

    Raises:
        ValueError: as `merge_lora`.
    """
    named = _mergeable(model)
    layers = list(named.values())
    backup: list[Tensor] = []
    try:
        with torch.no_grad():
            for name, layer in named.items():
                _refuse_unmergeable(name, layer)
                merged = _merged_weight(layer)
                backup.append(layer.weight.detach().clone())
                layer.weight.copy_(merged)
                layer._lora_state = MERGED
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(layers, backup, strict=False):
                layer.weight.copy_(weight)
                layer._lora_state = ACTIVE


def _mergeable(model: nn.Module) -> dict[str, LoRALinear]:
    """The layers with an adapter in use, if they can be merged."""
    carrying = require_lora(model, "merge")
    refuse_sharded_layers(model, carrying)
    layers = {name: layer for name, layer in carrying.items() if layer.adapters_in_use}
    if not layers:
        raise ValueError(
            "cannot merge: no adapter is in use; call use_lora with the names of those to merge"
        )
    touched = {
        name: parameter
        for prefix, module in model.named_modules()
        if isinstance(module, LoRALinear) or has_tokens(module)
        for name, parameter in module.named_parameters(prefix)
    }
    refuse_emptied(touched, "model.parameters()")
    owners = parameter_owners(model)
    for name, layer in layers.items():
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


def _refuse_unmergeable(name: str, layer: LoRALinear) -> None:
    if multiplies_by_itself(type(layer.weight)):
        raise ValueError(
            f"cannot merge {name!r}: its weight is a {type(layer.weight).__name__}, quantised; "
            "load the model without quantization and the adapter onto it, and merge there"
        )
    if layer.weight.is_meta:
        raise ValueError(f"cannot merge {name!r}: its weight is on the meta device; load it first")
    if 0 in layer.weight.stride():
        raise ValueError(f"cannot merge {name!r}: its weight is an expanded view; clone it first")
    if not _surely_finite(layer) and not torch.isfinite(_merged_weight(layer)).all():
        raise ValueError(f"cannot merge {name!r}: the sum would hold NaN or infinity")


def _surely_finite(layer: LoRALinear) -> bool:
    """Whether the largest values of the weight, A and B leave the sum no room to overflow."""
    pairs = layer.pairs().values()
    operands = [layer.weight, *(factor for a, b, _ in pairs for factor in (a, b))]
    operands = [operand.detach() for operand in operands]
    if not all(t.numel() for t in operands):
        return False
    bound, *largest = (max(map(abs, torch.stack(t.aminmax()).tolist())) for t in operands)
    for (factor, _, scale), a, b in zip(pairs, largest[::2], largest[1::2], strict=True):
        bound += max(1.0, abs(scale)) * factor.shape[0] * a * b  # NaN if there is one anywhere
    return bound < 0.99 * min(torch.finfo(t.dtype).max for t in operands)


def _merged_weight(layer: LoRALinear) -> Tensor:
    """The weight with the branch folded in: summed in the widest of the dtypes, rounded once."""
    weight = layer.weight.detach()
    return (layer.delta_weight() + weight).to(weight.dtype)
