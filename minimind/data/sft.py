"""Samples as tokens with a loss mask, and batches of them.

Batches are cut from samples of similar length and padded to the longest of their own. Measured
against one row packed end to end, that wastes a few per cent of the tokens and needs neither a
block-diagonal mask nor position ids that start anew.
"""

from __future__ import annotations

import hashlib
import os
import random
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from .building import IN_MEMORY, Cache, open_store
from .encoding import AT_ONCE, Encoder
from .forms import Reader, nothing_in
from .reading import DataError, find_data, split_name
from .store import Lazy, MemoryStore, Store
from .turns import Conversation, Sample, sample_of

Item = tuple[Tensor, Tensor, Tensor]

MOST_HELDOUT = 200


class SFTDataset(Dataset[Item]):
    """Tokenised conversations with a mask on what the assistant says; or texts, learnt whole.

    Args:
        path: a data file, or the conversations themselves: lists of turns as in the file, or
            samples as `read_conversations` gives them.
        tokenizer: with a chat template, as `load_tokenizer` gives.
        max_length: samples longer than this many tokens are cut at the end, at least 2.
        source: what error messages call conversations that did not come from a file.
        form: of the file; by default its first row tells.
        cache: directory where the tokens of a file of a megabyte or more are kept for the next
            time; by default they lie in a temporary one.
        skip_bad: count rows of a file that cannot be used, instead of raising.

    Items are ``(X, Y, loss_mask)``, int64 ``[length]`` each. Y equals X: nothing is shifted here,
    the loss shifts once for all. The mask is 1 on the tokens of every assistant turn and the
    ``</s>`` that ends it, 0 elsewhere and on turns of weight 0; on all tokens of a plain text. A
    batch of items, as a DataLoader asks for it, comes padded with ``pad_token_id`` and mask 0 to
    the longest of the batch.

    Attributes:
        conversations: the samples, in order; those of a large file are read when asked for.
        samples: token ids and mask of each, int64 ``[length]`` in memory of their own.
        form: what they were read as.
        cut: number of samples that were longer than max_length.
        dropped: number left out since nothing to be learnt was inside max_length.
        lengths: tokens of each sample.
        tokens: of all samples together.
        skipped: rows that were passed over: ``count``, and ``first``, what is wrong with some.

    Raises:
        FileNotFoundError, DataError: the file or a sample cannot be used, or the chat template
            cannot write it down; or nothing is left to train on.
        ValueError: max_length below 2, or an unknown form.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[Conversation],
        tokenizer: Any,
        max_length: int = 512,
        source: str = "the conversations",
        form: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        skip_bad: bool = False,
    ) -> None:
        check_length(max_length)
        store: Store
        if isinstance(path, (str, os.PathLike)):
            kept = IN_MEMORY if cache is None else Cache(Path(cache))
            store = open_store(Path(path), tokenizer, max_length, form, skip_bad, kept)
            source = str(path)
        else:
            samples = (
                turns if isinstance(turns, Sample) else sample_of(turns, f"{source}, number {i}")
                for i, turns in enumerate(path, start=1)
            )
            encoder = Encoder(tokenizer, max_length, source, Reader())
            parts = iter(lambda: list(islice(samples, AT_ONCE)), [])
            chunks = [encoder.samples(part, range(len(part))) for part in parts]
            store = MemoryStore(chunks, tokenizer)
        self._take(store, np.arange(len(store)), tokenizer, max_length, source)

    def _take(
        self, store: Store, rows: NDArray[Any], tokenizer: Any, max_length: int, source: str
    ) -> None:
        self.store, self.tokenizer, self.max_length = store, tokenizer, max_length
        self.pad_token_id = tokenizer.pad_token_id or 0
        lengths = np.diff(store.offsets)[rows]
        # Four bytes of each a sample are all that is held of a large file.
        self._rows = rows[lengths > 0].astype(np.uint32)
        self._lengths = lengths[lengths > 0].astype(np.int32)
        self.cut, self.dropped = store.cut(rows), int(np.count_nonzero(lengths == 0))
        self.form, self.skipped = store.form, store.refused
        self._fingerprint = ""
        if not len(self._rows):
            if self.skipped.count and not len(store):
                raise DataError(
                    f"{source}: none of {self.skipped.count} rows can be used; the first: "
                    f"{self.skipped.first[0][1]}"
                )
            raise DataError(
                f"{source}: none of {self.dropped} samples has a word to be learnt within "
                f"{max_length} tokens; raise max_length (--max-length) or add assistant turns"
                if self.dropped
                else nothing_in(source)
            )

    @classmethod
    def of_rows(
        cls, store: Store, rows: NDArray[Any], tokenizer: Any, max_length: int, source: str
    ) -> SFTDataset:
        """The data set of some rows of a store, int64 ``[rows]``, in that order.

        Raises:
            DataError: none of them teaches anything.
        """
        dataset = cls.__new__(cls)
        dataset._take(store, rows, tokenizer, max_length, source)
        return dataset

    @property
    def conversations(self) -> Sequence[Sample]:
        """The samples, in order."""
        return Lazy(len(self), lambda index: self.store.sample(int(self._rows[index])))

    @property
    def samples(self) -> Sequence[tuple[Tensor, Tensor]]:
        """Token ids and mask of each sample."""
        return Lazy(len(self), self._read)

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sample."""
        return Lazy(len(self), self._lengths.item)

    @property
    def tokens(self) -> int:
        """Tokens of all samples together."""
        return int(self._lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, index: int) -> tuple[Tensor, Tensor]:
        ids, mask = self.store.read(int(self._rows[index]))
        return torch.from_numpy(ids), torch.from_numpy(mask)

    def fingerprint(self) -> str:
        """A hash of all tokens and masks, in order; made once."""
        if not self._fingerprint:
            digest = hashlib.sha256()
            for start in range(0, len(self), 4096):
                digest.update(self.store.interleaved(self._rows[start : start + 4096]).data)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def __getitem__(self, index: int) -> Item:
        ids, mask = self._read(range(len(self))[index])
        return ids, ids.clone(), mask

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        rows = [int(self._rows[index]) for index in indices]
        x, mask = map(torch.from_numpy, self.store.batch(rows, self.pad_token_id))
        return list(zip(x, x.clone(), mask, strict=True))


