"""From a sample to token ids and their loss mask, by the tokenizer's chat template.

A template writes what it knows of and leaves out the rest without a word. So it is tried, once for
each shape of conversation, whether marks in the place of every content, thought, tool and call come
out of it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Collection, Hashable, Iterable
from dataclasses import dataclass
from typing import Any

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerFast

from .reading import DataError
from .templates import only_concatenates
from .turns import TEXT, Conversation, Sample

# Characters for private use, which stand for no word.
_MARK, _END = "\ue000", "\ue001"
# Pieces: the texts and the numbers of the turns whose contents each is made of, and the turn that
# is learnt in it, or -1.
Form = list[tuple[list[str | int], int]]
Refused = Callable[[Sample, DataError], None]
_NESTED = 'some want each as {"type": "function", "function": {"name": …}}'
_REMEDIES = {
    "reasoning_content": "write the thought into the content as <think>…</think>",
    "tools": f"leave them out; {_NESTED}",
    "tool_calls": f"leave them out; {_NESTED}",
}


@dataclass(frozen=True)
class Encoded:
    """Some samples as tokens, end to end.

    Attributes:
        ids: all tokens.
        lengths: tokens of each piece.
        learnt: whether each piece is learnt.
        counts: pieces of each sample.
    """

    ids: list[int]
    lengths: list[int]
    learnt: list[bool]
    counts: list[int]


class Renderer:
    """Turns samples into tokens with one tokenizer.

    Args:
        tokenizer: with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._inline: dict[Hashable, bool] = {}
        template = tokenizer.chat_template
        self._joins = isinstance(template, str) and only_concatenates(template)
        self._forms: dict[tuple[str, ...], Form | None] = {}

    def encode(self, samples: Iterable[Sample], bad: Refused | None = None) -> Encoded:
        """The tokens of ``samples``, a few hundred of them.

        The text is cut where what is learnt begins and ends, and each piece is tokenised on its
        own, as it is in generation: no token reaches across.

        Args:
            bad: told of each sample that cannot be written down, which then has no pieces.

        Raises:
            DataError: the template refuses a sample, leaves something out, or rewrites earlier
                turns once later ones follow; and ``bad`` is None.
        """
        texts: list[str] = []
        learnt: list[bool] = []
        counts = []
        for sample in samples:
            try:
                pieces = self.pieces(sample)
            except DataError as error:
                if bad is None:
                    raise
                bad(sample, error)
                pieces = []
            counts.append(len(pieces))
            for text, flag in pieces:
                texts.append(text)
                learnt.append(flag)
        once = dict.fromkeys(texts)  # the end of a conversation is that of many
        known = dict(zip(once, self._tokenize(list(once)), strict=True))
        ids: list[int] = []
        lengths = []
        for text in texts:
            piece = known[text]
            ids += piece
            lengths.append(len(piece))
        return Encoded(ids, lengths, learnt, counts)

    def _tokenize(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        if type(self.tokenizer) is not PreTrainedTokenizerFast:
            # Not verbose: it would warn of lengths that the data set cuts.
            return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        # The same without the masks and offsets that nobody reads, in half the time.
        backend = self.tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = self.tokenizer.split_special_tokens
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def pieces(self, sample: Sample) -> list[tuple[str, bool]]:
        """The sample's text in pieces that are learnt, or not.

        Of a conversation those are the assistant's words, thoughts and calls, with the mark that
        ends a turn; of a plain text all, with the tokens that begin and end it.
        """
        if sample and sample[0]["role"] == TEXT:
            ends = (self.tokenizer.bos_token or "", self.tokenizer.eos_token or "")
            return [(text, True) for text in (ends[0], sample[0]["content"], ends[1]) if text]
        try:
            turns = self._with_all_fields(sample)
            if self._joins and not sample.tools and all(map(_plain, turns)):
                roles = tuple(turn["role"] for turn in turns)
                if roles not in self._forms:
                    self._forms[roles] = self._form(roles)
                if (form := self._forms[roles]) is not None:
                    return _filled(form, turns, sample.unlearnt)
            return self._turns(turns, sample)
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"{sample.place}: the tokenizer's chat template refuses the conversation: {error}"
            ) from None

    def _form(self, roles: tuple[str, ...]) -> Form | None:
        """The pieces of all plain conversations with these roles, where there is such a form.

        The template must be one that only joins contents.
        """
        marks = [f"{_MARK}{index}{_END}" for index in range(len(roles))]
        turns = [{"role": r, "content": m} for r, m in zip(roles, marks, strict=True)]
        try:
            pieces = self._turns(turns, Sample(turns, ""))
        except DataError:
            return None  # it is said of the sample itself
        said = iter(index for index, role in enumerate(roles) if role == "assistant")
        form: Form = []
        for text, learnt in pieces:
            parts: list[str | int] = []
            for before in text.split(_END):
                plain, mark, number = before.partition(_MARK)
                parts += [plain, int(number)] if mark else [plain]
            if learnt and not str(parts[-1]).strip():
                return None  # what ends a turn was stripped, which may reach into what is said
            form.append((parts, next(said) if learnt else -1))
        return form

    def _render(self, turns: Conversation, tools: Any, prompt: bool = False) -> str:
        return self.tokenizer.apply_chat_template(
            turns, tools=tools, tokenize=False, add_generation_prompt=prompt
        )

    def _turns(self, turns: Conversation, sample: Sample) -> list[tuple[str, bool]]:
        text = self._render(turns, sample.tools)
        pieces, done = [], 0
        for index, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            before = self._opening(turns[:index], turn, sample.tools, text)
            last = index + 1 == len(turns)
            after = (text if last else self._render(turns[: index + 1], sample.tools)).rstrip()
            if not (text.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{sample.place}: the tokenizer's chat template writes earlier turns "
                    "differently once later ones follow, so the assistant's words cannot be found; "
                    "use a template that does not"
                )
            said = (text[len(before) : len(after)], index not in sample.unlearnt)
            pieces += [(text[done : len(before)], False), said]
            done = len(after)
        return [*pieces, (text[done:], False)]

    def _opening(self, earlier: Conversation, turn: dict[str, Any], tools: Any, text: str) -> str:
        """What is written before the assistant's own words begin."""
        if earlier:
            before = self._render(earlier, tools, prompt=True)
        else:  # templates need not render an empty conversation; a mark stands in
            before = self._render([{"role": turn["role"], "content": _MARK}], tools)
            before = before.partition(_MARK)[0]
        thought = "reasoning_content" in turn or "</think>" in turn["content"]
        if not thought or text.startswith(before):
            return before
        # The prompt holds an empty thought, which templates write before plain answers; of a turn
        # that thinks aloud, the thought is the assistant's own.
        marked = {**turn, "content": f"<think>{_MARK}</think>"}
        if "reasoning_content" in turn:
            marked |= {"content": "", "reasoning_content": _MARK}
        marked.pop("tool_calls", None)
        return self._render([*earlier, marked], tools).rpartition(_MARK)[0]

    def _with_all_fields(self, sample: Sample) -> Conversation:
        """The turns, in such a way that the template writes all that is in them.

        Thoughts in their own field become part of the content where the template knows of thoughts
        but not of the field.
        """
        shape = (
            tuple(
                (turn["role"], *turn, len(turn.get("tool_calls", ())), *_parts(turn["content"]))
                for turn in sample
            ),
            len(sample.tools or ()),
        )
        if shape not in self._inline:
            turns, tools, marks = _marked(sample)
            missing = _missing(marks, self._render(turns, tools))
            inline = any(field == "reasoning_content" for field, _ in missing)
            known = str(self.tokenizer.chat_template)
            inline = inline and "</think>" in known and "reasoning_content" not in known
            if inline:
                with contextlib.suppress(TemplateError):  # it cannot do without the field
                    missing = _missing(marks, self._render(_inlined(turns), tools))
            if missing:
                field, where = missing[0]
                raise DataError(
                    f"{sample.place}: the tokenizer's chat template leaves out the {field} of "
                    f"{where}; use a tokenizer whose template writes that, or "
                    + _REMEDIES.get(field, "delete it")
                )
            self._inline[shape] = inline
        return _inlined(sample) if self._inline[shape] else sample


