"""Whether what a file holds fits a model: asked of all of it before any of it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import LayerConfig
from ..linear.module import LoRALinear
from .reading import SUFFIXES, AdapterMismatchError, Content, without_wrappers
from .sharding import is_sharded, whole
from .surgery import lora_layers
from .targets import strip_wrappers


class Fit(NamedTuple):
    """What loading will do; nothing has been done yet.

    Attributes:
        loaded: modules to load, without wrapper prefixes, in module order.
        inserted: layers to insert before, by the model's own names; empty where it carries LoRA.
    """

    loaded: list[str]
    inserted: dict[str, LayerConfig]


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
    problems += _strange_copies(model, content.copies)
    if problems:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
        )
    return Fit(loaded, {by_clean_name[name]: wanted[name] for name in loaded if fresh})


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


def _strange_copies(model: nn.Module, copies: Mapping[str, Tensor]) -> list[str]:
    """What is wrong with the base's own tensors that an adapter's file holds."""
    own = {strip_wrappers(name): tensor for name, tensor in model.named_parameters()}
    problems = []
    for name, copy in copies.items():
        if name not in own:
            problems.append(f"{name} lies in the file, the model has no such parameter")
        elif not _equal(own[name], copy):
            problems.append(
                f"{name}: the file holds a copy of the base's, {list(copy.shape)}, and the "
                f"model's, {list(own[name].shape)}, is another; load the base that the adapter was "
                "trained on, with its vocabulary resized as it was"
            )
    return problems


def _equal(own: Tensor, copy: Tensor) -> bool:
    """Whether two tensors are the same, once rounded to the narrower of their dtypes."""
    if own.shape != copy.shape or own.is_meta:
        return False
    narrow = min(own.dtype, copy.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(whole(own.detach()).to("cpu", narrow), copy.to(narrow))


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
