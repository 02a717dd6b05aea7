"""Whether what a file holds fits a model: asked of all of it before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from ..linear.factors import DEFAULT, LoRA, factor_dtype
from .carried import Part, adapters_in_use, parts
from .content import Content
from .experts import expert_parameters, trial_factors
from .fitting_wholes import WholeFit, fit_wholes
from .reading import SUFFIXES, AdapterMismatchError, without_wrappers
from .sharding import is_sharded
from .targets import ADAPTABLE, strip_wrappers
from .wholes import whole_slots
from .wording import listed


class Fit(NamedTuple):
    """What loading will do; nothing has been done yet.

    Attributes:
        loaded: modules to load, without wrapper prefixes, in module order.
        inserted: layers to insert before, by the model's own names; empty where it carries the
            adapter.
        dtypes: of A and B of those, where it is not `factor_dtype`'s choice.
        wholes: what to load besides.
    """

    loaded: list[str]
    inserted: dict[str, LayerConfig]
    dtypes: dict[str, torch.dtype]
    wholes: WholeFit


def fit(
    model: nn.Module,
    path: Path,
    content: Content,
    strict: bool,
    adapter: str = DEFAULT,
    lora_dtype: torch.dtype | str | None = None,
) -> Fit:
    """Hold what `read_content` gave of ``path`` against the adapter of ``model`` that has this
    name, or against the bare model where none has. It is left as it is.

    Raises:
        AdapterMismatchError: what is missing, unexpected, mis-shaped or out of range, by name.
    """
    pairs, described = content.pairs, content.described
    own_names = [*(name for name, _ in model.named_modules()), *expert_parameters(model)]
    by_clean_name = {strip_wrappers(name): name for name in own_names}
    layers = without_wrappers(parts(model, adapter))
    fresh = not layers
    wanted: dict[str, LayerConfig] = {}
    dtypes: dict[str, torch.dtype] = {}
    if fresh:
        wanted = {
            name: described.get(name, LayerConfig(rank=pair["A"].shape[-2]))
            for name, pair in pairs.items()
            if strict or name in by_clean_name
        }
        if lora_dtype is not None:
            dtypes = {
                name: torch.promote_types(pairs[name]["A"].dtype, pairs[name]["B"].dtype)
                if isinstance(lora_dtype, str)
                else lora_dtype
                for name in wanted
            }
        layers = _trial_layers(model, wanted, dtypes, by_clean_name, path)
    missing = [name for name in layers if name not in pairs]
    unexpected = [name for name in pairs if name not in layers]
    problems = []
    if strict and missing:
        problems.append(f"missing from the file: {listed(missing)}")
    if strict and unexpected:
        problems.append(f"in the file but without LoRA in the model: {listed(unexpected)}")
    loaded = [name for name in by_clean_name if name in layers and name in pairs]
    if not loaded and not problems:
        problems.append("the file and the model have no module in common")
    for name in loaded:
        problems += _differences(name, layers[name], pairs[name], described.get(name), fresh)
    wholes = fit_wholes(model, content, fresh, strict, adapter)
    problems += wholes.problems + _clashes(model, wholes.inserted, adapter)
    problems += [
        f"{name!r} has LoRA and single tokens, which would hide LoRA's part of them"
        for name in wholes.tokens
        if name in wanted
    ]
    if problems:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
        )
    return Fit(
        loaded,
        {by_clean_name[name]: wanted[name] for name in loaded if fresh},
        {by_clean_name[name]: dtypes[name] for name in loaded if name in dtypes},
        wholes,
    )


def _trial_layers(
    model: nn.Module,
    wanted: Mapping[str, LayerConfig],
    dtypes: Mapping[str, torch.dtype],
    by_clean_name: Mapping[str, str],
    path: Path,
) -> dict[str, Part]:
    """What the layers would be, on the meta device, to hold the file against."""
    problems, layers = [], {}
    modules = dict(model.named_modules())
    experts = expert_parameters(model)
    for name, layer in wanted.items():
        full = by_clean_name.get(name, "")
        if full in experts:
            found = trial_factors(experts[full], full, layer, dtypes.get(name))
            if isinstance(found, str):
                problems.append(f"{name!r}: {found}")
            else:
                layers[name] = Part(found, layer)
            continue
        module = modules.get(full)
        if name not in by_clean_name:
            problems.append(f"the model has no module {name!r}")
        elif not isinstance(module, nn.Linear) or type(module) not in ADAPTABLE:
            problems.append(f"{name!r} is a {type(module).__name__}, not an nn.Linear")
        elif is_sharded(module.weight):
            problems.append(f"{name!r} is sharded already; load the adapter before fully_shard")
        elif module.weight.is_meta:
            problems.append(f"{name!r} is on the meta device; give the model memory first")
        else:
            lora = LoRA(
                module.in_features,
                module.out_features,
                layer.rank,
                device="meta",
                dtype=factor_dtype(module.weight.dtype, dtypes.get(name)),
            )
            layers[name] = Part(lora, layer)
    if problems:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
        )
    return layers


def _differences(
    name: str,
    layer: Part,
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
    if described is not None and described.scale != layer.config.scale:
        problems.append(
            f"{name}: the file was trained with scale {described.scale:g} (rank {described.rank}, "
            f"alpha {described.alpha}), the model has {layer.config.scale:g}; apply LoRA with that "
            "alpha"
        )
    return problems


def _clashes(model: nn.Module, names: list[str], adapter: str) -> list[str]:
    """What an adapter in use would have whole, and another in use has already."""
    used = adapters_in_use(model)
    if adapter not in used:
        return []
    others = [other for other in used if other != adapter]
    return [
        f"{name}: {other!r}, which is in use too, trains it whole; use one of them at a time"
        for other in others
        for name in whole_slots(model, other)
        if name in names
    ]
