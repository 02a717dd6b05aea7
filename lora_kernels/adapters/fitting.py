"""Whether what a file holds fits a model: asked of all of it before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from ..linear.module import LoRALinear
from .reading import SUFFIXES, AdapterMismatchError
from .sharding import is_sharded


def trial_layers(
    model: nn.Module,
    wanted: Mapping[str, LayerConfig],
    by_clean_name: Mapping[str, str],
    path: Path,
) -> dict[str, LoRALinear]:
    """What the layers would be, on the meta device, to hold the file against."""
    problems, layers = [], {}
    modules = dict(model.named_modules())
    for name, layer in wanted.items():
        module = modules.get(by_clean_name.get(name, ""))
        if name not in by_clean_name:
            problems.append(f"the model has no module {name!r}")
        elif type(module) is not nn.Linear:
            problems.append(f"{name!r} is a {type(module).__name__}, not an nn.Linear")
        elif is_sharded(module.weight):
            problems.append(f"{name!r} is sharded already; load the adapter before fully_shard")
        elif module.weight.is_meta:
            problems.append(f"{name!r} is on the meta device; give the model memory first")
        else:
            layers[name] = LoRALinear(
                module.in_features,
                module.out_features,
                rank=layer.rank,
                alpha=layer.alpha,
                dropout=layer.dropout,
                use_rslora=layer.use_rslora,
                device="meta",
                dtype=module.weight.dtype,
            )
    if problems:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
        )
    return layers


def differences(
    name: str,
    layer: LoRALinear,
    pair: Mapping[str, Tensor],
    described: LayerConfig | None,
    fresh: bool,
) -> list[str]:
    problems = []
    for factor, suffix in SUFFIXES.items():
        weight = getattr(layer.lora, factor).weight
        if weight.shape != pair[factor].shape:
            problems.append(
                f"{name}{suffix}: expected {list(weight.shape)}, found {list(pair[factor].shape)}"
            )
        elif not torch.isfinite(pair[factor].to(weight.dtype)).all():
            problems.append(f"{name}{suffix}: too large for the model's {weight.dtype}")
        if weight.is_meta and not fresh:
            problems.append(f"{name}{suffix}: is on the meta device; give the model memory first")
    if described is not None and described.scale != layer.scale:
        problems.append(
            f"{name}: the file was trained with scale {described.scale:g} (rank {described.rank}, "
            f"alpha {described.alpha}), the model has {layer.scale:g}; apply LoRA with that alpha"
        )
    return problems


def listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
