"""Whether what a file holds fits a model: asked of all of it before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from ..linear.module import LoRALinear
from .content import Content
from .fitting_wholes import WholeFit, fit_wholes
from .reading import SUFFIXES, AdapterMismatchError, without_wrappers
from .sharding import is_sharded
from .surgery import lora_layers
from .targets import strip_wrappers


class Fit(NamedTuple):
    """What loading will do; nothing has been done yet.

    Attributes:
        loaded: modules to load, without wrapper prefixes, in module order.
        inserted: layers to insert before, by the model's own names; empty where it carries LoRA.
        wholes: what to load besides.
    """

    loaded: list[str]
    inserted: dict[str, LayerConfig]
    wholes: WholeFit


def fit(
    model: nn.Module,
    path: Path,
    content: Content,
    strict: bool,
) -> Fit:
    """Hold what `read_content` gave of ``path`` against ``model``, which is left as it is.

    Raises:
        AdapterMismatchError: what is missing, unexpected, mis-shaped or out of range, by name.
    """
    pairs, described = content.pairs, content.described
    by_clean_name = {strip_wrappers(name): name for name, _ in model.named_modules()}
    layers = without_wrappers(lora_layers(model))
    fresh = not layers
    wanted: dict[str, LayerConfig] = {}
    if fresh:
        wanted = {
            name: described.get(name, LayerConfig(rank=pair["A"].shape[0]))
            for name, pair in pairs.items()
            if strict or name in by_clean_name
        }
        layers = _trial_layers(model, wanted, by_clean_name, path)
    missing = [name for name in layers if name not in pairs]
    unexpected = [name for name in pairs if name not in layers]
    problems = []
    if strict and missing:
        problems.append(f"missing from the file: {_listed(missing)}")
    if strict and unexpected:
        problems.append(f"in the file but without LoRA in the model: {_listed(unexpected)}")
    loaded = [name for name in by_clean_name if name in layers and name in pairs]
    if not loaded and not problems:
        problems.append("the file and the model have no module in common")
    for name in loaded:
        problems += _differences(name, layers[name], pairs[name], described.get(name), fresh)
    wholes = fit_wholes(model, content, fresh, strict)
    problems += wholes.problems
    if problems:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
        )
    return Fit(loaded, {by_clean_name[name]: wanted[name] for name in loaded if fresh}, wholes)


def _trial_layers(
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


def _differences(
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


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
