"""Rows to arrays: what many processes make of a file, some hundred rows at a time.

A sample's tokens lie end to end with those of its neighbours, and the top bit of each says whether
it is learnt: two bytes a token for vocabularies of up to 32,768 entries, four above. Run lengths of
the mask in a file of their own would be as large for short turns, and have to be looked up.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .forms import Reader
from .reading import DataError, place_of
from .rendering import Renderer
from .turns import Sample

TEACHES, CUT = 1, 2
AT_ONCE = 512


@dataclass
class Refusals:
    """Rows that were passed over: how many, and what is wrong with the first of them."""

    count: int = 0
    first: list[tuple[int, str]] = field(default_factory=list)
    most: int = 3

    def add(self, number: int, error: object) -> None:
        """Count one more."""
        self.join(Refusals(1, [(number, str(error))]))

    def join(self, other: Refusals) -> None:
        """Count those of ``other`` as well."""
        self.count += other.count
        self.first = sorted([*self.first, *other.first])[: self.most]


@dataclass
class Chunk:
    """Some samples as arrays.

    Attributes:
        tokens: end to end, cut; the top bit is the loss mask. uint16 or uint32.
        lengths: tokens of each, int64; 0 where nothing is learnt within them.
        wholes: tokens that each had before it was cut, int64.
        flags: uint8 each: TEACHES (there is a word to be learnt, if not within the cut), CUT.
        numbers: line of each, int64.
        samples: those that have tokens.
        refused: rows that are no samples.
    """

    tokens: NDArray[Any]
    lengths: NDArray[Any]
    wholes: NDArray[Any]
    flags: NDArray[Any]
    numbers: NDArray[Any]
    samples: list[Sample]
    refused: Refusals


def token_dtype(tokenizer: Any) -> str:
    """The dtype that a tokenizer's ids fit with a bit to spare, little-endian."""
    largest = max(tokenizer.get_vocab().values(), default=0)
    return "<u2" if largest < 1 << 15 else "<u4"


def learnt_bit(dtype: Any) -> int:
    """The bit of a token that says that it is learnt."""
    return 1 << (8 * np.dtype(dtype).itemsize - 1)


class Encoder:
    """Makes chunks of rows or samples.

    Args:
        tokenizer: with a chat template.
        max_length: tokens that a sample is cut to.
        path: of the file, for messages.
        reader: of its rows.
        skip: pass over samples that cannot be used instead of raising.
    """

    def __init__(
        self, tokenizer: Any, max_length: int, path: str, reader: Reader, skip: bool = False
    ) -> None:
        self.renderer, self.max_length = Renderer(tokenizer), max_length
        self.path, self.reader, self.skip = path, reader, skip
        self.dtype = token_dtype(tokenizer)

    def rows(self, rows: Iterable[tuple[int, Any]]) -> Chunk:
        """The samples of some rows.

        Raises:
            DataError: a row cannot be used, and bad ones are not skipped.
        """
        refused = Refusals()
        numbers, samples = [], []
        for number, row in rows:
            try:
                sample = self.reader.sample(place_of(self.path, number), row)
            except DataError as error:
                if not self.skip:
                    raise
                refused.add(number, error)
                continue
            numbers.append(number)
            samples.append(sample)
        return self.samples(samples, numbers, refused)

    def samples(
        self, samples: Sequence[Sample], numbers: Sequence[int], refused: Refusals | None = None
    ) -> Chunk:
        """Some samples, which may be of no file.

        Raises:
            DataError: the template cannot write one of them, and bad ones are not skipped.
        """
        refused = refused or Refusals()
        wrong: dict[int, DataError] = {}
        if self.skip:
            places = {id(sample): i for i, sample in enumerate(samples)}
            encoded = self.renderer.encode(samples, lambda s, e: wrong.update({places[id(s)]: e}))
        else:
            encoded = self.renderer.encode(samples)
        whole = np.array(encoded.lengths, dtype=np.int64)
        sample_of_piece = np.repeat(np.arange(len(samples)), encoded.counts)
        wholes = np.bincount(sample_of_piece, weights=whole, minlength=len(samples))
        wholes = wholes.astype(np.int64)
        mask = np.repeat(np.array(encoded.learnt, dtype=bool), whole)
        sample_of_token = np.repeat(np.arange(len(samples)), wholes)
        position = np.arange(len(mask)) - np.repeat(np.cumsum(wholes) - wholes, wholes)
        # The first token is never predicted, so a mask there supervises nothing.
        within = position < self.max_length
        teaching = sample_of_token[mask & within & (position > 0)]
        kept = np.zeros(len(samples), dtype=bool)
        kept[teaching] = True
        taken = within & kept[sample_of_token]
        tokens = np.array(encoded.ids, dtype=self.dtype)
        tokens[mask] |= learnt_bit(self.dtype)
        teaches = np.array([sample.teaches for sample in samples], dtype=bool)
        flags = TEACHES * teaches + CUT * (kept & (wholes > self.max_length))
        lengths = np.where(kept, np.minimum(wholes, self.max_length), 0)
        left = [sample for sample, keep in zip(samples, kept, strict=True) if keep]
        made = np.array(numbers, dtype=np.int64)
        if wrong:
            there = np.array([i not in wrong for i in range(len(samples))])
            lengths, wholes = lengths[there], wholes[there]
            flags, made = flags[there], made[there]
            for index, error in wrong.items():
                refused.add(numbers[index], error)
        flags = flags.astype(np.uint8)
        return Chunk(tokens[taken], lengths, wholes, flags, made, left, refused)
