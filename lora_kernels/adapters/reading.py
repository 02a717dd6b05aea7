"""What an adapter's file holds, whatever the model.

Nothing is unpickled, and every key, dtype and value is looked at before anyone gets it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..config import LayerConfig
from ..linear.factors import DEFAULT
from ..linear.module import DTYPES
from .checksums import CHECKSUM, refuse_other_bytes
from .content import Content, RenamedTensors
from .peft_reading import CONFIG, TENSORS, holds_peft_files, read_directory
from .targets import strip_wrappers
from .tensor_files import LazyTensors, read_checkpoint, read_pickled, strange_tensor
from .wording import listed, shortened

SUFFIXES = {"A": ".lora.A.weight", "B": ".lora.B.weight"}
METADATA, VERSION = "lora_kernels", 1
# Keys of a model's state dict: adapters that have a name, and the one that was given none.
_OF_OTHERS = re.compile(r"\.loras\.([^.]+)\.([AB]\.weight)$")
_OF_DEFAULT = re.compile(r"\.lora\.[AB]\.weight$")
_OF_BUFFERS = (torch.int64, torch.int32, torch.bool)
Value = TypeVar("Value")


class AdapterMismatchError(ValueError):
    """An adapter file does not fit the model, or is not an adapter; the model is unchanged."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


def read_adapter(
    path: str | os.PathLike[str],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, LayerConfig]]:
    """What an adapter holds: ``{module: {"A": [R, K], "B": [N, R]}}`` and, where the file
    says it, ``{module: LayerConfig}``. Wrapper prefixes are dropped from the names.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora`.
    """
    content = read_content(Path(path))
    return {name: dict(pair) for name, pair in content.pairs.items()}, dict(content.described)


def read_content(path: Path, adapter: str = DEFAULT) -> Content:
    """All that ``path`` holds of an adapter; of a checkpoint with several, of the one of this name,
    or else of ``default``.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora`.
    """
    state, content = _read(path, adapter)
    pairs, problems = _pairs(state)
    for name, pair in pairs.items():
        rank = content.described[name].rank if name in content.described else None
        found = {pair[f].shape[d] for f, d in (("A", -2), ("B", -1)) if f in pair}
        # PEFT's of experts `peft_experts` holds against the model.
        if rank is not None and found - {rank} and not content.parameters:
            problems.append(f"{name}: its metadata say rank {rank}, its factors have {max(found)}")
    for name, tensor in {**content.whole, **content.copies}.items():
        problems += tensor_problems(name, tensor, (*DTYPES, *_OF_BUFFERS))
    if problems or not pairs:
        what = "\n  ".join(problems or [f"it holds no tensors named ….{SUFFIXES['A'][1:]}"])
        raise AdapterMismatchError(
            f"{path} is not a LoRA adapter that can be loaded; nothing was changed.\n  {what}"
        )
    return replace(content, pairs=pairs)


