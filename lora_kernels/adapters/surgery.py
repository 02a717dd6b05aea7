"""Put LoRA into a model, say what of it is trained, take it out.

Everything is checked before the first module is touched: a call that raises leaves the model as
it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..config import LayerConfig, LoRAConfig
from ..linear.factors import DEFAULT, check_adapter_name, factor_dtype
from ..linear.holder import MERGED, AdapterHolder
from ..linear.module import LoRALinear
from .bypass import refuse_bypassed
from .carried import (
    adapters_in_use,
    known_adapters,
    lora_layers,
    refuse_inside_block,
    require_lora,
)
from .changing import LOCK, change_of
from .experts import expert_parameters, find_parameters, insert_experts
from .grouping import check_group, group_linears
from .lookalikes import way_out
from .replacing import give_back_bases, parameter_owners, refuse_root, replace_modules
from .rows import refuse_rows
from .sharding import refuse_sharded, reshard
from .targets import (
    ADAPTABLE,
    find_targets,
    find_whole_modules,
    refuse_second_application,
    strip_wrappers,
)
from .tokens import drop_tokens, find_token_modules, has_tokens, insert_tokens, token_refusals
from .wholes import (
    drop_wholes,
    insert_wholes,
    names_inside,
    refusals,
    slots,
    use_wholes,
    whole_parameters,
    whole_values,
)


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
    modules_to_save: Sequence[str] | None = None,
    bias: str = "none",
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    target_parameters: Sequence[str] | None = None,
    verbose: bool = True,
    config: LoRAConfig | None = None,
    name: str = DEFAULT,
    lora_dtype: torch.dtype | None = None,
    group: bool | None = None,
) -> list[str]:
    """Replace the targeted ``nn.Linear`` modules of ``model`` by `LoRALinear`, in place, and give
    the targeted parameters of experts theirs.

    The weights are shared, not copied, and nothing is frozen: see `mark_only_lora_as_trainable`.

    A model may carry several adapters. Its first is in use at once; a further one waits for
    `use_lora`, and what the model computes stays as it is.

    Args:
        model: any module; its linears are adapted wherever they sit.
        rank, alpha, dropout, target_modules, exclude_modules, rank_pattern, alpha_pattern,
            use_rslora, modules_to_save, bias, trainable_token_indices, target_parameters: see
            `LoRAConfig`.
        verbose: print ``apply lora on module: <name>`` for each, ``train module whole: <name>``
            for those that are trained and saved whole, and what could not be adapted and why.
        config: all of the above but ``verbose`` at once; they must then be left at their defaults.
        name: of the adapter, by which others of the same model are told from it.
        lora_dtype: of A and B; by default each weight's own, or float32 where that has 16 bits.
        group: compute linears that are called with one tensor together, as q, k and v are, with
            one dropout mask; see `lora_linear_group`. None does so where it has been measured to
            pay, on a CPU. Together they have one backward: who takes gradients of one output alone
            and of another later needs ``retain_graph`` for it.

    Returns:
        The names of the adapted modules, in module order, and then of the adapted parameters.

    Raises:
        TypeError: a target is not exactly an ``nn.Linear`` with a floating-point weight, the model
            reads its weight past the module, a parameter is no weight of experts as transformers 5
            keeps them, or lora_dtype is no floating-point dtype.
        ValueError: a target matches nothing, the model carries an adapter of this name already, a
            weight is tied to another module or sharded, a module to save cannot be trained, or an
            argument is out of range. The model is left as it was.
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
        modules_to_save=modules_to_save,
        bias=bias,
        trainable_token_indices=trainable_token_indices,
        target_parameters=target_parameters,
    )
    if config is None:
        config = given
    elif not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    elif given != LoRAConfig():
        raise ValueError("config and its single arguments were both given; use one of the two")
    check_adapter_name(name)
    factor_dtype(torch.float32, lora_dtype)
    check_group(group)
    with change_of(model):
        return _apply(model, config, name, lora_dtype, verbose, group)


