"""Files of tensors, read without unpickling code: one, or the several of a sharded checkpoint.

What cannot be read raises a plain ValueError, to which the caller adds the path.
"""

from __future__ import annotations

import json
import pickle
import re
from collections import ChainMap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from .files import refuse_strange_file


def read_pickled(path: Path) -> dict[str, Any]:
    """A dictionary that ``torch.save`` wrote, on the CPU; mapped, where its format allows it.

    Raises:
        ValueError: it is damaged, holds code, or holds something else.
    """
    try:
        content = _unpickled(path)
    except BaseException as error:  # damaged files raise anything at all in torch.load
        pass_on_what_is_no_damage(error, path)
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
    for key, value in content.items():
        if not isinstance(key, str):
            raise ValueError(f"{path.name} has a {type(key).__name__} for a name, expected text")
        # Those of other classes are refused where they are read, and passed over in a base.
        if type(value) in _PLAIN and (strange := strange_tensor(value)):
            raise ValueError(f"{key}: {strange}")
    refuse_overlapping(content, path)
    return dict(content)


def strange_tensor(tensor: Tensor) -> str:
    """Why a tensor out of a file is not a plain one, whose values lie there; empty where it is.

    It is asked before any value is read: an expanded view of few bytes can have any size.
    """
    if type(tensor) not in _PLAIN:
        return f"expected a plain tensor, found a {type(tensor).__name__}"
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "a nested one" if tensor.is_nested else str(tensor.layout)
        return f"expected a dense tensor, found {kind}"
    if tensor.is_meta:
        return "expected a tensor with values, found one on the meta device"
    if tensor.is_quantized:
        return f"expected a floating-point tensor, found {tensor.dtype}"
    there, needed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    if needed > there:
        return f"expected {needed} bytes for its shape, found an expanded view of {there}"
    return ""


def refuse_overlapping(tensors: Mapping[str, Any], path: Path) -> None:
    """Raise ValueError where views of the same bytes come to many times what the file holds."""
    views = [t for t in tensors.values() if isinstance(t, Tensor)]
    total = sum(view.numel() * view.element_size() for view in views)
    if total > _MOST_SHARED * max(path.stat().st_size, 2**16):
        raise ValueError(
            f"{path.name} holds {len(views)} tensors of {total} bytes together in a file of "
            f"{path.stat().st_size}; save a copy of each"
        )


_PLAIN = (Tensor, nn.Parameter)
# A tensor under two or three names is usual, a file of views of one another is not.
_MOST_SHARED = 8
_NO_MEMORY = re.compile(r"[Cc](?:annot|an't) allocate memory|not enough memory|out of memory")


def pass_on_what_is_no_damage(error: BaseException, path: Path) -> None:
    """Pass on what says nothing about the file: memory that has run out, and what stops us."""
    said = str(error)
    wanted = re.search(r"allocate (\d+) bytes", said)
    if wanted and int(wanted[1]) > _MOST_SHARED * path.stat().st_size:
        return  # more than the file can hold
    if isinstance(error, MemoryError) or _NO_MEMORY.search(said):
        raise MemoryError(f"no memory to read {path}: {_first_line(error)}") from error
    # Panics of safetensors are BaseExceptions.
    if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
        raise error


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
        except BaseException as error:  # of the library's own making, and its readers' kinds
            pass_on_what_is_no_damage(error, path)
            raise _unreadable(path, f" ({_first_line(error)})") from None

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        try:
            return self._file.get_tensor(name)
        except BaseException as error:  # of a dtype that this torch has not, say
            pass_on_what_is_no_damage(error, self._path)
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


def _first_line(error: BaseException) -> str:
    line = (str(error) or repr(error)).splitlines()[0]
    return line if len(line) < 200 else f"{line[:200]} …"
