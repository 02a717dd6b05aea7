"""What an adapter's file holds, whatever the model.

Nothing is unpickled, and every key, dtype and value is looked at before anyone gets it.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from torch import Tensor

from ..config import LayerConfig
from ..linear.module import DTYPES
from .peft_reading import read_directory
from .targets import strip_wrappers

SUFFIXES = {"A": ".lora.A.weight", "B": ".lora.B.weight"}
METADATA, VERSION = "lora_kernels", 1
Value = TypeVar("Value")


class AdapterMismatchError(ValueError):
    """An adapter file does not fit the model, or is not an adapter; the model is unchanged."""


def read_adapter(
    path: str | os.PathLike[str],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, LayerConfig]]:
    """What an adapter holds: ``{module: {"A": [R, K], "B": [N, R]}}`` and, where the file
    says it, ``{module: LayerConfig}``. Wrapper prefixes are dropped from the names.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora`.
    """
    path = Path(path)
    state, described = _read(path)
    return _pairs(state, path), described


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


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, LayerConfig]]:
    """The tensors, wrapper prefixes dropped, and the layers that metadata or config describe."""
    kind = kind_of(path)
    if kind == "directory":
        try:
            state, described = read_directory(path)
            return without_wrappers(state), described
        except ValueError as error:
            raise AdapterMismatchError(f"{path}: {error}") from None
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}; check the path")
    described = {}
    try:
        if kind == "torch":
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
                content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                described = _described((file.metadata() or {}).get(METADATA))
    except Exception as error:  # damaged files raise anything at all in torch.load
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise AdapterMismatchError(
                f"{path} is not a plain dictionary of tensors: it holds pickled objects, which "
                "could run code and are never loaded"
            ) from None
        # torch's own words on a pickle advise to load it unsafely.
        said = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
        raise AdapterMismatchError(
            f"{path} cannot be read as an adapter file, it may be damaged or of another kind{said}"
            "; fetch it again, or write it anew with save_lora"
        ) from None
    if not isinstance(content, Mapping):
        raise AdapterMismatchError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors"
        )
    try:
        return without_wrappers({str(key): value for key, value in content.items()}), described
    except ValueError as error:
        raise AdapterMismatchError(f"{path}: {error}") from None


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
    content = json.loads(metadata)
    if content["version"] != VERSION:
        raise ValueError(
            f"its metadata is of version {content['version']}, this library reads {VERSION}"
        )
    modules = content["modules"]
    return {name: LayerConfig(**layer) for name, layer in modules.items()}


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


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
