"""What a file holds of an adapter, as its readers give it to those who fit it to a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..config import LayerConfig


@dataclass(frozen=True)
class Content:
    """What a file holds, by names without wrapper prefixes.

    Attributes:
        pairs: ``{module: {"A": [R, K], "B": [N, R]}}``.
        described: configuration of each module, where the file says it.
        whole: parameters trained whole, ``{"<module>.<parameter>": tensor}``.
        copies: tensors of the base model that lie beside an adapter, and belong to it where they
            are not the model's own.
        base: tensors of a checkpoint of the whole model, each read when it is asked for.
        saved: ends of the names of modules that the file has whole, where the model has such.
        tying: parameters that the model ties to one in ``whole`` follow it.
        parameters: ends of the names of parameters that PEFT's wrappers are around, if any are.
        resolve: from a parameter's name to its configuration, where ``parameters`` are.
    """

    pairs: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    described: Mapping[str, LayerConfig] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    copies: Mapping[str, Any] = field(default_factory=dict)
    base: Mapping[str, Any] = field(default_factory=dict)
    saved: tuple[str, ...] = ()
    tying: bool = False
    parameters: tuple[str, ...] = ()
    resolve: Callable[[str], LayerConfig] | None = None


class RenamedTensors(Mapping[str, Any]):
    """Entries of a mapping under other names (new to old), each read when it is asked for."""

    def __init__(self, tensors: Mapping[str, Any], names: Mapping[str, str]) -> None:
        self._tensors, self._names = tensors, names

    def __getitem__(self, name: str) -> Any:
        return self._tensors[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
