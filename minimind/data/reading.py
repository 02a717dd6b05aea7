"""Files of data as a stream of rows, each with its place for messages.

JSON lines, a JSON array, CSV, TSV, plain text and Parquet, each also compressed by gzip. What the
rows mean is told in `forms`.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import gzip
import io
import json
import os
import re
import shlex
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

DATA_DIRECTORY = Path(__file__).parents[1] / "assets" / "data"
SHIPPED_DATA = ("base", "identity", "tea")

_BLOCK = 1 << 20  # characters of an array that are read at once
_WORD = 16  # characters that what is no string may be cut within: -Infinity, an escape
_BLANKS = re.compile(r"[ \t\r\n]*")
_COMPRESSED = re.compile(r"(\.[^.]+)?\.gz$", re.IGNORECASE)


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the line and the remedy."""


Bad = Callable[[int, DataError], None]
Read = Callable[[int], object]


def find_data(data: str | os.PathLike[str]) -> Path:
    """A path as it is, or the file of a shipped set by its name: base, identity or tea."""
    return DATA_DIRECTORY / f"{data}.jsonl" if data in SHIPPED_DATA else Path(data)


def short(value: Any) -> str:
    """``repr``, cut to a length for messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def split_name(path: Path) -> tuple[str, str]:
    """The name without its endings, and those: ``.jsonl``, or both of ``.jsonl.gz``."""
    both = _COMPRESSED.search(path.name)
    ending = both.group() if both else path.suffix
    return path.name[: len(path.name) - len(ending)], ending


def place_of(path: str | os.PathLike[str], number: int) -> str:
    """Where a row is, for messages: its line, or of Parquet its number."""
    parquet = _kind(Path(path)) == ".parquet"
    return f"{path}, row {number}" if parquet else f"{path}:{number}"


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Each row of a file as ``(place, row)``; see `numbered_rows`."""
    for number, row in numbered_rows(path):
        yield place_of(path, number), row


def numbered_rows(
    path: str | os.PathLike[str],
    bad: Bad | None = None,
    read: Callable[[int], object] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Each row of a file with its line, or of Parquet its number; blank lines are passed over.

    Of CSV and TSV a row is a dictionary of texts by the header's names, of plain text
    ``{"text": line}``, of JSON whatever stands there. A name that ends in none of .csv, .tsv, .txt
    and .parquet (before .gz) is taken for JSON: an array, or one value a line. Whatever its size,
    no more than a block of a file is held, or one row.

    Args:
        bad: told of each row that cannot be read, and its line, where others can be read past it.
        read: told how many bytes more have been read.

    Raises:
        FileNotFoundError: no such file.
        DataError: the file cannot be read, or a row of it and ``bad`` is None.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no data file at {path}; check the path, or use a shipped set: "
            + ", ".join(SHIPPED_DATA)
        )
    if path.is_dir():
        raise DataError(f"{path} is a directory; name one data file in it")
    kind = _kind(path)
    try:
        with _opened(path, read) as file:
            if kind == ".parquet":
                yield from _parquet_rows(path, file)
            elif kind in (".csv", ".tsv"):
                # Line breaks inside of quotes are the reader's to find.
                with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
                    yield from _table_rows(path, lines, "\t" if kind == ".tsv" else ",", bad)
            else:
                # Editors count \n, and no other separator ends a line.
                with io.TextIOWrapper(file, "utf-8-sig", newline="\n") as lines:
                    if kind == ".txt":
                        yield from _text_rows(lines)
                    else:
                        yield from _json_rows(path, lines, kind == ".json", bad)
    except UnicodeDecodeError:
        raise DataError(_undecodable(path)) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}; fetch or pack it again, or take .gz from its name if "
            "it is not packed"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file") from None


def _kind(path: Path) -> str:
    return split_name(path)[1].lower().removesuffix(".gz")


class _Counted(io.FileIO):
    """A file that tells how many bytes have been read of it."""

    def __init__(self, path: Path, told: Read) -> None:
        super().__init__(path)
        self._told = told

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._told(count or 0)
        return count


def _opened(path: Path, read: Read | None = None) -> BinaryIO:
    file = path.open("rb") if read is None else io.BufferedReader(_Counted(path, read), 1 << 17)
    if path.name.lower().endswith(".gz"):
        return _Unpacked(file)  # type: ignore[return-value, arg-type]
    return file  # type: ignore[return-value]