def holds_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether the names in a file, or a directory in PEFT's format, are an adapter's.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora` on unreadable files.
    """
    return any(key.endswith(tuple(SUFFIXES.values())) for key in _read(Path(path), None)[0])


def beside(adapter: str) -> str:
    """The name of the file beside a checkpoint of the whole model in which an adapter lies."""
    return "lora.safetensors" if adapter == DEFAULT else f"lora.{adapter}.safetensors"


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


def _read(path: Path, adapter: str | None) -> tuple[dict[str, Any], Content]:
    """The tensors that are an adapter's or nobody's, by clean names, and what else is there.

    Without a name it is any adapter's.
    """
    kind = kind_of(path)
    try:
        if kind == "directory":
            return _read_directory(path, adapter)
        if not path.is_file():
            raise FileNotFoundError(f"no adapter file at {path}; check the path")
        if kind == "torch":
            return _sorted(_of_one(read_pickled(path), adapter), None)
        lazy = LazyTensors(path)
        if CHECKSUM in lazy.metadata:
            refuse_other_bytes(lazy.metadata, lazy)
        return _sorted(_of_one(lazy, adapter), lazy.metadata.get(METADATA))
    except ValueError as error:
        raise AdapterMismatchError(f"{path}: {error}") from None


def _read_directory(directory: Path, adapter: str | None) -> tuple[dict[str, Any], Content]:
    if holds_peft_files(directory):
        state, content = read_directory(directory)
        whole, copies = without_wrappers(content.whole), without_wrappers(content.copies)
        return without_wrappers(state), replace(content, whole=whole, copies=copies)
    own = directory / beside(adapter or DEFAULT)
    if own.is_file():
        return _read(own, adapter)
    checkpoint = read_checkpoint(directory) or {}
    named = any(match[1] == adapter for key in checkpoint if (match := _OF_OTHERS.search(key)))
    if (directory / beside(DEFAULT)).is_file() and not named:
        return _read(directory / beside(DEFAULT), adapter)
    checkpoint = _of_one(checkpoint, adapter)
    if any(key.endswith(SUFFIXES["A"]) for key in checkpoint):
        return _sorted(checkpoint, None)
    others = [p.name for p in sorted(directory.glob(beside("*"))) if p.name.count(".") == 2]
    hint = f"; {listed(others)} is, give load_lora its name or its path" if others else ""
    raise FileNotFoundError(
        f"no adapter at {directory}: neither {TENSORS} nor {CONFIG} is there, nor {own.name}, nor "
        f"a checkpoint with keys that end in {SUFFIXES['A']}{hint or '; check the path'}"
    )


def _of_one(state: Mapping[str, Any], adapter: str | None) -> Mapping[str, Any]:
    """Of what a model with several adapters saved, the base and one of them, by default's names."""
    others = {key: match for key in state if (match := _OF_OTHERS.search(key))}
    if not others:
        return state
    names = list(dict.fromkeys(match[1] for match in others.values()))
    has_default = any(key.endswith(SUFFIXES["A"]) for key in state if key not in others)
    if adapter is None and not has_default:
        adapter = names[0]
    if adapter in names:
        kept = {
            _OF_OTHERS.sub(r".lora.\2", key): key
            for key in state
            if (others[key][1] == adapter if key in others else not _OF_DEFAULT.search(key))
        }
    elif has_default:
        kept = {key: key for key in state if key not in others}
    else:
        raise ValueError(
            f"it holds {', '.join(map(repr, names))}, and no adapter named {adapter!r}; give "
            "load_lora one of these names"
        )
    return RenamedTensors(state, kept)


def _sorted(state: Mapping[str, Any], metadata: str | None) -> tuple[dict[str, Any], Content]:
    """Part the factors from what is trained whole, which metadata name, and from the base.

    Without metadata, what has the frozen weight of every adapted module is a checkpoint of the
    whole model; of anything else, what is no part of an adapted module is trained whole.
    """
    names = without_wrappers({key: key for key in state})
    own = {clean: state[key] for clean, key in names.items() if ".lora." in clean}
    rest = {clean: key for clean, key in names.items() if clean not in own}
    adapted = [key.removesuffix(SUFFIXES["A"]) for key in own if key.endswith(SUFFIXES["A"])]
    if metadata is not None:
        described, whole, copies = _described(metadata)
        said = {*whole, *copies}
        strange = {clean: state[key] for clean, key in rest.items() if clean not in said}
        return {**own, **strange}, Content(
            described=described,
            whole={clean: state[key] for clean, key in rest.items() if clean in whole},
            copies={clean: state[key] for clean, key in rest.items() if clean in copies},
        )
    # A linear's weight, or the experts' own parameter.
    weights = {name if name in rest else f"{name}.weight" for name in adapted}
    if adapted and weights <= rest.keys():
        return own, Content(base=RenamedTensors(state, rest))
    strange = {clean: state[key] for clean, key in rest.items() if clean in weights}
    plain = {clean: state[key] for clean, key in rest.items() if clean not in weights and adapted}
    return {**own, **strange}, Content(whole=plain)


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


def _described(metadata: str) -> tuple[dict[str, LayerConfig], list[str], list[str]]:
    """Modules, and the names of what is trained whole and of what is the base's."""
    try:
        content = json.loads(metadata)
        if content["version"] != VERSION:
            raise ValueError(f"version {content['version']}, this library reads {VERSION}")
        layers = {name: LayerConfig(**layer) for name, layer in content["modules"].items()}
        whole, copies = content.get("whole", []), content.get("copies", [])
        if not all(isinstance(name, str) for name in (*whole, *copies)):
            raise TypeError("names of parameters must be text")
        return layers, list(whole), list(copies)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"its metadata cannot be read: {error!r}") from None


def _pairs(state: Mapping[str, Any]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Sort ``state`` into ``{module: {"A": …, "B": …}}``, and say what is wrong with it."""
    problems = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        factor = next((f for f, suffix in SUFFIXES.items() if key.endswith(suffix)), None)
        if factor is None:
            problems.append(f"unexpected key {key!r} (keys end in .lora.A.weight, .lora.B.weight)")
        elif wrong := tensor_problems(key, tensor, DTYPES):
            problems += wrong
        elif tensor.dim() not in (2, 3) or 0 in tensor.shape:
            problems.append(f"{key}: expected a matrix, found shape {tuple(tensor.shape)}")
        else:
            pairs.setdefault(key.removesuffix(SUFFIXES[factor]), {})[factor] = tensor
    for name, pair in pairs.items():
        problems += [
            f"missing key {name}{suffix}"
            for factor, suffix in SUFFIXES.items()
            if factor not in pair and name + suffix not in state
        ]
    return pairs, problems


def tensor_problems(key: str, tensor: Any, dtypes: Sequence[torch.dtype]) -> list[str]:
    """What is wrong with a value of a file, whatever it is for."""
    if not isinstance(tensor, Tensor) or tensor.dtype not in dtypes:
        came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        return [f"{key}: expected a floating-point tensor, found {came}"]
    if strange := strange_tensor(tensor):
        return [f"{key}: {strange}"]
    return [] if torch.isfinite(tensor).all() else [f"{key}: holds NaN or infinity"]