def _apply(
    model: nn.Module,
    config: LoRAConfig,
    name: str,
    lora_dtype: torch.dtype | None,
    verbose: bool,
    group: bool | None,
) -> list[str]:
    whole_modules = find_whole_modules(model, config)
    parameters = find_parameters(model, config, whole_modules)
    names, left_out = find_targets(model, config, whole_modules, name, parameters)
    wholes = _parameters_to_save(model, config.bias, names, whole_modules)
    if problems := refusals(model, wholes):
        raise ValueError(f"cannot train what modules_to_save or bias asks for: {problems[0]}")
    tokens = find_token_modules(model, config)
    taken = [strip_wrappers(n) for n in (*whole_modules, *names)]
    problems = [f"{n!r} is adapted or trained whole already" for n in tokens if n in taken]
    if problems := problems or token_refusals(model, tokens):
        raise ValueError(f"cannot train what trainable_token_indices asks for: {problems[0]}")
    names += parameters
    dtypes = None if lora_dtype is None else dict.fromkeys(names, lora_dtype)
    insert_lora(model, {n: config.layer(strip_wrappers(n)) for n in names}, name, dtypes, group)
    insert_wholes(model, wholes, name)
    insert_tokens(model, {n: (indices, None) for n, indices in tokens.items()}, name)
    use_wholes(model, adapters_in_use(model))
    if verbose:
        for target in names:
            print(f"apply lora on module: {target}")
        for module in whole_modules:
            print(f"train module whole: {module}")
        for module, indices in tokens.items():
            print(f"train tokens of module: {module}, {len(indices)}")
        for line in left_out:
            print(line)
    return names


def _parameters_to_save(
    model: nn.Module, bias: str, targets: Sequence[str], modules: Sequence[str]
) -> list[str]:
    """Clean names of the parameters and buffers that are trained whole, in module order."""
    inside = set(names_inside(model, modules))
    adapted = {f"{strip_wrappers(name)}.bias" for name in targets}
    return [
        name
        for name, slot in slots(model).items()
        if name in inside
        or (bias == "all" and slot.attribute == "bias")
        or (bias == "lora_only" and name in adapted)
    ]


def insert_lora(
    model: nn.Module,
    layers: Mapping[str, LayerConfig],
    adapter: str = DEFAULT,
    dtypes: Mapping[str, torch.dtype] | None = None,
    group: bool | None = None,
) -> None:
    """Make each named module of ``model`` a LoRALinear with an adapter of that configuration, and
    give each named parameter of experts one.

    It is in use at once if it is the model's first. A and B are of the module's dtype in
    ``dtypes``, or else as `factor_dtype` says. ``group`` as for `apply_lora`.

    Raises:
        TypeError, ValueError: as `apply_lora`, before anything is changed.
    """
    reshard(model)
    modules = dict(model.named_modules())
    refuse_second_application(modules, adapter)
    refuse_inside_block(model, "another adapter")
    owners = parameter_owners(model)
    of_experts = {n: layers[n] for n in expert_parameters(model) if n in layers}
    layers = {name: layer for name, layer in layers.items() if name not in of_experts}
    for name in layers:
        module = modules[name]
        if module is model and type(module) is nn.Linear:
            raise ValueError(
                "model itself is the linear to adapt and cannot be replaced from inside; "
                "use LoRALinear.from_linear(model)"
            )
        if type(module) not in ADAPTABLE:
            raise TypeError(
                f"target {name!r} is a {type(module).__name__}: "
                f"{way_out(module) or 'no linear; leave it out'}"
            )
        refuse_sharded(name, module.weight, "put LoRA into the model first, then fully_shard it")
        if has_tokens(module):
            raise ValueError(
                f"target {name!r} has single tokens that another adapter trains, which would hide "
                "LoRA's part of them; leave it out"
            )
        tied = [other for other in owners.get(id(module.weight), []) if other != name]
        if tied:
            raise ValueError(
                f"target {name!r} shares its weight with {', '.join(map(repr, tied))}; LoRA on one "
                "of them would change neither the other nor a merged copy rightly; leave it out"
            )
    refuse_bypassed(model, layers)
    dtypes = dtypes or {}
    made: dict[int, LoRALinear] = {}
    for name, layer in layers.items():
        module = modules[name]
        if isinstance(module, LoRALinear):
            continue
        try:
            made[id(module)] = LoRALinear.from_linear(
                module,  # type: ignore[arg-type]
                layer.rank,
                alpha=layer.alpha,
                dropout=layer.dropout,
                use_rslora=layer.use_rslora,
                name=adapter,
                lora_dtype=dtypes.get(name),
            )
        except TypeError as error:
            raise TypeError(f"target {name!r}: {error}") from None
    first = not lora_layers(model)
    if not first:
        for fresh in made.values():
            fresh.use_adapters({})
    for name, layer in layers.items():
        module = modules[name]
        if isinstance(module, LoRALinear) and adapter not in module.lora_configs:
            module.add_adapter(adapter, layer, dtypes.get(name))
    replace_modules(model, made)
    insert_experts(model, of_experts, adapter, dtypes, used=first)
    group_linears(model, group)


