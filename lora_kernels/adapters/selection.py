"""Which adapters a model computes with."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..linear.holder import ACTIVE, DISABLED, MERGED, AdapterHolder
from .carried import (
    known_adapters,
    lora_layers,
    refuse_inside_block,
    require_lora,
)
from .changing import change_of, finish
from .rows import Rows, check_rows, rows_of, set_rows
from .wholes import Slot, rest_wholes, use_wholes, wake_wholes


class InUse:
    """What `use_lora` gives: as a ``with`` it brings back what was in use before."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        layers = lora_layers(model).values()
        self._before = {id(m): (m, m.adapters_in_use, rows_of(m)) for m in layers}

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        finish(self._bring_back)

    def _bring_back(self) -> None:
        with change_of(self._model):
            # Adapters may have come and gone meanwhile; what came is not in use.
            layers = lora_layers(self._model).values()
            names = {name for _, used, _ in self._before.values() for name in used}
            refuse_inside_block(self._model, "the end of use_lora")
            use_wholes(self._model, names)
            for layer in layers:
                _, used, rows = self._before.get(id(layer), (layer, {}, None))
                layer.use_adapters(used)
                set_rows(layer, rows)


def use_lora(
    model: nn.Module,
    names: str | Sequence[str] | None = None,
    *,
    weights: float | Sequence[float] | None = None,
    rows: Sequence[str | None] | None = None,
) -> InUse:
    """Compute with these adapters of ``model`` from now on, or, as a ``with``, for its length.

    It counts at once and lasts, as ``torch.set_grad_enabled``: ``use_lora(model, "fr")``; and
    ``with use_lora(model, "fr"):`` brings back what was in use before. Several are added up, each
    times its weight, and go to the kernels as one adapter of their total rank. On a layer that only
    some of them adapt, these alone count.

    With ``rows=["fr", "en", None]`` each row of a batch is computed with an adapter of its own, in
    training as well: as many rows as names, and where a model flattens them, each as long as the
    others. All share one product with the base weight.

    Nothing is frozen or thawed: see `mark_only_lora_as_trainable`, and call it after this.

    Args:
        model: carries the adapters.
        names: of one adapter, or a list of several; None for the base alone.
        weights: a number for each name, by default 1. It multiplies the adapter's own scale. What
            an adapter trains whole (``modules_to_save``, ``bias``) is used as it is.
        rows: an adapter's name, or None for the base alone, for each row of a batch, in place of
            ``names`` and ``weights``.

    Raises:
        TypeError: ``names`` or ``weights`` is of another kind.
        ValueError: the model carries no LoRA or none of a name, a weight is not finite, their
            number differs, two of them train the same parameter whole, or this is inside
            `disable_lora` or `merged_lora`; or an adapter of ``rows`` is on experts or trains
            something whole. What is in use stays as it was.
    """
    require_lora(model, "use_lora")
    if rows is not None and not (names is None and weights is None):
        raise ValueError("rows came with names or weights; give either rows or names")
    by_rows = None
    if rows is not None:
        wanted, by_rows = check_rows(model, rows), Rows(rows)
    else:
        wanted = [] if names is None else known_adapters(model, names, "names")
    numbers = _checked(weights, wanted)
    with change_of(model):
        refuse_inside_block(model, "use_lora")
        before = InUse(model)
        use_wholes(model, wanted)
        for layer in lora_layers(model).values():
            layer.use_adapters(dict(zip(wanted, numbers, strict=True)))
            set_rows(layer, by_rows)
        return before


def _checked(weights: Any, names: Sequence[str]) -> list[float]:
    if weights is None:
        return [1.0] * len(names)
    numbers = list(weights) if isinstance(weights, (list, tuple)) else [weights]
    for number in numbers:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"weights must be a number for each name, got {weights!r}")
        if not math.isfinite(number):
            raise ValueError(f"weights must be finite, got {weights!r}")
    if len(numbers) != len(names):
        raise ValueError(
            f"weights must be one number for each name of {list(names)}, got {len(numbers)}: "
            f"{weights!r}; leave them out for 1 each"
        )
    return [float(number) for number in numbers]


@contextmanager
def disable_lora(model: nn.Module) -> Iterator[None]:
    """Run the bare base model for the length of the ``with``; may be nested.

    It counts for the model, whichever thread calls it, until the last of the blocks that threads
    are inside of ends.

    Raises:
        ValueError: the model carries no LoRA or is inside `merged_lora`.
    """
    with change_of(model):
        layers = list(require_lora(model, "disable_lora").values())
        if any(layer._lora_state == MERGED for layer in layers):
            raise ValueError("disable_lora inside merged_lora; leave the merged_lora block first")
        resting = rest_wholes(model)
        for layer in layers:
            layer._lora_state = DISABLED
            layer._lora_blocks += 1
    try:
        yield
    finally:
        finish(lambda: _enable(model, layers, resting))


def _enable(model: nn.Module, layers: list[AdapterHolder], resting: list[Slot]) -> None:
    with change_of(model):
        wake_wholes(resting)
        for layer in layers:
            layer._lora_blocks -= 1
            if not layer._lora_blocks:
                layer._lora_state = ACTIVE
