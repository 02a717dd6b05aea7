"""Conversations in JSON lines, as tokens with a loss mask.

One sample a line: ``{"conversations": [{"role": "user", "content": …}, {"role": …}, …]}``.

Batches are cut from samples of similar length and padded to the longest of their own. Measured
against one row packed end to end, that wastes a few per cent of the tokens and needs neither a
block-diagonal mask nor position ids that start anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

ROLES = ("system", "user", "assistant")
DATA_DIRECTORY = Path(__file__).parents[1] / "assets" / "data"
SHIPPED_DATA = ("base", "identity", "tea")

Conversation = list[dict[str, str]]
Sample = tuple[Tensor, Tensor, Tensor]


class DataError(ValueError):
    """A data file cannot be used; the message names the file, the line and the remedy."""


def find_data(data: str | os.PathLike[str]) -> Path:
    """A path as it is, or the file of a shipped set by its name: base, identity or tea."""
    return DATA_DIRECTORY / f"{data}.jsonl" if data in SHIPPED_DATA else Path(data)


def read_conversations(path: str | os.PathLike[str]) -> list[Conversation]:
    """Read and check a JSON-lines file of conversations; blank lines are skipped.

    Raises:
        FileNotFoundError: no such file.
        DataError: the file cannot be read or is empty, or a line is not of the format.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no data file at {path}; check the path, or use a shipped set: "
            + ", ".join(SHIPPED_DATA)
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read as UTF-8 text: {error}") from None
    conversations = [
        _parse_line(line, f"{path}:{number}")
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip()
    ]
    if not conversations:
        raise DataError(f"{path} holds no conversations; write one JSON object a line")
    return conversations


def _parse_line(line: str, place: str) -> Conversation:
    try:
        sample = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place}: not JSON ({error}); each line must be one object like "
            '{"conversations": [{"role": "user", "content": "…"}, …]}'
        ) from None
    turns = sample.get("conversations") if isinstance(sample, dict) else None
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f'{place}: no "conversations" list; each line must be one object like '
            '{"conversations": [{"role": "user", "content": "…"}, …]}'
        )
    conversation = []
    for index, turn in enumerate(turns):
        role = turn.get("role") if isinstance(turn, dict) else None
        content = turn.get("content") if isinstance(turn, dict) else None
        where = f"{place}: turn {index + 1}"
        if role not in ROLES:
            raise DataError(f"{where} has role {role!r}; use one of {', '.join(ROLES)}")
        if role == "system" and index:
            raise DataError(f"{where} is a system turn; only the first turn may be one")
        if not isinstance(content, str):
            raise DataError(f'{where} ({role}) has no "content" text; give it a string')
        if any("\ud800" <= character <= "\udfff" for character in content):
            raise DataError(f"{where} ({role}) holds half a surrogate pair; write whole characters")
        if role == "assistant" and not content.strip():
            raise DataError(
                f"{where}: the assistant says nothing; write its answer or delete the turn"
            )
        conversation.append({"role": role, "content": content})
    return conversation


