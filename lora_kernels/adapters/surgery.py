"""Put LoRA into a model, merge it, switch it off, take it out.

Everything is checked before the first module is touched: a call that raises leaves the model as
it was.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..config import LayerConfig, LoRAConfig, ends_in
from ..linear.module import ACTIVE, DISABLED, MERGED, LoRALinear
from .sharding import refuse_sharded, reshard

# Wrappers put these into module names; adapters are the same with and without them.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def strip_wrappers(name: str) -> str:
    """``name`` without the parts that DDP, compile, FSDP and checkpoint wrappers add."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Every LoRALinear in ``model`` by its name, in module order."""
    return {
        name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)
    }


def apply_lora(
    model: nn.Module,
    rank: int = 16,
    *,
    alpha: float | None = None,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    exclude_modules: Sequence[str] | str | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    use_rslora: bool = False,
    verbose: bool = True,
    config: LoRAConfig | None = None,
) -> list[str]:
    """Replace the targeted ``nn.Linear`` modules of ``model`` by `LoRALinear`, in place.

    The weights are shared, not copied, and nothing is frozen: see `mark_only_lora_as_trainable`.

    Args:
        model: any module; its linears are adapted wherever they sit.
        rank, alpha, dropout, target_modules, exclude_modules, rank_pattern, alpha_pattern,
            use_rslora: see `LoRAConfig`.
        verbose: print ``apply lora on module: <name>`` for each.
        config: all of the above at once; the others must then be left at their defaults.

    Returns:
        The names of the adapted modules, in module order.

    Raises:
        TypeError: a target is not exactly an ``nn.Linear`` with a floating-point weight.
        ValueError: a target matches nothing, the model carries LoRA already, a weight is tied to
            another module or sharded, or an argument is out of range. The model is left as it was.
    """
    given = LoRAConfig(
        rank=rank,
        alpha=alpha,
        dropout=dropout,
        target_modules=target_modules,
        exclude_modules=exclude_modules,
        rank_pattern=rank_pattern or {},
        alpha_pattern=alpha_pattern or {},
        use_rslora=use_rslora,
    )
    if config is None:
        config = given
    elif not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    elif given != LoRAConfig():
        raise ValueError("config and its single arguments were both given; use one of the two")
    names = find_targets(model, config)
    insert_lora(model, {name: config.layer(strip_wrappers(name)) for name in names})
    if verbose:
        for name in names:
            print(f"apply lora on module: {name}")
    return names


def find_targets(model: nn.Module, config: LoRAConfig) -> list[str]:
    """Names of the modules that ``config`` targets in ``model``, in module order.

    Raises:
        ValueError, TypeError: as `apply_lora`.
    """
    modules = dict(model.named_modules())
    linears = {name: m for name, m in modules.items() if isinstance(m, nn.Linear)}
    target = config.target_modules
    if target is None:
        found = [
            name
            for name, m in linears.items()
            if type(m) is nn.Linear and m.in_features == m.out_features
        ]
        wish = "a square linear (in_features == out_features)"
    elif target == "all-linear":
        head = _output_head(model)
        found = [
            name
            for name, m in linears.items()
            if type(m) is nn.Linear and m is not head and not _is_head_name(name)
        ]
        wish = "an nn.Linear"
    elif isinstance(target, str):
        found = [name for name in linears if re.fullmatch(target, strip_wrappers(name))]
        wish = f"the regular expression {target!r} as a whole (for an ending, pass a list)"
    else:
        for suffix in target:
            if not any(_ends_in(name, suffix) for name in modules):
                if bare := [n for n, _ in model.named_parameters() if _ends_in(n, suffix)]:
                    raise ValueError(
                        f"the target {suffix!r} is no module: {bare[0]!r} is a parameter by "
                        "itself, as fused experts are; only an nn.Linear can be adapted"
                    )
                raise ValueError(_no_match(f"the target {suffix!r}", suffix, linears))
        found = [name for name in modules if any(_ends_in(name, suffix) for suffix in target)]
        wish = f"any of {list(target)}"
    _refuse_second_application(modules)
    excluded = config.exclude_modules
    if isinstance(excluded, str):
        kept = [name for name in found if not re.fullmatch(excluded, strip_wrappers(name))]
    else:
        kept = [n for n in found if not any(_ends_in(n, suffix) for suffix in excluded or ())]
    if not kept:
        if found:
            raise ValueError(f"exclude_modules leaves none of the {len(found)} modules targeted")
        raise ValueError(_no_match(wish, target if isinstance(target, str) else "", linears))
    for argument in ("rank_pattern", "alpha_pattern"):
        for key in getattr(config, argument):
            if not any(ends_in(key, strip_wrappers(name)) for name in kept):
                raise ValueError(f"{argument} has {key!r}, which matches no adapted module: {kept}")
    return kept


