"""Files of tensors, read without unpickling code: one, or the several of a sharded checkpoint.

What cannot be read raises a plain ValueError, to which the caller adds the path.
"""

from __future__ import annotations

import json
import pickle
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from .files import refuse_strange_file


def read_pickled(path: Path) -> dict[str, Any]:
    """A dictionary that ``torch.save`` wrote, on the CPU; mapped, where its format allows it.

    Raises:
        ValueError: it is damaged, holds code, or holds something else.
    """
    try:
        content = _unpickled(path)
    except Exception as error:  # damaged files raise anything at all in torch.load
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise ValueError(
                f"{path.name} is not a plain dictionary of tensors: it holds pickled objects, "
                "which could run code and are never loaded; if you trust it, load it where it "
                "was made and save its tensors alone, as .safetensors"
            ) from None
        # torch's own words on a pickle advise to load it unsafely.
        said = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
        raise _unreadable(path, said) from None
    if not isinstance(content, Mapping):
        raise ValueError(f"{path.name} holds a {type(content).__name__}, not a dictionary")
    return {str(key): value for key, value in content.items()}


def _unpickled(path: Path) -> Any:
    settings: dict[str, Any] = {"map_location": "cpu", "weights_only": True}
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"
    return torch.load(path, mmap=zipped, **settings)


class LazyTensors(Mapping[str, Tensor]):
    """The tensors of a ``.safetensors`` file by name, each read when it is asked for.

    Raises:
        ValueError: the file is damaged.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safetensors.safe_open(str(path), framework="pt", device="cpu")
            self._names = dict.fromkeys(self._file.keys())
            self.metadata: dict[str, str] = self._file.metadata() or {}
        except Exception as error:  # of the library's own making, and its readers' kinds
            raise _unreadable(path, f" ({_first_line(error)})") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except Exception as error:  # of a dtype that this torch has not, say
            raise _unreadable(self._path, f" ({name}: {_first_line(error)})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def read_checkpoint(directory: Path) -> Mapping[str, Any] | None:
    """The tensors of a whole model as ``save_pretrained`` writes it, or None where there is none.

    ``model.safetensors`` or ``pytorch_model.bin``, in one piece or in several that
    ``….index.json`` names. Nothing of ``.safetensors`` is read before it is asked for.

    Raises:
        ValueError: a piece is missing, damaged or a link that leads out of ``directory``.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        for file in (name, f"{name}.index.json"):
            if not (directory / file).exists():
                continue
            refuse_strange_file(directory, file)
            files = [file] if file == name else _pieces(directory / file)
            for piece in files:
                refuse_strange_file(directory, piece)
            read = LazyTensors if name.endswith(".safetensors") else read_pickled
            return ChainMap(*(read(directory / piece) for piece in files))  # type: ignore[arg-type]
    return None


def _pieces(index: Path) -> list[str]:
    try:
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        names = list(dict.fromkeys(files))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _unreadable(index, f" ({_first_line(error)})") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index.name} names {name!r}, expected a file beside it")
    return names


def _unreadable(path: Path, said: str) -> ValueError:
    return ValueError(
        f"{path.name} cannot be read, it may be damaged or of another kind"
        f"{said}; fetch it again, or write it anew with save_lora"
    )


def _first_line(error: Exception) -> str:
    line = (str(error) or repr(error)).splitlines()[0]
    return line if len(line) < 200 else f"{line[:200]} …"
