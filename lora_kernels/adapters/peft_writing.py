"""An adapter as PEFT's two files, without PEFT; see `peft_reading` for what is in them."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..linear.factors import DEFAULT
from .carried import Part
from .checksums import to_bytes
from .files import write_together
from .peft_experts import peft_factors, peft_names, refuse_dropout
from .peft_reading import CONFIG, FACTORS, PREFIX, TENSORS
from .peft_wholes import task_type, whole_fields
from .sharding import is_writer, whole
from .targets import own_modules, strip_wrappers
from .wholes import whole_tensors
from .wording import listed


def write_directory(
    directory: Path,
    model: nn.Module,
    layers: Mapping[str, Part],
    adapter: str = DEFAULT,
    fold_scale: bool = False,
) -> None:
    """Write an adapter of ``model``, what its layers have of it by clean name, into ``directory``.

    Both files appear or neither; whatever else is in the directory is left alone. Of a sharded
    model every process gathers, and the first writes.

    Raises:
        ValueError: PEFT's format cannot say it, or the place is taken. Nothing is written then.
    """
    tensors, config = _contents(model, layers, adapter, fold_scale)
    if not is_writer(layer.lora.A.weight for layer in layers.values()):
        return
    text = json.dumps(config, indent=2) + "\n"
    write_together(directory, {TENSORS: to_bytes(tensors, {"format": "pt"}), CONFIG: text.encode()})


def _contents(
    model: nn.Module, layers: Mapping[str, Part], adapter: str, fold_scale: bool
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the two files hold: the tensors, copied to the CPU, and the config."""
    if "" in layers:
        raise ValueError(
            "model itself is a LoRALinear, for which PEFT's format has no name; put it into a "
            "module first, or save to a .safetensors file"
        )
    configs = {name: layer.config for name, layer in layers.items()}
    dropout = _common("dropout", {name: layer.dropout for name, layer in configs.items()})
    ranks = {name: layer.rank for name, layer in configs.items()}
    factors = {
        name: (_copy(layer.lora.A.weight), _copy(layer.lora.B.weight))
        for name, layer in layers.items()
    }
    wrappers = peft_names(model, list(layers))
    refuse_dropout(wrappers, dropout)
    linears = [name for name in layers if name not in wrappers]
    if fold_scale:
        widest, use_rslora = max(ranks.values()), False
        factors = {
            name: _folded(name, *factors[name], configs[name].scale, widest) for name in layers
        }
        ranks = dict.fromkeys(layers, widest)
        alphas: dict[str, float] = dict.fromkeys(layers, widest)
    else:
        # Without alpha the scale is 1, with rsLoRA and without.
        scaled = {n: c.use_rslora for n, c in configs.items() if c.alpha is not None}
        use_rslora = _common("use_rslora", scaled) if scaled else False
        alphas = {
            n: (math.sqrt(c.rank) if use_rslora else c.rank) if c.alpha is None else c.alpha
            for n, c in configs.items()
        }
    rank, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern(
        {n: int(a) if float(a).is_integer() else a for n, a in alphas.items()}
    )
    base = _innermost(model)
    wholes = {name: _copy(tensor) for name, tensor in whole_tensors(model, adapter).items()}
    fields, names = whole_fields(model, layers, adapter)
    config = {
        "peft_type": "LORA",
        "task_type": task_type(base, fields["modules_to_save"] or ()),
        "base_model_name_or_path": _base_name(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(linears),
        "exclude_modules": _namesakes(model, linears),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **fields,
    }
    if wrappers:  # earlier versions of PEFT do not know the field
        config["target_parameters"] = sorted(wrappers)
        factors |= {name: peft_factors(*factors[name]) for name in wrappers}
    return {
        PREFIX + wrappers.get(name, name) + suffix: tensor
        for name, pair in factors.items()
        for suffix, tensor in zip(FACTORS.values(), pair, strict=True)
    } | {PREFIX + key: wholes[name] for name, key in names.items()}, config


def _common(field: str, values: Mapping[str, Any]) -> Any:
    """The one value that all have, or an error that names who has which."""
    if len(set(values.values())) > 1:
        groups: dict[Any, list[str]] = {}
        for name, value in values.items():
            groups.setdefault(value, []).append(name)
        shown = listed([f"{value} on {listed(names)}" for value, names in groups.items()], 4)
        fold = " with fold_scale=True, or" if field == "use_rslora" else ""
        raise ValueError(
            f"PEFT's format has one {field} for all modules, the model has {shown}; "
            f"save{fold} to a .safetensors file, which keeps each"
        )
    return next(iter(values.values()))


def _default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the names that have another, longest name first."""
    default = Counter(values.values()).most_common(1)[0][0]
    others = sorted((n for n in values if values[n] != default), key=lambda n: (-len(n), n))
    return default, {f"^{re.escape(name)}": values[name] for name in others}


def _copy(tensor: Tensor) -> Tensor:
    return whole(tensor.detach()).cpu().clone(memory_format=torch.contiguous_format)


def _folded(name: str, a: Tensor, b: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of rank ``rank`` whose product is ``scale·B·A``: the rest is zeros."""
    wide = torch.promote_types(b.dtype, torch.float32)
    scaled = (b.to(wide) * scale).to(b.dtype)
    if not torch.isfinite(scaled).all():
        raise ValueError(
            f"fold_scale: {scale:g} times B of {name!r} is not finite in {b.dtype}; "
            "save without fold_scale"
        )
    missing = rank - a.shape[-2]
    return F.pad(a, (0, 0, 0, missing)), F.pad(scaled, (0, missing))


def _innermost(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that leave names alone."""
    return [module for name, module in model.named_modules() if not strip_wrappers(name)][-1]


def _base_name(base: nn.Module) -> str | None:
    name = getattr(getattr(base, "config", None), "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _namesakes(model: nn.Module, layers: Iterable[str]) -> str | None:
    """A regular expression for the modules whose names merely end in an adapted one's."""
    endings = tuple(f".{name}" for name in layers)
    names = {strip_wrappers(name) for name in own_modules(model)} - set(layers)
    return "|".join(re.escape(n) for n in sorted(names) if n.endswith(endings)) or None