class SFTDataset(Dataset[Sample]):
    """Tokenised conversations with a mask on what the assistant says.

    Args:
        path: a JSON-lines file, or the conversations themselves.
        tokenizer: with a chat template, as `load_tokenizer` gives.
        max_length: samples longer than this many tokens are cut at the end, at least 2.
        source: what error messages call conversations that did not come from a file.

    Items are ``(X, Y, loss_mask)``, int64 ``[length]`` each. Y equals X: nothing is shifted here,
    the loss shifts once for all. The mask is 1 on the tokens of every assistant turn and the
    ``</s>`` that ends it, 0 elsewhere. A batch of items, as a DataLoader asks for it, comes padded
    with ``pad_token_id`` and mask 0 to the longest of the batch.

    Attributes:
        cut: number of samples that were longer than max_length.
        dropped: number left out since no token of the assistant was inside max_length.
        lengths: tokens of each sample.

    Raises:
        FileNotFoundError, DataError: as `read_conversations`; or nothing is left to train on.
        ValueError: max_length below 2, or a chat template that rewrites earlier turns.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | Sequence[Conversation],
        tokenizer: Any,
        max_length: int = 512,
        source: str = "the conversations",
    ) -> None:
        if max_length < 2:
            raise ValueError(f"max_length must be at least 2 tokens, got {max_length}")
        if isinstance(path, (str, os.PathLike)):
            conversations: Sequence[Conversation] = read_conversations(path)
            source = str(path)
        else:
            conversations = path
        self.tokenizer, self.max_length = tokenizer, max_length
        self.pad_token_id = tokenizer.pad_token_id or 0
        self.samples: list[tuple[Tensor, Tensor]] = []
        self.conversations: list[Conversation] = []
        self.cut = self.dropped = 0
        for conversation, (ids, mask) in zip(
            conversations, _encode(conversations, tokenizer), strict=True
        ):
            # The first token is never predicted, so a mask there supervises nothing.
            if not any(mask[1:max_length]):
                self.dropped += 1
                continue
            self.cut += len(ids) > max_length
            self.samples.append((torch.tensor(ids[:max_length]), torch.tensor(mask[:max_length])))
            self.conversations.append(conversation)
        if not self.samples:
            raise DataError(
                f"{source}: none of {len(conversations)} samples has an assistant's word within "
                f"{max_length} tokens; raise max_length (--max-length) or add assistant turns"
            )
        self.lengths = [len(ids) for ids, _ in self.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def fingerprint(self) -> str:
        """A hash of all tokens and masks, in order."""
        digest = hashlib.sha256()
        for ids, mask in self.samples:
            digest.update(ids.numpy().tobytes() + mask.numpy().tobytes())
        return digest.hexdigest()

    def __getitem__(self, index: int) -> Sample:
        ids, mask = self.samples[index]
        return ids.clone(), ids.clone(), mask.clone()

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
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


def _encode(
    conversations: Sequence[Conversation], tokenizer: Any
) -> Iterator[tuple[list[int], list[int]]]:
    """Token ids and mask of each conversation, a few hundred at a time.

    The text is cut where the assistant begins and ends, and each piece is tokenised on its own, as
    it is in generation: no token reaches across.
    """
    for start in range(0, len(conversations), 512):
        marked = [_render(c, tokenizer) for c in conversations[start : start + 512]]
        texts = [text for pieces in marked for text, _ in pieces]
        encoded = iter(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for pieces in marked:
            ids: list[int] = []
            mask: list[int] = []
            for _, supervised in pieces:
                piece = next(encoded)
                ids += piece
                mask += [int(supervised)] * len(piece)
            yield ids, mask


def _render(conversation: Conversation, tokenizer: Any) -> list[tuple[str, bool]]:
    """The chat template's text in pieces: what the assistant says, end mark included, or not."""

    def render(turns: Conversation, prompt: bool = False) -> str:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)

    text = render(conversation)
    pieces, done = [], 0
    for index, turn in enumerate(conversation):
        if turn["role"] != "assistant":
            continue
        earlier = conversation[:index]
        if index:
            before = render(earlier, prompt=True)
        else:  # templates need not render an empty conversation; a private-use character stands in
            before = render([{**turn, "content": "\ue000"}]).partition("\ue000")[0]
        if "</think>" in turn["content"] and not text.startswith(before):
            # The prompt holds an empty thought, which templates write before plain answers; of a
            # turn that thinks aloud, the thought is the assistant's own.
            thought = {**turn, "content": "<think>\ue000</think>\ue000"}
            before = render([*earlier, thought]).partition("\ue000")[0]
        after = render(conversation[: index + 1]).rstrip()
        if not (text.startswith(before) and text.startswith(after)):
            raise ValueError(
                "the tokenizer's chat template writes earlier turns differently once later ones "
                "follow, so the assistant's words cannot be found; use a template that does not"
            )
        pieces += [(text[done : len(before)], False), (text[len(before) : len(after)], True)]
        done = len(after)
    return [*pieces, (text[done:], False)]
