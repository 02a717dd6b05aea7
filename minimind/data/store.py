"""Where the tokens of a data set lie: in memory, or in flat files that are mapped into it.

Flat arrays of tokens and offsets, and not Arrow: a sample is then two reads and no object, the
files need no package that is not here anyway, and with two bytes a token, mask included, they are
smaller than Arrow's lists of int64 by a factor of eight. The samples themselves are kept beside
them, as packed JSON some dozens at a time: held-out questions are asked in their words.
"""

from __future__ import annotations

import copy
import json
import mmap
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from .encoding import CUT, TEACHES, Chunk, Refusals, learnt_bit, token_dtype
from .reading import place_of
from .turns import Sample

Item = TypeVar("Item", covariant=True)

INDEX = "index.json"
VERSION = 1
_TOGETHER = 64  # samples that are packed as one
_PARTS = {
    "tokens": "",
    "offsets": "<i8",
    "wholes": "<i4",
    "flags": "u1",
    "numbers": "<i8",
    "blocks": "<i8",
}
_TEXTS = "samples"
_READS = 1 << 16  # samples that are read before their pages are given back


class Lazy(Sequence[Item]):
    """A sequence whose items are made when they are asked for; equal to any of equal items."""

    def __init__(self, length: int, item: Callable[[int], Item]) -> None:
        self._length, self._item = length, item

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._item(i) for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(f"{index} of {self._length} items")
        return self._item(index % self._length)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Store:
    """All samples of a source as tokens, in order; those that teach nothing have none.

    Attributes:
        tokens: end to end, ``[tokens]``; the top bit is the mask.
        offsets: where each sample begins, and the end, int64 ``[samples + 1]``.
        wholes: tokens that each sample had before it was cut, ``[samples]``.
        flags: uint8 ``[samples]``, of TEACHES and CUT.
        form: what the samples were read as.
        refused: rows that were passed over.
    """

    tokens: NDArray[Any]
    offsets: NDArray[Any]
    wholes: NDArray[Any]
    flags: NDArray[Any]
    form: str
    refused: Refusals

    def __len__(self) -> int:
        return len(self.flags)

    def sample(self, row: int) -> Sample:
        """The sample of a row that has tokens."""
        raise NotImplementedError

    def read(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A row's token ids and mask, int64 each, in memory of their own."""
        part = self.tokens[self.offsets[row] : self.offsets[row + 1]]
        bit = learnt_bit(part.dtype)
        return (part & (bit - 1)).astype(np.int64), (part >= bit).astype(np.int64)

    def batch(self, rows: Sequence[int], pad: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows padded to the longest of them, ids with ``pad``: ``[rows, longest]`` int64 each."""
        parts = [self.tokens[self.offsets[row] : self.offsets[row + 1]] for row in rows]
        both = np.full((len(parts), max(map(len, parts))), pad, dtype=self.tokens.dtype)
        for line, part in zip(both, parts, strict=True):
            line[: len(part)] = part
        bit = learnt_bit(both.dtype)
        return (both & (bit - 1)).astype(np.int64), (both >= bit).astype(np.int64)

    def interleaved(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The ids of each row and then its mask, int64, end to end."""
        begin, end = self.offsets[rows], self.offsets[rows + 1]
        lengths = end - begin
        before = np.repeat(np.cumsum(lengths) - lengths, lengths)
        place = np.arange(len(before))
        part = self.tokens[place - before + np.repeat(begin, lengths)]
        bit = learnt_bit(part.dtype)
        out = np.empty(2 * len(part), dtype=np.int64)
        out[place + before] = part & (bit - 1)
        out[place + before + np.repeat(lengths, lengths)] = part >= bit
        return out

    def learnt(self) -> int:
        """How many tokens are learnt, of all."""
        bit, step = learnt_bit(self.tokens.dtype), 1 << 22
        parts = (self.tokens[i : i + step] for i in range(0, len(self.tokens), step))
        return sum(int(np.count_nonzero(part >= bit)) for part in parts)

    def kept(self) -> NDArray[Any]:
        """The numbers of the rows that have tokens."""
        return np.flatnonzero(np.diff(self.offsets))

    def answered(self) -> NDArray[Any]:
        """The numbers of the rows with a word to be learnt, within the cut or not."""
        return np.flatnonzero(self.flags & TEACHES)

    def cut(self, rows: NDArray[Any]) -> int:
        """How many of ``rows`` were cut."""
        return int(np.count_nonzero(self.flags[rows] & CUT))


class MemoryStore(Store):
    """Chunks as they are.

    Args:
        chunks: in order.
        tokenizer: that they were made with.
    """

    def __init__(self, chunks: Sequence[Chunk], tokenizer: Any) -> None:
        empty = np.zeros(0, dtype=np.int64)
        lengths = np.concatenate([empty, *(chunk.lengths for chunk in chunks)])
        self.offsets = np.concatenate([[0], np.cumsum(lengths)])
        self.wholes = np.concatenate([empty, *(chunk.wholes for chunk in chunks)])
        tokens = [chunk.tokens for chunk in chunks] or [empty]
        self.tokens = np.concatenate(tokens).astype(token_dtype(tokenizer), copy=False)
        self.flags = np.concatenate([c.flags for c in chunks] or [empty]).astype(np.uint8)
        self.refused = Refusals()
        for chunk in chunks:
            self.refused.join(chunk.refused)
        self._samples = dict(
            zip(self.kept().tolist(), (s for c in chunks for s in c.samples), strict=True)
        )
        self.form = next((s.form for s in self._samples.values()), "")

    def sample(self, row: int) -> Sample:
        """The sample of a row that has tokens."""
        return self._samples[row]


class Writer:
    """Writes chunks into a directory that `MappedStore` then reads.

    Args:
        directory: an empty one.
        dtype: of the tokens.
    """

    def __init__(self, directory: Path, dtype: str) -> None:
        self.directory, self.dtype = directory, dtype
        self._files: dict[str, IO[bytes]] = {
            name: (directory / f"{name}.bin").open("wb") for name in (*_PARTS, _TEXTS)
        }
        self._files["offsets"].write(np.zeros(1, dtype="<i8").tobytes())
        self._tokens = self._kept = 0
        self.refused = Refusals()

    def add(self, chunk: Chunk, packed: Sequence[tuple[int, bytes]]) -> None:
        """Write one more; ``packed`` is what `pack` makes of its samples."""
        ends = self._tokens + np.cumsum(chunk.lengths)
        for name, array in (
            ("tokens", chunk.tokens.astype(self.dtype, copy=False)),
            ("offsets", ends.astype("<i8")),
            ("wholes", chunk.wholes.astype("<i4")),
            ("flags", chunk.flags),
            ("numbers", chunk.numbers.astype("<i8")),
        ):
            self._files[name].write(array.tobytes())
        texts, blocks = self._files[_TEXTS], self._files["blocks"]
        for count, block in packed:
            blocks.write(np.array([self._kept, texts.tell()], dtype="<i8").tobytes())
            texts.write(block)
            self._kept += count
        self._tokens += len(chunk.tokens)
        self.refused.join(chunk.refused)

    def finish(self, form: str, key: dict[str, Any]) -> None:
        """Write what says that all is there, what it was read as and made of."""
        self.close()
        sizes = {name: (self.directory / f"{name}.bin").stat().st_size for name in self._files}
        content = {
            "key": key,
            "form": form,
            "dtype": self.dtype,
            "refused": [self.refused.count, self.refused.first],
            "sizes": sizes,
        }
        text = json.dumps(content, ensure_ascii=False, indent=1)
        (self.directory / INDEX).write_text(text, encoding="utf-8")

    def close(self) -> None:
        """Close the files."""
        for file in self._files.values():
            file.close()


def pack(samples: Sequence[Sample]) -> list[tuple[int, bytes]]:
    """Samples as packed JSON, some dozens at a time, each with their number."""
    parts = [samples[start : start + _TOGETHER] for start in range(0, len(samples), _TOGETHER)]
    return [
        (
            len(part),
            zlib.compress(
                json.dumps(
                    [[s, s.tools, list(s.unlearnt)] for s in part], ensure_ascii=False
                ).encode("utf-8"),
                1,
            ),
        )
        for part in parts
    ]


class MappedStore(Store):
    """What a `Writer` wrote, mapped into memory: the system reads, and forgets, what is asked for.

    Args:
        directory: with `INDEX`.
        source: the data file, as messages are to name it.

    Attributes:
        described: the content of `INDEX`.

    Raises:
        ValueError, LookupError, OSError: it is not whole.
    """

    def __init__(self, directory: Path, source: str) -> None:
        self.directory, self.source = directory, source
        self._open()

    def _open(self) -> None:
        self.described = json.loads((self.directory / INDEX).read_text(encoding="utf-8"))
        self.form = self.described["form"]
        count, first = self.described["refused"]
        self.refused = Refusals(count, [(number, text) for number, text in first])
        dtypes = {**_PARTS, "tokens": self.described["dtype"], _TEXTS: "u1"}
        self._maps: list[mmap.mmap] = []
        parts = {name: self._mapped(name, dtype) for name, dtype in dtypes.items()}
        self.tokens, self.offsets = parts["tokens"], parts["offsets"]
        self.wholes, self.flags = parts["wholes"], parts["flags"]
        self._numbers = parts["numbers"]
        self._blocks, self._texts = parts["blocks"].reshape(-1, 2), parts[_TEXTS]
        self._kept: NDArray[Any] | None = None
        self._unpacked: tuple[int, list[Any]] = -1, []
        self._read = 0

    def _mapped(self, name: str, dtype: str) -> NDArray[Any]:
        path = self.directory / f"{name}.bin"
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size != self.described["sizes"][name]:
                raise ValueError(f"{path} has {size} bytes, not {self.described['sizes'][name]}")
            if not size:
                return np.zeros(0, dtype=dtype)
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._maps.append(mapped)
        return np.frombuffer(mapped, dtype=dtype)

    def read(self, row: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """A row's token ids and mask; now and then the pages that were read are given back."""
        self._count(1)
        return super().read(row)

    def batch(self, rows: Sequence[int], pad: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Rows padded to the longest of them; as `read` for the rest."""
        self._count(len(rows))
        return super().batch(rows, pad)

    def interleaved(self, rows: NDArray[Any]) -> NDArray[Any]:
        """The ids of each row and then its mask; as `read` for the rest."""
        self._count(len(rows))
        return super().interleaved(rows)

    def _count(self, rows: int) -> None:
        self._read += rows
        if self._read >= _READS:
            self._read = 0
            self.release()

    def release(self) -> None:
        """Give pages that were read back to the system, where that is known; they can be reread."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for mapped in self._maps:
                mapped.madvise(mmap.MADV_DONTNEED)

    def sample(self, row: int) -> Sample:
        """The sample of a row that has tokens."""
        if self._kept is None:
            self._kept = self.kept().astype(np.uint32)
        number = int(np.searchsorted(self._kept, row))
        block = int(np.searchsorted(self._blocks[:, 0], number, side="right")) - 1
        if self._unpacked[0] != block:
            begin = self._blocks[block, 1]
            end = self._blocks[block + 1, 1] if block + 1 < len(self._blocks) else None
            unpacked = zlib.decompress(self._texts[begin:end].tobytes())
            self._unpacked = block, json.loads(unpacked)
        turns, tools, unlearnt = self._unpacked[1][number - int(self._blocks[block, 0])]
        place = place_of(self.source, int(self._numbers[row]))
        # The block may be read again.
        return Sample(copy.deepcopy(turns), place, self.form, copy.deepcopy(tools), unlearnt)

    def __getstate__(self) -> dict[str, Any]:
        return {"directory": self.directory, "source": self.source}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.directory, self.source = state["directory"], state["source"]
        self._open()
