"""Which modules of a model a `LoRAConfig` means."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence

from torch import nn

from ..config import LoRAConfig, ends_in
from ..experts.module import LoRAParameter
from ..linear.factors import DEFAULT
from ..linear.holder import AdapterHolder
from ..linear.module import LoRALinear
from .bypass import bypassed_linears, said_of_bypassed
from .experts_layer import PREFIX
from .heads import classifier_heads, is_head_name
from .lookalikes import said_of_lookalikes
from .wording import listed, shortened

# What LoRA goes on: nothing derived from them, which may compute something else.
ADAPTABLE = (nn.Linear, LoRALinear)

# Wrappers put these into module names; adapters are the same with and without them.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def strip_wrappers(name: str) -> str:
    """``name`` without the parts that DDP, compile, FSDP and checkpoint wrappers add.

    What holds the adapters of a parameter is called as the parameter.
    """
    return ".".join(part.removeprefix(PREFIX) for part in name.split(".") if part not in _WRAPPERS)


def find_whole_modules(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the modules of ``model`` that are trained whole, in module order.

    Raises:
        ValueError: a name of ``modules_to_save`` matches none, or one without parameters.
    """
    named = config.modules_to_save
    modules = own_modules(model)
    for suffix in named or ():
        matches = [name for name in modules if ends_in_name(name, suffix)]
        if not matches:
            close = difflib.get_close_matches(suffix, [strip_wrappers(n) for n in modules], n=3)
            hint = (
                f"; did you mean {close}?"
                if close
                else f"; the model has {listed([strip_wrappers(n) for n in modules if n])}"
            )
            raise ValueError(f"modules_to_save has {suffix!r}, which is no module{hint}")
        if not any(_has_parameters(modules[name]) for name in matches):
            raise ValueError(f"modules_to_save has {suffix!r}: {matches[0]!r} has no parameters")
    heads = [] if named is not None and not named else classifier_heads(model)
    return [
        name
        for name, module in modules.items()
        if name in heads
        or (_has_parameters(module) and any(ends_in_name(name, s) for s in named or ()))
    ]


def own_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of ``model`` by name, without those that LoRALinears hold, and without what
    holds the adapters of a parameter."""
    found: dict[str, nn.Module] = {}
    layer = None
    for name, module in model.named_modules():
        if layer is None or not name.startswith(layer):
            layer = f"{name}." if name and isinstance(module, AdapterHolder) else layer
            if isinstance(module, LoRAParameter):
                continue
            found[name] = module
            if not name and isinstance(module, LoRALinear):
                return found
    return found


def find_targets(
    model: nn.Module,
    config: LoRAConfig,
    left_out: Sequence[str] = (),
    adapter: str = DEFAULT,
    parameters: Sequence[str] = (),
) -> tuple[list[str], list[str]]:
    """Names of the modules that ``config`` targets in ``model``, in module order, and a line for
    each kind of linears that could not be among them, if it targets no names.

    Modules inside of ``left_out``, which are trained whole, are not among them. With
    ``parameters`` that are adapted there need be none.

    Raises:
        ValueError, TypeError: as `apply_lora`.
    """
    modules = own_modules(model)
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    target = config.target_modules
    if target is None and parameters:
        refuse_second_application(dict(model.named_modules()), adapter)
        _check_patterns(config, parameters)
        return [], []
    if target is None:
        found = [
            name
            for name, m in linears.items()
            if type(m) in ADAPTABLE and m.in_features == m.out_features
        ]
        wish = "a square linear (in_features == out_features)"
    elif target == "all-linear":
        head = _output_head(model)
        heads = classifier_heads(model)
        found = [
            name
            for name, m in linears.items()
            if type(m) in ADAPTABLE
            and m is not head
            and not is_head_name(strip_wrappers(name))
            and not _is_inside(name, heads)
        ]
        wish = "an nn.Linear"
    elif isinstance(target, str):
        found = [name for name in linears if re.fullmatch(target, strip_wrappers(name))]
        wish = f"the regular expression {target!r} as a whole (for an ending, pass a list)"
    else:
        for suffix in target:
            if not any(ends_in_name(name, suffix) for name in modules):
                if bare := [n for n, _ in model.named_parameters() if ends_in_name(n, suffix)]:
                    raise ValueError(
                        f"the target {suffix!r} is no module: {bare[0]!r} is a parameter by "
                        "itself, as fused experts are; name it in target_parameters"
                    )
                raise ValueError(_no_match(f"the target {suffix!r}", suffix, modules))
        found = [name for name in modules if any(ends_in_name(name, suffix) for suffix in target)]
        wish = f"any of {listed(target)}"
    refuse_second_application(dict(model.named_modules()), adapter)
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        kept = [name for name in found if not re.fullmatch(excluded, strip_wrappers(name))]
    else:
        kept = [n for n in found if not any(ends_in_name(n, suffix) for suffix in excluded or ())]
    whole = [name for name in kept if _is_inside(name, left_out)]
    kept = [name for name in kept if name not in whole]
    said = []
    if target is None or target == "all-linear":
        bypassed = bypassed_linears(model)
        said = said_of_bypassed({name: bypassed[name] for name in kept if name in bypassed})
        kept = [name for name in kept if name not in bypassed]
        if target is not None:
            said += [f"leave out {line}" for line in said_of_lookalikes(modules)]
    if not kept:
        if whole:
            raise ValueError(
                f"all of the modules targeted are trained whole, as {whole[0]!r} is; target others "
                "too, or leave it out of modules_to_save (a classifier's head by an empty list)"
            )
        if found and said:
            raise ValueError(shortened("\n  ".join(["no module is left to adapt:", *said])))
        if found:
            raise ValueError(f"exclude_modules leaves none of the {len(found)} modules targeted")
        raise ValueError(_no_match(wish, target if isinstance(target, str) else "", modules))
    _check_patterns(config, [*kept, *parameters])
    return kept, said


def _check_patterns(config: LoRAConfig, adapted: Sequence[str]) -> None:
    """Raise ValueError where a key of a pattern matches nothing that is adapted."""
    for argument in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, argument):
            if not any(ends_in(key, strip_wrappers(name)) for name in adapted):
                raise ValueError(
                    f"{argument} has {key!r}, which matches no adapted module: {listed(adapted)}"
                )


def refuse_second_application(modules: Mapping[str, nn.Module], adapter: str = DEFAULT) -> None:
    """Raise ValueError where one of them has an adapter of this name already."""
    for name, module in modules.items():
        if isinstance(module, AdapterHolder) and adapter in module.lora_configs:
            what = "LoRA" if adapter == DEFAULT else f"an adapter named {adapter!r}"
            raise ValueError(
                f"model carries {what} already (on {name!r}); call merge_lora or remove_lora "
                "first, or give the new adapter another name"
            )


def ends_in_name(name: str, suffix: str) -> bool:
    """Whether ``suffix`` is a module's whole name or a dotted ending of it."""
    clean = strip_wrappers(name)
    return suffix in (name, clean) or clean.endswith("." + suffix)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _is_inside(name: str, modules: Sequence[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def _has_parameters(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _no_match(wish: str, word: str, modules: Mapping[str, nn.Module]) -> str:
    names = [name for name, module in modules.items() if type(module) in ADAPTABLE and name]
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    close = difflib.get_close_matches(word.rpartition(".")[2], endings, n=3, cutoff=0.5)
    hint = f"did you mean {close}?" if close else f"its linears end in {listed(endings, 20)}"
    first = f"no module of the model matches {wish}; {hint if endings else 'it has no nn.Linear'}"
    return shortened("\n  it has ".join([first, *said_of_lookalikes(modules)]))
