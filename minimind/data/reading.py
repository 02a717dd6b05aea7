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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

DATA_DIRECTORY = Path(__file__).parents[1] / "assets" / "data"
SHIPPED_DATA = ("base", "identity", "tea")

_BLANKS = re.compile(r"[ \t\r\n]*")
_COMPRESSED = re.compile(r"(\.[^.]+)?\.gz$", re.IGNORECASE)


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the line and the remedy."""


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


def read_rows(path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Each row of a file as ``(place, row)``; blank lines are passed over.

    Of CSV and TSV a row is a dictionary of texts by the header's names, of plain text
    ``{"text": line}``, of JSON whatever stands there. A name that ends in none of .csv, .tsv, .txt
    and .parquet (before .gz) is taken for JSON: an array, or one value a line.

    Raises:
        FileNotFoundError: no such file.
        DataError: the file or a row of it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no data file at {path}; check the path, or use a shipped set: "
            + ", ".join(SHIPPED_DATA)
        )
    if path.is_dir():
        raise DataError(f"{path} is a directory; name one data file in it")
    kind = split_name(path)[1].lower().removesuffix(".gz")
    try:
        with _opened(path) as file:
            if kind == ".parquet":
                yield from _parquet_rows(path, file)
            elif kind in (".csv", ".tsv"):
                # Line breaks inside of quotes are the reader's to find.
                with io.TextIOWrapper(file, "utf-8-sig", newline="") as lines:
                    yield from _table_rows(path, lines, "\t" if kind == ".tsv" else ",")
            else:
                # Editors count \n, and no other separator ends a line.
                with io.TextIOWrapper(file, "utf-8-sig", newline="\n") as lines:
                    if kind == ".txt":
                        yield from _text_rows(path, lines)
                    else:
                        yield from _json_rows(path, lines, kind == ".json")
    except UnicodeDecodeError:
        raise DataError(_undecodable(path)) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read: {error}; fetch or pack it again, or take .gz from its name if "
            "it is not packed"
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file") from None


def _opened(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    return path.open("rb")


def _text_rows(path: Path, lines: io.TextIOWrapper) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield f"{path}:{number}", {"text": line.rstrip("\r\n")}


def _json_rows(path: Path, lines: io.TextIOWrapper, whole: bool) -> Iterator[tuple[str, Any]]:
    """One value a line, the items of one array, or (where ``whole``) one value on many lines."""
    begun = False
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if not begun and line.lstrip().startswith("["):
            yield from _array_rows(path, line + lines.read(), number)
            return
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            rest = lines.read() if whole and not begun else ""
            try:
                row = json.loads(line + rest)
            except (ValueError, RecursionError):
                raise DataError(
                    f"{place}: not JSON ({error}); each line must be one object like "
                    '{"conversations": [{"role": "user", "content": "…"}, …]}'
                ) from None
        begun = True
        yield place, row


def _array_rows(path: Path, text: str, line: int) -> Iterator[tuple[str, Any]]:
    """The items of the array that begins in ``text`` on ``line``, decoded one by one."""
    decode = json.JSONDecoder().raw_decode

    def skip(start: int) -> int:
        match = _BLANKS.match(text, start)
        assert match is not None
        return match.end()

    def wrong(what: object, where: int) -> DataError:
        at = line + text.count("\n", counted, where)
        return DataError(f"{path}:{at}: not a JSON array ({what}); save the file whole, as UTF-8")

    counted, position = 0, skip(skip(0) + 1)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        try:
            row, position = decode(text, position)
        except json.JSONDecodeError as error:
            raise wrong(error.msg, error.pos) from None
        except (ValueError, RecursionError) as error:
            raise wrong(error, position) from None
        yield f"{path}:{line}", row
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            raise wrong("a comma or ] is missing", position)
    if skip(position + 1) != len(text):
        raise wrong("something follows its end", skip(position + 1))


def _table_rows(path: Path, lines: io.TextIOWrapper, comma: str) -> Iterator[tuple[str, Any]]:
    reader = csv.reader(lines, delimiter=comma, strict=True)
    header: list[str] = []
    line = 1
    try:
        for cells in _of_any_length(reader):
            place, line = f"{path}:{line}", reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = [cell.strip() for cell in cells]
                twice = sorted({name for name in header if name and header.count(name) > 1})
                if twice:
                    raise DataError(f"{place}: the header has {short(twice[0])} twice; rename one")
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{place}: {len(cells)} cells, but the header names {len(header)} columns; put "
                    'cells with commas, quotes or line breaks between "…"'
                )
            # Spreadsheets write empty columns beside the table.
            row = {name: cell for name, cell in zip(header, cells, strict=True) if name}
            nameless = (c for name, c in zip(header, cells, strict=True) if not name and c.strip())
            if cell := next(nameless, ""):
                raise DataError(
                    f"{place}: {short(cell)} is in a column without a name; name it in the header, "
                    "or delete the column"
                )
            yield place, row
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


def _parquet_rows(path: Path, file: BinaryIO) -> Iterator[tuple[str, Any]]:
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
                yield f"{path}, row {number}", row
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
