"""Whether the single tokens that a file has trained fit a model; nothing is changed here."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .tokens import token_refusals
from .wholes import TOKEN_ROWS, Slot, slots

WEIGHT, INDEX = f".{TOKEN_ROWS}.weight", f".{TOKEN_ROWS}.index"


class TokenFit(NamedTuple):
    """What loading will do.

    Attributes:
        loaded: tensors to copy into the adapter's rows, by clean name.
        inserted: rows that the adapter has to be given first, ``{module: (indices, rows)}``.
        problems: what does not fit, a sentence each.
    """

    loaded: dict[str, Tensor]
    inserted: dict[str, tuple[Any, Tensor]]
    problems: list[str]


def of_tokens(name: str) -> bool:
    """Whether a tensor of that name is one of an adapter's token rows."""
    return name.endswith((WEIGHT, INDEX))


def fit_tokens(
    model: nn.Module,
    own: Mapping[str, Slot],
    values: Mapping[str, Any],
    may_insert: bool,
    adapter: str,
) -> TokenFit:
    """Hold the tensors of a file that are `of_tokens` against what ``adapter`` has, ``own``."""
    fit = TokenFit({}, {}, [])
    modules = dict.fromkeys(name.removesuffix(WEIGHT).removesuffix(INDEX) for name in values)
    for module in modules:
        rows, index = values.get(module + WEIGHT), values.get(module + INDEX)
        if rows is None or index is None:
            lost = module + (WEIGHT if rows is None else INDEX)
            fit.problems.append(f"missing key {lost}")
        elif index.dtype != torch.int64 or index.dim() != 1 or not rows.is_floating_point():
            fit.problems.append(f"{module}{INDEX}: expected token numbers, found {index.dtype}")
        elif rows.dim() != 2 or len(rows) != len(index):
            fit.problems.append(
                f"{module}{WEIGHT}: expected {len(index)} rows, found {list(rows.shape)}"
            )
        elif module + WEIGHT in own:
            order = torch.argsort(index)
            fit.problems.extend(_unlike(own[module + INDEX].value_of(adapter), index[order]))
            fit.loaded[module + WEIGHT] = rows[order]
        elif may_insert:
            fit.inserted[module] = (index, rows)
        else:
            fit.problems.append(f"in the file but not trained in the model: tokens of {module}")
    fit.problems.extend(
        token_refusals(model, {m: i.tolist() for m, (i, _) in fit.inserted.items()})
    )
    fit.problems.extend(_misshaped(model, fit.inserted))
    fit.problems.extend(_parted(model, fit.inserted))
    return fit


def _unlike(index: Tensor, wanted: Tensor) -> list[str]:
    if index.tolist() == wanted.tolist():
        return []
    return [
        f"the file has the tokens {wanted.tolist()[:8]}, the model trains "
        f"{index.tolist()[:8]}; give apply_lora those trainable_token_indices"
    ]


def _misshaped(model: nn.Module, tokens: Mapping[str, tuple[Any, Tensor]]) -> list[str]:
    found = slots(model)
    return [
        f"{name}{WEIGHT}: expected rows of {slot.value.shape[-1]}, found {list(rows.shape)}"
        for name, (_, rows) in tokens.items()
        if (slot := found.get(f"{name}.weight")) and slot.value.shape[-1] != rows.shape[1]
    ]


def _parted(model: nn.Module, tokens: Mapping[str, tuple[Any, Tensor]]) -> list[str]:
    """Modules that are tied in the model and have rows that differ in the file."""
    found = slots(model)
    known = [name for name in tokens if f"{name}.weight" in found]
    return [
        f"the tokens of {a} and {b} differ, and the model ties the two"
        for a, b in itertools.combinations(known, 2)
        if found[f"{a}.weight"].value is found[f"{b}.weight"].value
        and not torch.equal(tokens[a][1], tokens[b][1])
    ]
