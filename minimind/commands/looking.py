"""What `minimind info` says of data: how much, how long, what is learnt of it, and one sample."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.building import Cache, open_store
from ..data.forms import nothing_in
from ..data.reading import SHIPPED_DATA, DataError, find_data, split_name
from ..data.sft import check_length
from ..data.store import Store
from ..data.turns import TEXT

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
_SHOWN = 3000  # characters of the sample
_GREEN, _PLAIN = "\033[32m", "\033[0m"


def is_data(path: str) -> bool:
    """Whether a path, or a shipped set's name, is of data rather than of a model or an adapter."""
    given = Path(path)
    if given.is_file():
        return given.suffix.lower() not in WEIGHTS
    return path in SHIPPED_DATA and not given.exists()


def described(
    data: str,
    tokenizer: Any,
    max_length: int,
    form: str | None,
    skip_bad: bool,
    cache: Cache,
    colour: bool,
) -> list[str]:
    """What there is to say of a data file, as lines.

    Args:
        data: a path, or a shipped set.
        tokenizer, max_length, form, skip_bad: as a run would have them.
        cache: where its tokens are kept.
        colour: show what is learnt in green, or between marks.

    Raises:
        FileNotFoundError, DataError: it cannot be used.
        ValueError: max_length is below 2, or there is no such form.
    """
    check_length(max_length)
    path = find_data(data)
    store = open_store(path, tokenizer, max_length, form, skip_bad, cache)
    if not len(store):
        first = f": {store.refused.first[0][1]}" if store.refused.count else ""
        raise DataError(f"{nothing_in(path)}{first}")
    kept = store.kept()
    wholes = store.wholes
    what = "texts" if store.form == TEXT else "conversations"
    read_as = "" if store.form in (TEXT, "conversations") else f" (read as {store.form})"
    name, ending = split_name(path)
    beside = path.with_name(f"{name}.heldout{ending}")
    lines = [
        f"{path}: {len(store):,} {what}{read_as}, {_bytes(path.stat().st_size)}",
        f"  tokens      {int(wholes.sum(dtype=np.int64)):,}, {_lengths(wholes)}",
        f"  learnt      {_share(store.learnt(), len(store.tokens))} of what is trained on",
        f"  cut         {_cut(store, max_length)}",
    ]
    if len(kept) < len(store):
        lines.append(f"  left out    {len(store) - len(kept):,} with nothing to learn within that")
    if store.refused.count:
        lines.append(f"  skipped     {store.refused.count:,} rows that cannot be used; the first:")
        lines += [f"              {message}" for _, message in store.refused.first]
    if beside.is_file():
        lines.append(f"  held out    {beside}")
    if len(kept):
        lines += _sample(store, kept, tokenizer, colour)
    return lines


def in_colour() -> bool:
    """Whether standard output is a terminal whose user has not asked for none."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.name == "posix"


def _lengths(wholes: Sequence[int] | np.ndarray[Any, Any]) -> str:
    shares = (0, 5, 25, 50, 75, 95, 100)
    found = np.percentile(np.asarray(wholes), shares, method="inverted_cdf").astype(int)
    least, *middle, most = (f"{value:,}" for value in found)
    names = zip(shares[1:-1], middle, strict=True)
    each = ", ".join(f"{length} ({share} %)" for share, length in names)
    return f"a sample {least} to {most}: {each}"


def _share(part: int, whole: int) -> str:
    return f"{part:,} of {whole:,} tokens ({part / whole:.1%})" if whole else "nothing"


def _cut(store: Store, max_length: int) -> str:
    over = store.wholes[store.wholes > max_length]
    if not len(over):
        return f"none is longer than {max_length:,} tokens"
    lost = int(over.sum(dtype=np.int64)) - max_length * len(over)
    whole = int(store.wholes.sum(dtype=np.int64))
    return (
        f"{len(over):,} of {len(store):,} at {max_length:,} tokens ({len(over) / len(store):.1%}), "
        f"by {lost:,} tokens in all ({lost / whole:.1%})"
    )


def _sample(store: Store, kept: np.ndarray[Any, Any], tokenizer: Any, colour: bool) -> list[str]:
    """The first sample that is no longer than most, with what is learnt of it shown."""
    lengths = np.diff(store.offsets)[kept]
    row = int(kept[np.argmax(lengths <= np.median(lengths))])
    begin, end = (_GREEN, _PLAIN) if colour else ("»", "«")
    how = "in green" if colour else f"between {begin} and {end}"
    ids, mask = store.read(row)
    edges = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    text, left = "", _SHOWN
    for start, stop in zip(edges, edges[1:], strict=False):
        piece = _printable(tokenizer.decode(ids[start:stop].tolist()))
        shown = piece if len(piece) <= left else f"{piece[:left]}…"
        left -= len(piece)
        text += f"{begin}{shown}{end}" if mask[start] else shown
        if left <= 0:
            break
    return ["", f"{store.sample(row).place}, what is learnt {how}:", text.rstrip("\n")]


def _printable(text: str) -> str:
    """``text`` without what would act on a terminal."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in text
    )


def _bytes(size: int) -> str:
    for unit, each in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= each:
            return f"{size / each:.1f} {unit}"
    return f"{size} bytes"