def check_length(max_length: int) -> None:
    """Raise ValueError where a sample could hold nothing to be learnt."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")


def held_out(
    data: str,
    tokenizer: Any,
    max_length: int,
    seed: int,
    form: str | None = None,
    skip_bad: bool = False,
    cache: Cache = IN_MEMORY,
) -> tuple[SFTDataset, SFTDataset | None]:
    """Training and held-out samples of ``data``, a file of ``form`` (told by its first row).

    ``X.heldout.jsonl`` beside ``X.jsonl`` is the held-out split; without one, a tenth (at most
    200) is drawn from the data, and none from fewer than 20.

    Raises:
        FileNotFoundError, DataError, ValueError: as `SFTDataset`.
    """
    check_length(max_length)
    path = find_data(data)
    name, ending = split_name(path)
    beside = path.with_name(f"{name}.heldout{ending}")

    def opened(file: Path) -> Store:
        store = open_store(file, tokenizer, max_length, form, skip_bad, cache)
        if not len(store) and not store.refused.count:
            raise DataError(nothing_in(file))
        return store

    def dataset(store: Store, rows: NDArray[Any], source: str) -> SFTDataset:
        return SFTDataset.of_rows(store, rows, tokenizer, max_length, source)

    store = opened(path)
    rows, apart = np.arange(len(store)), f"the held-out split of {data}"
    if beside.is_file():
        other = opened(beside)
        return dataset(store, rows, data), dataset(other, np.arange(len(other)), apart)
    answered = store.answered()
    if len(answered) < 20:
        return dataset(store, rows, data), None
    count = min(MOST_HELDOUT, len(answered) // 10)
    out = answered[sorted(random.Random(seed).sample(range(len(answered)), count))]
    return dataset(store, np.delete(rows, out), data), dataset(store, out, apart)


class LengthGroupedBatches:
    """Batch sampler: samples of similar length together, batches in random order.

    Args:
        lengths: tokens of each sample.
        batch_size: samples a batch; the last one may be smaller.
        seed: the order depends on this and on the epoch set by `set_epoch`, on nothing else.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int = 0) -> None:
        self.lengths, self.batch_size, self.seed = lengths, batch_size, seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = array("L", range(len(self.lengths)))
        rng.shuffle(order)
        # Sorting within pools keeps the company of a sample changing from epoch to epoch.
        pool = 32 * self.batch_size
        for start in range(0, len(order), pool):
            group = sorted(order[start : start + pool], key=self.lengths.__getitem__)
            order[start : start + pool] = array("L", group)
        batches = array("L", range(0, len(order), self.batch_size))
        rng.shuffle(batches)
        return (order[start : start + self.batch_size].tolist() for start in batches)