def insert_lora(model: nn.Module, layers: Mapping[str, LayerConfig]) -> None:
    """Replace each named module of ``model`` by a LoRALinear of that configuration.

    Raises:
        TypeError, ValueError: as `apply_lora`, before anything is changed.
    """
    reshard(model)
    modules = dict(model.named_modules())
    _refuse_second_application(modules)
    owners = _parameter_owners(model)
    for name in layers:
        module = modules[name]
        if module is model:
            raise ValueError(
                "model itself is the linear to adapt and cannot be replaced from inside; "
                "use LoRALinear.from_linear(model)"
            )
        if type(module) is not nn.Linear:
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}, not exactly an nn.Linear; "
                "leave it out, by target_modules or exclude_modules"
            )
        refuse_sharded(name, module.weight, "put LoRA into the model first, then fully_shard it")
        parent = modules[name.rpartition(".")[0]]
        if isinstance(parent, nn.TransformerEncoderLayer):
            raise TypeError(
                f"target {name!r} is in an nn.TransformerEncoderLayer, whose inference path reads "
                "the weight past the module and would skip LoRA; leave it out"
            )
        tied = [other for other in owners.get(id(module.weight), []) if other != name]
        if tied:
            raise ValueError(
                f"target {name!r} shares its weight with {', '.join(map(repr, tied))}; LoRA on one "
                "of them would change neither the other nor a merged copy rightly; leave it out"
            )
    made: dict[int, nn.Module] = {}
    for name, layer in layers.items():
        try:
            made[id(modules[name])] = LoRALinear.from_linear(
                modules[name],  # type: ignore[arg-type]
                layer.rank,
                alpha=layer.alpha,
                dropout=layer.dropout,
                use_rslora=layer.use_rslora,
            )
        except TypeError as error:
            raise TypeError(f"target {name!r}: {error}") from None
    _replace(model, made)


