"""What an adapter's file holds, whatever the model.

Nothing is unpickled, and every key, dtype and value is looked at before anyone gets it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import LayerConfig
from ..linear.module import DTYPES
from .peft_reading import CONFIG, TENSORS, holds_peft_files, read_directory
from .targets import strip_wrappers
from .tensor_files import LazyTensors, read_checkpoint, read_pickled

SUFFIXES = {"A": ".lora.A.weight", "B": ".lora.B.weight"}
METADATA, VERSION = "lora_kernels", 1
# The adapter that lies beside a checkpoint of the whole model.
BESIDE = "lora.safetensors"
Value = TypeVar("Value")


class AdapterMismatchError(ValueError):
    """An adapter file does not fit the model, or is not an adapter; the model is unchanged."""


@dataclass(frozen=True)
class Content:
    """What a file holds, by names without wrapper prefixes.

    Attributes:
        pairs: ``{module: {"A": [R, K], "B": [N, R]}}``.
        described: configuration of each module, where the file says it.
        copies: tensors of the base model that lie beside an adapter and belong to it if they are
            not the model's own, ``{"<module>.weight": tensor}``.
        base: tensors of a checkpoint of the whole model, each read when it is asked for.
    """

    pairs: dict[str, dict[str, Tensor]]
    described: dict[str, LayerConfig]
    copies: Mapping[str, Tensor] = field(default_factory=dict)
    base: Mapping[str, Tensor] = field(default_factory=dict)


def read_adapter(
    path: str | os.PathLike[str],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, LayerConfig]]:
    """What an adapter holds: ``{module: {"A": [R, K], "B": [N, R]}}`` and, where the file
    says it, ``{module: LayerConfig}``. Wrapper prefixes are dropped from the names.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora`.
    """
    content = read_content(Path(path))
    return content.pairs, content.described


def read_content(path: Path) -> Content:
    """All that ``path`` holds of an adapter.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora`.
    """
    state, content = _read(path)
    return replace(content, pairs=_pairs(state, path))


def holds_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether the names in a file, or a directory in PEFT's format, are an adapter's.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora` on unreadable files.
    """
    return any(key.endswith(tuple(SUFFIXES.values())) for key in _read(Path(path))[0])


def kind_of(path: Path) -> str:
    """``"torch"``, ``"safetensors"`` or ``"directory"``: what the path says it is or shall be."""
    if path.is_dir() or not (path.suffix or path.exists()):
        return "directory"
    if path.suffix in (".pth", ".pt"):
        return "torch"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise ValueError(
        "path must end in .pth, .pt or .safetensors, or for PEFT's format be a directory (one with "
        f"a dot in its name must exist), got {str(path)!r}"
    )


def _read(path: Path) -> tuple[dict[str, Any], Content]:
    """The tensors that are an adapter's or nobody's, by clean names, and what else is there."""
    kind = kind_of(path)
    try:
        if kind == "directory":
            return _read_directory(path)
        if not path.is_file():
            raise FileNotFoundError(f"no adapter file at {path}; check the path")
        described: dict[str, LayerConfig] = {}
        state: Mapping[str, Any]
        if kind == "torch":
            state = read_pickled(path)
        else:
            state = LazyTensors(path)
            described = _described(state.metadata.get(METADATA))
        return _without_base(state, described)
    except ValueError as error:
        raise AdapterMismatchError(f"{path}: {error}") from None


def _read_directory(directory: Path) -> tuple[dict[str, Any], Content]:
    if holds_peft_files(directory):
        state, described, copies = read_directory(directory)
        return without_wrappers(state), Content({}, described, copies=without_wrappers(copies))
    if (directory / BESIDE).is_file():
        return _read(directory / BESIDE)
    checkpoint = read_checkpoint(directory)
    if checkpoint is not None and any(key.endswith(SUFFIXES["A"]) for key in checkpoint):
        return _without_base(checkpoint, {})
    raise FileNotFoundError(
        f"no adapter at {directory}: neither {TENSORS} nor {CONFIG} is there, nor {BESIDE}, nor a "
        f"checkpoint with keys that end in {SUFFIXES['A']}; check the path"
    )


def _without_base(
    state: Mapping[str, Any], described: dict[str, LayerConfig]
) -> tuple[dict[str, Any], Content]:
    """Take the model itself out, if it is there: the frozen weight of every adapted module."""
    names = without_wrappers({key: key for key in state})
    adapted = [k.removesuffix(SUFFIXES["A"]) for k in names if k.endswith(SUFFIXES["A"])]
    if not adapted or not all(f"{name}.weight" in names for name in adapted):
        return {clean: state[key] for clean, key in names.items()}, Content({}, described)
    own = {clean: state[key] for clean, key in names.items() if ".lora." in clean}
    base = {clean: key for clean, key in names.items() if clean not in own}
    return own, Content({}, described, base=_Renamed(state, base))


class _Renamed(Mapping[str, Tensor]):
    """Some entries of a mapping under other names, each read when it is asked for."""

    def __init__(self, state: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
        self._state, self._names = state, names

    def __getitem__(self, name: str) -> Tensor:
        return self._state[self._names[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def without_wrappers(named: Mapping[str, Value]) -> dict[str, Value]:
    """The same values by their names without wrapper prefixes.

    Raises:
        ValueError: two names become one.
    """
    clean: dict[str, Value] = {}
    for name, value in named.items():
        if strip_wrappers(name) in clean:
            raise ValueError(
                f"{strip_wrappers(name)!r} is there twice, with and without a wrapper's prefix"
            )
        clean[strip_wrappers(name)] = value
    return clean


def _described(metadata: str | None) -> dict[str, LayerConfig]:
    if metadata is None:
        return {}
    try:
        content = json.loads(metadata)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this library reads {VERSION}")
        return {name: LayerConfig(**layer) for name, layer in content["modules"].items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read: {error!r}") from None


def _pairs(state: Mapping[str, Any], path: Path) -> dict[str, dict[str, Tensor]]:
    """Sort ``state`` into ``{module: {"A": …, "B": …}}``, or say what is wrong with it."""
    problems = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        factor = next((f for f, suffix in SUFFIXES.items() if key.endswith(suffix)), None)
        if factor is None:
            problems.append(f"unexpected key {key!r} (keys end in .lora.A.weight, .lora.B.weight)")
        elif not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            problems.append(f"{key}: expected a floating-point tensor, found {came}")
        elif tensor.layout != torch.strided:
            problems.append(f"{key}: expected a dense tensor, found {tensor.layout}")
        elif tensor.dim() != 2 or 0 in tensor.shape:
            problems.append(f"{key}: expected a matrix, found shape {tuple(tensor.shape)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key}: holds NaN or infinity")
        else:
            pairs.setdefault(key.removesuffix(SUFFIXES[factor]), {})[factor] = tensor
    for name, pair in pairs.items():
        problems += [
            f"missing key {name}{suffix}"
            for factor, suffix in SUFFIXES.items()
            if factor not in pair and name + suffix not in state
        ]
    if problems or not pairs:
        what = "\n  ".join(problems) if problems else "it holds no tensors"
        raise AdapterMismatchError(
            f"{path} is not a LoRA adapter that can be loaded; nothing was changed.\n  {what}"
        )
    return pairs
