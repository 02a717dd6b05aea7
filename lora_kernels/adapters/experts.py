"""LoRA on the parameters of fused experts: which they are, put in, taken out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..config import LayerConfig, LoRAConfig
from ..dispatch import multiplies_by_itself
from ..experts.module import LoRAParameter, new_group_lora
from ..linear.factors import DTYPES, LoRA
from .experts_layer import PREFIX, ExpertsWithLoRA, base_of, holders, with_lora
from .sharding import is_sharded
from .targets import ends_in_name, strip_wrappers
from .wording import listed

_PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
_FLAGS = ("is_concatenated", "is_transposed", "has_bias", "has_gate")
# What an experts module of transformers may say of itself, and this package computes.
_KNOWN = {*_FLAGS, "has_post_expert_norm"}


def expert_parameters(model: nn.Module) -> dict[str, nn.Module]:
    """The 3-D parameters of ``model`` by name, in module order, with the module that has each."""
    return {
        f"{prefix}.{name}" if prefix else name: module
        for prefix, module in model.named_modules()
        if not isinstance(module, LoRAParameter)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3 and not _is_factor(prefix)
    }


def _is_factor(prefix: str) -> bool:
    return any(part.startswith(PREFIX) for part in prefix.split("."))


def find_parameters(
    model: nn.Module, config: LoRAConfig, left_out: Sequence[str] = ()
) -> list[str]:
    """Names of the parameters that ``config.target_parameters`` means, in module order. Modules in
    ``left_out`` are trained whole.

    Raises:
        ValueError, TypeError: as `apply_lora`.
    """
    wanted = config.target_parameters
    if not wanted:
        return []
    known = expert_parameters(model)
    for suffix in wanted:
        if any(ends_in_name(name, suffix) for name in known):
            continue
        bare = [name for name, _ in model.named_parameters() if ends_in_name(name, suffix)]
        if bare:
            raise TypeError(
                f"target_parameters has {suffix!r}, and {bare[0]!r} is no weight of fused experts "
                "[experts, out, in]; name the linear that has it in target_modules"
            )
        endings = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
        close = difflib.get_close_matches(suffix.rpartition(".")[2], endings, n=3, cutoff=0.5)
        has = f"the model's experts have {listed(endings)}" if endings else "it has no such experts"
        hint = f"did you mean {close}?" if close else has
        raise ValueError(f"target_parameters has {suffix!r}, which is no parameter; {hint}")
    found = [name for name in known if any(ends_in_name(name, suffix) for suffix in wanted)]
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        found = [n for n in found if not re.fullmatch(excluded, strip_wrappers(n))]
    else:
        found = [n for n in found if not any(ends_in_name(n, e) for e in excluded or ())]
    if not found:
        raise ValueError("exclude_modules leaves none of the parameters targeted")
    for name in found:
        if whole := [module for module in left_out if name.startswith(f"{module}.")]:
            raise ValueError(f"target {name!r} is in {whole[0]!r}, which is trained whole")
        if refusal := refusal_of(known[name], name.rpartition(".")[2]):
            raise TypeError(f"target {name!r}: {refusal}")
    return found


def refusal_of(module: nn.Module, name: str) -> str:
    """Why LoRA cannot go on this parameter of a module; empty where it can."""
    kind = base_of(type(module)) if isinstance(module, ExpertsWithLoRA) else type(module)
    weight = module._parameters[name]
    assert weight is not None
    if not all(isinstance(getattr(module, flag, None), bool) for flag in _FLAGS):
        return (
            f"{kind.__name__} does not say how its experts are kept, as those of transformers 5 do "
            "(is_transposed, has_bias, has_gate); load the model with transformers 5"
        )
    flags = {f for f in vars(module) if f.startswith(("has_", "is_"))}
    if strange := sorted(flags - _KNOWN):
        return f"{kind.__name__} has {strange[0]}, which this package does not know"
    if name not in _PROJECTIONS or name == ("up_proj" if module.has_gate else "gate_up_proj"):
        return f"it is none of {kind.__name__}'s projections ({', '.join(_PROJECTIONS)})"
    if not hasattr(kind.forward, "__wrapped__"):
        return f"{kind.__name__}.forward is not the one of transformers' experts interface"
    if "forward" in module.__dict__:
        return "the module's forward has been replaced (by an offloading hook, say); hook it after"
    if weight.dtype not in DTYPES or multiplies_by_itself(type(weight)):
        return f"quantised experts are not supported, it is a {type(weight).__name__}"
    if is_sharded(weight):
        return "it is sharded already; put LoRA into the model first, then fully_shard it"
    return ""


def insert_experts(
    model: nn.Module,
    layers: Mapping[str, LayerConfig],
    adapter: str,
    dtypes: Mapping[str, torch.dtype],
    used: bool,
) -> None:
    """Give each named parameter an adapter of that configuration, in use or not."""
    known = expert_parameters(model)
    for full, layer in layers.items():
        module, name = known[full], full.rpartition(".")[2]
        holder = holders(module).get(name)
        if holder is not None:
            if adapter not in holder.lora_configs:
                holder.add_adapter(adapter, layer, dtypes.get(full))
            continue
        holder = LoRAParameter(
            module,
            name,
            layer,
            transposed=bool(module.is_transposed),
            adapter=adapter,
            lora_dtype=dtypes.get(full),
        )
        if not used:
            holder.use_adapters({})
        put(module, PREFIX + name, holder)


def release_experts(model: nn.Module, emptied: Sequence[nn.Module]) -> None:
    """Take these `LoRAParameter`s out; a module without any is again what it was."""
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, LoRAParameter) and any(child is other for other in emptied):
                put(module, name, None)


def put(module: nn.Module, attribute: str, child: nn.Module | None) -> None:
    """Make ``child`` a child of ``module``, or take out the one that is there.

    A module of experts is of the class that computes adapters for as long as it holds any.
    """
    if child is None:
        module._modules.pop(attribute, None)
    else:
        module._modules[attribute] = child
    kind: Any = type(module)
    if isinstance(child, LoRAParameter) and not isinstance(module, ExpertsWithLoRA):
        module.__class__ = with_lora(kind)
    elif isinstance(module, ExpertsWithLoRA) and not holders(module):
        module.__class__ = base_of(kind)


def trial_factors(
    module: nn.Module, name: str, layer: LayerConfig, lora_dtype: torch.dtype | None
) -> LoRA | str:
    """What the factors of a parameter would be, on the meta device; or why it cannot have any."""
    name = name.rpartition(".")[2]
    if refusal := refusal_of(module, name):
        return refusal
    weight = module._parameters[name]
    assert weight is not None
    if weight.is_meta:
        return "is on the meta device; give the model memory first"
    transposed = bool(module.is_transposed)
    return new_group_lora(weight, transposed, layer, lora_dtype, torch.device("meta"))
