"""PEFT's adapters of experts: two matrices a parameter, wrapped around each other on one module.

``lora_A.weight [E·r, in]`` counts experts slowest, ``lora_B.weight [out, r·E]`` fastest. The last
parameter of a module that is adapted has the outermost wrapper, whose keys are the module's own;
each one before has ``.base_layer`` once more in its keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from ..config import LayerConfig
from .content import Content
from .experts import expert_parameters
from .targets import ends_in_name, strip_wrappers

_INNER = ".base_layer"
_OF_ONE = re.compile(r"(.*\.experts)\.\d+\.")


def with_expert_names(model: nn.Module, content: Content) -> Content:
    """``content`` with the factors of experts by parameter, as this library has them.

    Raises:
        ValueError: they do not fit the model's parameters, or are of another layout.
    """
    known = {strip_wrappers(name): module for name, module in expert_parameters(model).items()}
    _refuse_single_experts(known, content.pairs)
    if not content.parameters:
        return content
    wrapped: dict[str, dict[int, str]] = {}
    for name in content.pairs:
        base = name.replace(_INNER, "")
        if any(full.rpartition(".")[0] == base for full in known):
            wrapped.setdefault(base, {})[name.count(_INNER)] = name
    found: dict[str, str] = {}
    for base, depths in wrapped.items():
        wanted = [
            full
            for full in known
            if full.rpartition(".")[0] == base
            and any(ends_in_name(full, suffix) for suffix in content.parameters)
        ]
        if sorted(depths) != list(range(len(wanted))):
            raise ValueError(
                f"it adapts {len(depths)} parameters of {base!r}, its target_parameters name "
                f"{len(wanted)} of the model's"
            )
        found |= {full: depths[depth] for depth, full in enumerate(reversed(wanted))}
    pairs = {name: pair for name, pair in content.pairs.items() if name not in found.values()}
    described = {n: layer for n, layer in content.described.items() if n not in found.values()}
    assert content.resolve is not None
    layers = {full: content.resolve(full) for full in found}
    swapped = _are_swapped(known, layers, {f: content.pairs[n] for f, n in found.items()})
    for full, name in found.items():
        pairs[full] = _by_expert(full, known[full], layers[full], content.pairs[name], swapped)
    return replace(content, pairs=pairs, described=described | layers)


def _refuse_single_experts(known: Iterable[str], names: Iterable[str]) -> None:
    fused = {full.rpartition(".")[0] for full in known}
    for name in names:
        match = _OF_ONE.match(name)
        if match and match[1] in fused:
            raise ValueError(
                f"it adapts each expert by itself ({name!r}), as transformers 4 keeps them, and "
                "the model has all experts of a layer in one parameter; merge it with "
                "transformers 4, or train it anew with target_parameters"
            )


def _shape(module: nn.Module, full: str) -> tuple[int, int, int]:
    """Experts, outputs and inputs."""
    weight = module._parameters[full.rpartition(".")[2]]
    assert weight is not None
    experts, n, k = weight.mT.shape if module.is_transposed else weight.shape
    return experts, n, k


def _are_swapped(
    known: Mapping[str, nn.Module],
    layers: Mapping[str, LayerConfig],
    pairs: Mapping[str, Mapping[str, Tensor]],
) -> bool:
    """Whether inputs and outputs have changed places, as in PEFT before it knew ``is_transposed``.

    Where all parameters are square it cannot be told, and is taken for no.
    """
    votes = set()
    for full, pair in pairs.items():
        _, n, k = _shape(known[full], full)
        if n != k:
            votes.add((pair["A"].shape[-1], pair["B"].shape[0]) == (n, k))
    return votes == {True}


def _by_expert(
    full: str,
    module: nn.Module,
    layer: LayerConfig,
    pair: Mapping[str, Tensor],
    swapped: bool,
) -> dict[str, Tensor]:
    """A ``[E, r, in]`` and B ``[E, out, r]``."""
    experts, n, k = _shape(module, full)
    if swapped:
        n, k = k, n
    a, b, rank = pair["A"], pair["B"], layer.rank
    for factor, tensor, shape in (("A", a, (experts * rank, k)), ("B", b, (n, rank * experts))):
        if tensor.shape != shape:
            raise ValueError(
                f"lora_{factor} of {full!r}: expected {list(shape)} for {experts} experts of rank "
                f"{rank}, found {list(tensor.shape)}"
            )
    a, b = a.view(experts, rank, k), b.reshape(n, rank, experts).permute(2, 0, 1)
    if swapped:
        a, b = b.mT, a.mT
    return {"A": a.contiguous(), "B": b.contiguous()}


def peft_names(model: nn.Module, adapted: Sequence[str]) -> dict[str, str]:
    """PEFT's name of the wrapper around each parameter of experts among ``adapted``."""
    by_module: dict[str, list[str]] = {}
    for name in expert_parameters(model):
        full = strip_wrappers(name)
        if full in adapted:
            by_module.setdefault(full.rpartition(".")[0], []).append(full)
    return {
        full: base + _INNER * depth
        for base, names in by_module.items()
        for depth, full in enumerate(reversed(names))
    }


def peft_factors(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A ``[E, r, in]`` and B ``[E, out, r]`` as PEFT's two matrices."""
    return a.flatten(0, 1).contiguous(), b.permute(1, 2, 0).flatten(1).contiguous()


def refuse_dropout(names: Iterable[str], dropout: float) -> None:
    """Raise ValueError where PEFT would refuse what is written."""
    first = next(iter(names), None)
    if first is not None and dropout:
        raise ValueError(
            f"PEFT computes no dropout on parameters, {first!r} has {dropout}; save to a "
            ".safetensors file, or set the dropout to 0"
        )