def merge_lora(model: nn.Module) -> list[str]:
    """Fold ``scale·B·A`` into each weight, in place, and leave plain ``nn.Linear`` modules.

    The sum is taken in float32 (or wider) and rounded once into the weight's dtype.

    Returns:
        The names of the merged modules.

    Raises:
        ValueError: the model carries no LoRA, is inside `merged_lora` or `disable_lora`, a merged
            weight would not be finite in its dtype, or a weight is tied, sharded or on the meta
            device. Nothing is changed then.
    """
    layers = _mergeable(model)
    _refuse_root(model)
    for name, layer in layers.items():
        # All are known to be good before the first is written, without a second copy of each.
        _refuse_unmergeable(name, layer)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(_merged_weight(layer))
    _replace(model, {id(layer): layer.to_linear() for layer in layers.values()})
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


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Run the bare base model for the length of the ``with``; may be nested.

    Raises:
        ValueError: the model carries no LoRA or is inside `merged_lora`.
    """
    layers = list(_require_lora(model, "disable_lora").values())
    if any(layer._lora_state == MERGED for layer in layers):
        raise ValueError("disable_lora inside merged_lora; leave the merged_lora block first")
    before = [layer._lora_state for layer in layers]
    try:
        for layer in layers:
            layer._lora_state = DISABLED
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._lora_state = state


def remove_lora(model: nn.Module) -> list[str]:
    """Take the adapter out: every LoRALinear becomes the ``nn.Linear`` it was made from.

    Returns:
        The names of the modules.

    Raises:
        ValueError: the model carries no LoRA, is inside `merged_lora`, or is sharded.
    """
    layers = _require_lora(model, "remove_lora")
    _refuse_root(model)
    if any(layer._lora_state == MERGED for layer in layers.values()):
        raise ValueError("remove_lora inside merged_lora; leave the merged_lora block first")
    _refuse_sharded(model, layers)
    _replace(model, {id(layer): layer.to_linear() for layer in layers.values()})
    return list(layers)


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Set ``requires_grad`` on the parameters of A and B, and clear it on all others.

    Raises:
        ValueError: the model carries no LoRA.
    """
    trained = {id(parameter) for parameter in lora_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of A and B of every LoRALinear, in module order, as a list to use many times.

    Raises:
        ValueError: the model carries no LoRA.
    """
    layers = _require_lora(model, "lora_parameters")
    reshard(model)
    return [p for layer in layers.values() for p in layer.lora.parameters()]


def _require_lora(model: nn.Module, caller: str) -> dict[str, LoRALinear]:
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{caller}: model has no LoRALinear; call apply_lora or load_lora first")
    return layers


def _mergeable(model: nn.Module) -> dict[str, LoRALinear]:
    layers = _require_lora(model, "merge")
    _refuse_sharded(model, layers)
    owners = _parameter_owners(model)
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
    if layer.weight.is_meta:
        raise ValueError(f"cannot merge {name!r}: its weight is on the meta device; load it first")
    if 0 in layer.weight.stride():
        raise ValueError(f"cannot merge {name!r}: its weight is an expanded view; clone it first")
    if not _surely_finite(layer) and not torch.isfinite(_merged_weight(layer)).all():
        raise ValueError(f"cannot merge {name!r}: the sum would hold NaN or infinity")


def _surely_finite(layer: LoRALinear) -> bool:
    """Whether the largest values of the weight, A and B leave the sum no room to overflow."""
    operands = [t.detach() for t in (layer.weight, layer.lora.A.weight, layer.lora.B.weight)]
    if not all(t.numel() for t in operands):
        return False
    weight, a, b = (max(map(abs, torch.stack(t.aminmax()).tolist())) for t in operands)
    bound = weight + max(1.0, abs(layer.scale)) * layer.rank * a * b  # NaN if there is one anywhere
    return bound < 0.99 * min(torch.finfo(t.dtype).max for t in operands)


def _merged_weight(layer: LoRALinear) -> Tensor:
    """The weight with the branch folded in: summed in the widest of the dtypes, rounded once."""
    weight = layer.weight.detach()
    return (layer.delta_weight() + weight).to(weight.dtype)


def _refuse_sharded(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    reshard(model)
    for name, layer in layers.items():
        refuse_sharded(name, layer.weight, "save_lora, and load_lora into a model that is not")


def _refuse_root(model: nn.Module) -> None:
    if isinstance(model, LoRALinear):
        raise ValueError(
            "model itself is a LoRALinear and cannot be replaced from inside; put it into a "
            "module first, or use merged_lora or to_linear"
        )


def _replace(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new[id(old)]`` wherever old is a child, under every name it has."""
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if id(child) in new:
                parent._modules[attribute] = new[id(child)]


def _parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners


def _refuse_second_application(modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        if isinstance(module, LoRALinear):
            raise ValueError(
                f"model carries LoRA already (on {name!r}); call merge_lora or remove_lora first"
            )


def _ends_in(name: str, suffix: str) -> bool:
    clean = strip_wrappers(name)
    return suffix in (name, clean) or clean.endswith("." + suffix)


def _output_head(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def _is_head_name(name: str) -> bool:
    clean = strip_wrappers(name)
    return clean == "output" or clean.rpartition(".")[2] == "lm_head"


def _no_match(wish: str, word: str, linears: Mapping[str, nn.Module]) -> str:
    endings = list(dict.fromkeys(name.rpartition(".")[2] for name in linears if name))
    close = difflib.get_close_matches(word.rpartition(".")[2], endings, n=3, cutoff=0.5)
    hint = f"did you mean {close}?" if close else f"its linears end in {endings[:20]}"
    return f"no module of the model matches {wish}; {hint if endings else 'it has no linears'}"
