"""Samples as tokens with a loss mask, and batches of them.

Batches are cut from samples of similar length and padded to the longest of their own. Measured
against one row packed end to end, that wastes a few per cent of the tokens and needs neither a
block-diagonal mask nor position ids that start anew.
"""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from .forms import nothing_in, read_samples
from .reading import DataError
from .rendering import Renderer
from .turns import Conversation, Sample, sample_of

Item = tuple[Tensor, Tensor, Tensor]


class SFTDataset(Dataset[Item]):
    """Tokenised conversations with a mask on what the assistant says; or texts, learnt whole.

    Args:
        path: a data file, or the conversations themselves: lists of turns as in the file, or
            samples as `read_conversations` gives them.
        tokenizer: with a chat template, as `load_tokenizer` gives.
        max_length: samples longer than this many tokens are cut at the end, at least 2.
        source: what error messages call conversations that did not come from a file.
        form: of the file; by default its first row tells.

    Items are ``(X, Y, loss_mask)``, int64 ``[length]`` each. Y equals X: nothing is shifted here,
    the loss shifts once for all. The mask is 1 on the tokens of every assistant turn and the
    ``</s>`` that ends it, 0 elsewhere and on turns of weight 0; on all tokens of a plain text. A
    batch of items, as a DataLoader asks for it, comes padded with ``pad_token_id`` and mask 0 to
    the longest of the batch.

    Attributes:
        conversations: the samples, in order.
        form: what they were read as.
        cut: number of samples that were longer than max_length.
        dropped: number left out since nothing to be learnt was inside max_length.
        lengths: tokens of each sample.

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
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
        samples: Iterable[Sample]
        if isinstance(path, (str, os.PathLike)):
            samples, source = read_samples(path, form), str(path)
        else:
            samples = (
                turns if isinstance(turns, Sample) else sample_of(turns, f"{source}, number {i}")
                for i, turns in enumerate(path, start=1)
            )
        self.tokenizer, self.max_length = tokenizer, max_length
        self.pad_token_id = tokenizer.pad_token_id or 0
        self.samples: list[tuple[Tensor, Tensor]] = []
        self.conversations: list[Sample] = []
        self.cut = self.dropped = 0
        for sample, ids, mask in Renderer(tokenizer).encode(samples):
            # The first token is never predicted, so a mask there supervises nothing.
            if not any(mask[1:max_length]):
                self.dropped += 1
                continue
            self.cut += len(ids) > max_length
            self.samples.append((torch.tensor(ids[:max_length]), torch.tensor(mask[:max_length])))
            self.conversations.append(sample)
        if not self.samples:
            raise DataError(
                f"{source}: none of {self.dropped} samples has a word to be learnt within "
                f"{max_length} tokens; raise max_length (--max-length) or add assistant turns"
                if self.dropped
                else nothing_in(source)
            )
        self.form = self.conversations[0].form
        self.lengths = [len(ids) for ids, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> str:
        """A hash of all tokens and masks, in order."""
        digest = hashlib.sha256()
        for ids, mask in self.samples:
            digest.update(ids.numpy().tobytes() + mask.numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Item:
        ids, mask = self.samples[index]
        return ids.clone(), ids.clone(), mask.clone()

    def __getitems__(self, indices: Sequence[int]) -> list[Item]:
        longest = max(self.lengths[i] for i in indices)
        batch = []
        for index in indices:
            ids, mask = self.samples[index]
            padding = longest - len(ids)
            padded = torch.nn.functional.pad(ids, (0, padding), value=self.pad_token_id)
            mask = torch.nn.functional.pad(mask, (0, padding))
            batch.append((padded, padded.clone(), mask))
        return batch


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
        order = list(range(len(self.lengths)))
        rng.shuffle(order)
        # Sorting within pools keeps the company of a sample changing from epoch to epoch.
        pool = 32 * self.batch_size
        batches = []
        for start in range(0, len(order), pool):
            group = sorted(order[start : start + pool], key=lambda i: self.lengths[i])
            batches += [
                group[i : i + self.batch_size] for i in range(0, len(group), self.batch_size)
            ]
        rng.shuffle(batches)
        return iter(batches)
