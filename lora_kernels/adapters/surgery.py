"""Put LoRA into a model, switch it off, take it out.

Everything is checked before the first module is touched: a call that raises leaves the model as
it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from ..config import LayerConfig, LoRAConfig
from ..linear.module import DISABLED, MERGED, LoRALinear
from .sharding import refuse_sharded, reshard
from .targets import find_targets, find_whole_modules, refuse_second_application, strip_wrappers
from .tokens import drop_tokens, find_token_modules, insert_tokens, token_refusals
from .wholes import (
    bare,
    drop_wholes,
    insert_wholes,
    names_inside,
    refusals,
    slots,
    whole_parameters,
)


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
    modules_to_save: Sequence[str] | None = None,
    bias: str = "none",
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    verbose: bool = True,
    config: LoRAConfig | None = None,
) -> list[str]:
    """Replace the targeted ``nn.Linear`` modules of ``model`` by `LoRALinear`, in place.

    The weights are shared, not copied, and nothing is frozen: see `mark_only_lora_as_trainable`.

    Args:
        model: any module; its linears are adapted wherever they sit.
        rank, alpha, dropout, target_modules, exclude_modules, rank_pattern, alpha_pattern,
            use_rslora, modules_to_save, bias, trainable_token_indices: see `LoRAConfig`.
        verbose: print ``apply lora on module: <name>`` for each, and ``train module whole: <name>``
            for those that are trained and saved whole.
        config: all of the above at once; the others must then be left at their defaults.

    Returns:
        The names of the adapted modules, in module order.

    Raises:
        TypeError: a target is not exactly an ``nn.Linear`` with a floating-point weight.
        ValueError: a target matches nothing, the model carries LoRA already, a weight is tied to
            another module or sharded, a module to save cannot be trained, or an argument is out of
            range. The model is left as it was.
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
    )
    if config is None:
        config = given
    elif not isinstance(config, LoRAConfig):
        raise TypeError(f"config must be a LoRAConfig, got {type(config).__name__}")
    elif given != LoRAConfig():
        raise ValueError("config and its single arguments were both given; use one of the two")
    whole_modules = find_whole_modules(model, config)
    names = find_targets(model, config, whole_modules)
    wholes = _parameters_to_save(model, config.bias, names, whole_modules)
    if problems := refusals(model, wholes):
        raise ValueError(f"cannot train what modules_to_save or bias asks for: {problems[0]}")
    tokens = find_token_modules(model, config)
    taken = [strip_wrappers(name) for name in (*whole_modules, *names)]
    problems = [f"{n!r} is adapted or trained whole already" for n in tokens if n in taken]
    if problems := problems or token_refusals(model, tokens):
        raise ValueError(f"cannot train what trainable_token_indices asks for: {problems[0]}")
    insert_lora(model, {name: config.layer(strip_wrappers(name)) for name in names})
    insert_wholes(model, wholes)
    insert_tokens(model, {name: (indices, None) for name, indices in tokens.items()})
    if verbose:
        for name in names:
            print(f"apply lora on module: {name}")
        for name in whole_modules:
            print(f"train module whole: {name}")
        for name, indices in tokens.items():
            print(f"train tokens of module: {name}, {len(indices)}")
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


def insert_lora(model: nn.Module, layers: Mapping[str, LayerConfig]) -> None:
    """Replace each named module of ``model`` by a LoRALinear of that configuration.

    Raises:
        TypeError, ValueError: as `apply_lora`, before anything is changed.
    """
    reshard(model)
    modules = dict(model.named_modules())
    refuse_second_application(modules)
    owners = parameter_owners(model)
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
    replace_modules(model, made)


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Run the bare base model for the length of the ``with``; may be nested.

    Raises:
        ValueError: the model carries no LoRA or is inside `merged_lora`.
    """
    layers = list(require_lora(model, "disable_lora").values())
    if any(layer._lora_state == MERGED for layer in layers):
        raise ValueError("disable_lora inside merged_lora; leave the merged_lora block first")
    before = [layer._lora_state for layer in layers]
    with bare(model):
        try:
            for layer in layers:
                layer._lora_state = DISABLED
            yield
        finally:
            for layer, state in zip(layers, before, strict=True):
                layer._lora_state = state


def remove_lora(model: nn.Module) -> list[str]:
    """Take the adapter out: every LoRALinear becomes the ``nn.Linear`` it was made from, and what
    was trained whole what it was before.

    Returns:
        The names of the modules.

    Raises:
        ValueError: the model carries no LoRA, is inside `merged_lora`, or is sharded.
    """
    layers = require_lora(model, "remove_lora")
    refuse_root(model)
    if any(layer._lora_state == MERGED for layer in layers.values()):
        raise ValueError("remove_lora inside merged_lora; leave the merged_lora block first")
    refuse_sharded_layers(model, layers)
    drop_wholes(model)
    drop_tokens(model)
    replace_modules(model, {id(layer): layer.to_linear() for layer in layers.values()})
    return list(layers)


def mark_only_lora_as_trainable(model: nn.Module) -> None:
    """Set ``requires_grad`` on `lora_parameters`, and clear it on all others.

    Raises:
        ValueError: the model carries no LoRA.
    """
    trained = {id(parameter) for parameter in lora_parameters(model)}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The weights of A and B of every LoRALinear, in module order, and then the parameters that are
    trained whole (``modules_to_save``, ``bias``), as a list to use many times.

    Raises:
        ValueError: the model carries no LoRA.
    """
    layers = require_lora(model, "lora_parameters")
    reshard(model)
    factors = [p for layer in layers.values() for p in layer.lora.parameters()]
    return factors + whole_parameters(model)


def require_lora(model: nn.Module, caller: str) -> dict[str, LoRALinear]:
    """As `lora_layers`, or ValueError where there are none."""
    layers = lora_layers(model)
    if not layers:
        raise ValueError(f"{caller}: model has no LoRALinear; call apply_lora or load_lora first")
    return layers


def refuse_sharded_layers(model: nn.Module, layers: Mapping[str, LoRALinear]) -> None:
    """Raise ValueError where a layer's weight is spread over processes."""
    reshard(model)
    for name, layer in layers.items():
        refuse_sharded(name, layer.weight, "save_lora, and load_lora into a model that is not")


def refuse_root(model: nn.Module) -> None:
    """Raise ValueError where the model itself is the layer, which nobody holds as a child."""
    if isinstance(model, LoRALinear):
        raise ValueError(
            "model itself is a LoRALinear and cannot be replaced from inside; put it into a "
            "module first, or use merged_lora or to_linear"
        )


def replace_modules(model: nn.Module, new: Mapping[int, nn.Module]) -> None:
    """Put ``new[id(old)]`` wherever old is a child, under every name it has."""
    for parent in list(model.modules()):
        for attribute, child in parent._modules.items():
            if id(child) in new:
                parent._modules[attribute] = new[id(child)]


def parameter_owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of the modules that hold each parameter, by the parameter's id."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    return owners