def _plain(turn: dict[str, Any]) -> bool:
    return len(turn) == 2  # a role and a content, which every turn has


def _filled(form: Form, turns: Conversation, unlearnt: Collection[int]) -> list[tuple[str, bool]]:
    return [
        (
            "".join(p if isinstance(p, str) else turns[p]["content"] for p in parts),
            said >= 0 and said not in unlearnt,
        )
        for parts, said in form
    ]


def _parts(content: str) -> tuple[bool, bool]:
    """Whether there is a thought in the content, and whether anything else."""
    thought, closed, rest = content.rpartition("</think>")
    return bool(closed and thought.rpartition("<think>")[2].strip()), bool(rest.strip())


def _marked(sample: Sample) -> tuple[Conversation, list[Any] | None, dict[str, tuple[str, str]]]:
    """The sample's turns and tools with marks in them, and what each mark stands for."""
    marks: dict[str, tuple[str, str]] = {}

    def mark(field: str) -> str:
        made = f"{_MARK}{len(marks)}{_END}"
        marks[made] = field, where
        return made

    def called(item: dict[str, Any], field: str) -> dict[str, Any]:
        inner = {**item.get("function", item), "name": mark(field)}
        if field == "tool_calls":
            inner["arguments"] = {mark(field): mark(field)}
        return {**item, "function": inner} if "function" in item else inner

    where = "the conversation"
    tools = sample.tools and [called(tool, "tools") for tool in sample.tools]
    turns = []
    for index, turn in enumerate(sample):
        where = f"turn {index + 1} ({turn['role']})"
        thought, words = _parts(turn["content"])
        content = f"<think>\n{mark('thought')}\n</think>\n\n" if thought else ""
        made = {**turn, "content": content + (mark("content") if words else "")}
        if "reasoning_content" in turn:
            made["reasoning_content"] = mark("reasoning_content")
        if "tool_calls" in turn:
            made["tool_calls"] = [called(call, "tool_calls") for call in turn["tool_calls"]]
        # Of a tool's result the name says again which call it answers; not all templates repeat it.
        if "name" in turn and turn["role"] != "tool":
            made["name"] = mark("name")
        turns.append(made)
    return turns, tools, marks


def _missing(marks: dict[str, tuple[str, str]], text: str) -> list[tuple[str, str]]:
    """What the marks stand for that are not in the text, as they are or as JSON escapes them."""
    return [
        what
        for mark, what in marks.items()
        if mark not in text and json.dumps(mark)[1:-1] not in text
    ]


def _inlined(turns: Conversation) -> Conversation:
    """The turns with their thoughts at the head of the content."""
    inlined = []
    for turn in turns:
        turn = dict(turn)
        if thought := turn.pop("reasoning_content", ""):
            turn["content"] = f"<think>\n{thought}\n</think>\n\n{turn['content']}"
        inlined.append(turn)
    return inlined