class _Unpacked(gzip.GzipFile):
    """The content of a packed file, which is closed with it."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        super().__init__(fileobj=packed)

    def close(self) -> None:
        super().close()
        self._packed.close()


def _text_rows(lines: io.TextIOWrapper) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def _json_rows(
    path: Path, lines: TextIO, whole: bool, bad: Bad | None, first: int = 1
) -> Iterator[tuple[int, Any]]:
    """One value a line, the items of one array, or (where ``whole``) one value on many lines."""
    begun = False
    for number, line in enumerate(lines, start=first):
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith("["):
            yield from _array_rows(path, line, lines, number)
            return
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            rest = lines.read() if whole and not begun else ""
            try:
                row = json.loads(line + rest)
            except (ValueError, RecursionError):
                _refuse(
                    bad,
                    number,
                    f"{path}:{number}: not JSON ({error}); each line must be one object like "
                    '{"conversations": [{"role": "user", "content": "…"}, …]}',
                )
                if rest:
                    left = io.StringIO(rest, newline="\n")
                    yield from _json_rows(path, left, False, bad, number + 1)
                continue
        begun = True
        yield number, row


def _refuse(bad: Bad | None, number: int, message: str) -> None:
    """Tell of a row that cannot be read, or raise DataError."""
    if bad is None:
        raise DataError(message) from None
    bad(number, DataError(message))


def _array_rows(path: Path, text: str, file: TextIO, line: int) -> Iterator[tuple[int, Any]]:
    """The items of the array that begins in ``text`` on ``line``, decoded one by one."""
    decode = json.JSONDecoder().raw_decode
    counted = position = 0

    def fill() -> bool:
        nonlocal text, line, counted, position
        block = file.read(max(_BLOCK, len(text) - position))
        if block:
            line += text.count("\n", counted, position)
            text, counted, position = text[position:] + block, 0, 0
        return bool(block)

    def skip() -> str:
        """Go on to what is no blank; that character, or nothing at the end."""
        nonlocal position
        while True:
            match = _BLANKS.match(text, position)
            assert match is not None
            position = match.end()
            if position < len(text) or not fill():
                return text[position : position + 1]

    def wrong(what: object, where: int) -> DataError:
        at = line + text.count("\n", counted, where)
        return DataError(f"{path}:{at}: not a JSON array ({what}); save the file whole, as UTF-8")

    skip()
    position += 1
    following = skip()
    while following != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, end = decode(text, position)
        except json.JSONDecodeError as error:
            # What was read may end within the item.
            if (error.msg.startswith("Unterm") or error.pos > len(text) - _WORD) and fill():
                continue
            raise wrong(error.msg, error.pos) from None
        except (ValueError, RecursionError) as error:
            raise wrong(error, position) from None
        if end > len(text) - _WORD and fill():
            continue  # a number may go on, in an exponent at that
        yield line, row
        position = end
        following = skip()
        if following == ",":
            position += 1
            following = skip()
        elif following != "]":
            raise wrong("a comma or ] is missing", position)
    position += 1
    if skip():
        raise wrong("something follows its end", position)


def _table_rows(
    path: Path, lines: io.TextIOWrapper, comma: str, bad: Bad | None
) -> Iterator[tuple[int, Any]]:
    reader = csv.reader(lines, delimiter=comma, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in _of_any_length(reader):
            number, line = line, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                twice = sorted({name for name in header if name and header.count(name) > 1})
                if twice:
                    raise DataError(
                        f"{path}:{number}: the header has {short(twice[0])} twice; rename one"
                    )
                continue
            if len(cells) != len(header):
                _refuse(
                    bad,
                    number,
                    f"{path}:{number}: {len(cells)} cells, but the header names {len(header)} "
                    'columns; put cells with commas, quotes or line breaks between "…"',
                )
                continue
            # Spreadsheets write empty columns beside the table.
            row = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            nameless = (c for name, c in zip(header, cells, strict=True) if not name and c.strip())
            if cell := next(nameless, ""):
                _refuse(
                    bad,
                    number,
                    f"{path}:{number}: {short(cell)} is in a column without a name; name it in the "
                    "header, or delete the column",
                )
                continue
            yield number, row
    except csv.Error as error:
        raise DataError(f"{path}:{line}: not a table ({error}); write it anew as CSV") from None


def _of_any_length(reader: Iterator[list[str]]) -> Iterator[list[str]]:
    """The reader's rows; by itself it refuses cells of over 128 KiB, such as chapters of books."""
    while True:
        limit = csv.field_size_limit(2**31 - 1)  # of the whole process, so only for one row
        try:
            cells = next(reader, None)
        finally:
            csv.field_size_limit(limit)
        if cells is None:
            return
        yield cells


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        raise DataError(
            f'{path}: Parquet needs pyarrow; install it with: pip install "lora-kernels[data]"'
        ) from None
    number = 0
    try:
        for batch in parquet.ParquetFile(file).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read as Parquet after row {number}: {str(error)[:200]}"
        ) from None


def _undecodable(path: Path) -> str:
    """What to say of a file that is not UTF-8: where it is not, and what it may be instead."""
    found, encoding = "", ""
    with _opened(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                found = f" (line {number}: {error.reason} 0x{line[error.start]:02x})"
                if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                    encoding = "UTF-16"
                elif error.reason != "unexpected end of data":  # a file cut short ends so
                    with contextlib.suppress(UnicodeDecodeError):
                        line.decode("gb18030")
                        encoding = "GB18030"
                break
    remedy = "save it as UTF-8"
    if encoding:
        also = ", of which GBK is a part" if encoding == "GB18030" else ""
        remedy = f"it may be {encoding}{also}: save it as UTF-8"
        if not path.name.lower().endswith(".gz"):
            remedy += (
                f", or: iconv -f {encoding} -t UTF-8 {shlex.quote(str(path))} > utf8{path.suffix}"
            )
    return f"{path} cannot be read as UTF-8 text{found}; {remedy}"