def remove_lora(model: nn.Module, name: str | None = None) -> list[str]:
    """Take the adapters out, or one of them: a LoRALinear without any becomes the ``nn.Linear`` it
    was made from, and what was trained whole what it was before.

    Args:
        model: carries LoRA.
        name: of the one adapter to take out; the others stay, in use as they were.

    Returns:
        The names of the modules it was on.

    Raises:
        ValueError: the model carries no LoRA or none of this name, is inside `merged_lora`, or is
            sharded.
    """
    with change_of(model):
        return _remove(model, name)


def _remove(model: nn.Module, name: str | None) -> list[str]:
    layers = require_lora(model, "remove_lora")
    refuse_rows(model, "remove_lora")
    if name is not None:
        known_adapters(model, name)
        layers = {n: layer for n, layer in layers.items() if name in layer.lora_configs}
    emptied = [layer for layer in layers.values() if name is None or len(layer.lora_configs) == 1]
    if model in emptied:
        refuse_root(model)
    if any(layer._lora_state == MERGED for layer in layers.values()):
        raise ValueError("remove_lora inside merged_lora; leave the merged_lora block first")
    refuse_sharded_layers(model, layers)
    drop_wholes(model, name)
    drop_tokens(model, unused=True)
    give_back_bases(model, emptied)
    for layer in layers.values():
        if name is not None and layer not in emptied:
            layer.remove_adapter(name)
    return list(layers)


def mark_only_lora_as_trainable(model: nn.Module, name: str | Sequence[str] | None = None) -> None:
    """Set ``requires_grad`` on `lora_parameters`, and clear it on all others.

    Call it before DDP, and wrap anew after a change: the gradients of what was frozen when DDP
    began are never averaged over the processes.

    Args:
        model: carries LoRA.
        name: of the adapter to train, or several; by default all that are in use. Others in use
            are computed and not trained.

    Raises:
        ValueError: the model carries no LoRA, or none of this name, or it is not in use and would
            get no gradients.
    """
    with LOCK:
        _mark(model, name)


def _mark(model: nn.Module, name: str | Sequence[str] | None) -> None:
    used = adapters_in_use(model)
    idle = [n for n in known_adapters(model, name) if n not in used] if name is not None else []
    if idle:
        raise ValueError(
            f"adapter {idle[0]!r} is not in use and would get no gradients; call "
            f"use_lora(model, {idle[0]!r}) first"
        )
    trained = {id(parameter) for parameter in lora_parameters(model, name)}
    before = [(p, p.requires_grad) for p in (*model.parameters(), *whole_values(model))]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(id(parameter) in trained)
    except BaseException:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
        raise


def lora_parameters(
    model: nn.Module, name: str | Sequence[str] | None = None
) -> list[nn.Parameter]:
    """The weights of A and B of every LoRALinear, in module order, and then the parameters that are
    trained whole (``modules_to_save``, ``bias``), as a list to use many times.

    Args:
        model: carries LoRA.
        name: of one adapter or several, whether they are in use or not; by default those in use.

    Raises:
        ValueError: the model carries no LoRA, none of this name, or none that is in use.
    """
    layers = require_lora(model, "lora_parameters")
    reshard(model)
    names = list(adapters_in_use(model)) if name is None else known_adapters(model, name)
    if not names:
        raise ValueError("no adapter is in use; call use_lora first, or name one")
    factors = [
        parameter
        for layer in layers.values()
        for adapter, lora in layer.adapters().items()
        if adapter in names
        for parameter in lora.parameters()
    ]
    return factors + whole_parameters(model, names)


def refuse_sharded_layers(model: nn.Module, layers: Mapping[str, AdapterHolder]) -> None:
    """Raise ValueError where a layer's weight is spread over processes."""
    reshard(model)
    for name, layer in layers.items():
        refuse_sharded(name, layer.weight, "save_lora, and load_lora into a model that is not")
