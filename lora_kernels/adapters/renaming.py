"""Names of modules that transformers has changed since an adapter was saved.

It knows its own older names, so that base checkpoints go on loading: transformers 4.52 moved what
was ``language_model.model`` of vision models to ``model.language_model``. PEFT renames an
adapter's by the same lists. They are asked of the model: nothing is imported here.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from .content import Content, RenamedTensors
from .targets import strip_wrappers

Value = TypeVar("Value")


def with_todays_names(model: nn.Module, content: Content) -> Content:
    """``content`` with names that ``model`` has not replaced by those that it has now.

    A name is left as it is where transformers knows no newer one, or the newer one is not there.
    """
    known = {strip_wrappers(name) for name, _ in model.named_modules()}
    if known.issuperset(content.pairs):
        return content
    rename = _renamer(model)

    def today(module: str) -> str:
        if module in known:
            return module
        new = rename(f"{module}.weight").removesuffix(".weight")
        return new if new in known else module

    def parameter(name: str) -> str:
        module, dot, attribute = name.rpartition(".")
        return today(module) + dot + attribute

    renamed = {name: today(name) for name in content.pairs}
    if len(set(renamed.values())) < len(renamed):
        return content  # two old names of one module: let it be said what does not fit
    return replace(
        content,
        pairs=_rekeyed(content.pairs, today),
        described=_rekeyed(content.described, today),
        whole=_rekeyed(content.whole, parameter),
        copies=_rekeyed(content.copies, parameter),
        base=RenamedTensors(content.base, {parameter(name): name for name in content.base}),
    )


def _rekeyed(values: Mapping[str, Value], rename: Callable[[str], str]) -> dict[str, Value]:
    return {rename(name): value for name, value in values.items()}


def _renamer(model: nn.Module) -> Callable[[str], str]:
    """From a parameter's older name to today's, by what transformers says of the model."""
    base = [module for name, module in model.named_modules() if not strip_wrappers(name)][-1]
    patterns = getattr(base, "_checkpoint_conversion_mapping", None)  # transformers 4
    if isinstance(patterns, Mapping) and patterns:
        return lambda name: _first_match(patterns, name)
    entries = [entry for entry in _conversions(base) if not hasattr(entry, "operations")]

    def rename(name: str) -> str:
        for entry in entries:
            name = entry.rename_source_key(name)[0]
        return name

    return rename


def _conversions(base: nn.Module) -> Iterable[Any]:
    """The renamings of transformers 5, which has been imported if the model is one of its own."""
    home = sys.modules.get("transformers.conversion_mapping")
    ask = getattr(home, "get_model_conversion_mapping", None)
    if ask is None or not hasattr(base, "base_model_prefix"):
        return ()
    return ask(base)


def _first_match(patterns: Mapping[str, str], name: str) -> str:
    for pattern, new in patterns.items():
        renamed, count = re.subn(pattern, new, name)
        if count:
            return renamed
    return name
