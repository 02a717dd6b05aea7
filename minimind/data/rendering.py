"""From a sample to token ids and their loss mask, by the tokenizer's chat template.

A template writes what it knows of and leaves out the rest without a word. So it is tried, once for
each shape of conversation, whether marks in the place of every content, thought, tool and call come
out of it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Hashable, Iterable, Iterator
from typing import Any

from jinja2.exceptions import TemplateError

from .reading import DataError
from .turns import TEXT, Conversation, Sample

# Characters for private use, which stand for no word.
_MARK, _END = "\ue000", "\ue001"
_AT_ONCE = 512
_NESTED = 'some want each as {"type": "function", "function": {"name": …}}'
_REMEDIES = {
    "reasoning_content": "write the thought into the content as <think>…</think>",
    "tools": f"leave them out; {_NESTED}",
    "tool_calls": f"leave them out; {_NESTED}",
}


class Renderer:
    """Turns samples into tokens with one tokenizer.

    Args:
        tokenizer: with a chat template.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._inline: dict[Hashable, bool] = {}

    def encode(self, samples: Iterable[Sample]) -> Iterator[tuple[Sample, list[int], list[int]]]:
        """Each sample with its token ids and mask; a few hundred are tokenised at a time.

        The text is cut where what is learnt begins and ends, and each piece is tokenised on its
        own, as it is in generation: no token reaches across.

        Raises:
            DataError: the template refuses a sample, leaves something out, or rewrites earlier
                turns once later ones follow.
        """
        samples = iter(samples)
        while batch := list(itertools.islice(samples, _AT_ONCE)):
            marked = [self.pieces(sample) for sample in batch]
            texts = [text for pieces in marked for text, _ in pieces]
            # Not verbose: it would warn of lengths that the data set cuts.
            encoded = self.tokenizer(texts, add_special_tokens=False, verbose=False)
            encoded = iter(encoded["input_ids"])
            for sample, pieces in zip(batch, marked, strict=True):
                ids: list[int] = []
                mask: list[int] = []
                for _, learnt in pieces:
                    piece = next(encoded)
                    ids += piece
                    mask += [int(learnt)] * len(piece)
                yield sample, ids, mask

    def pieces(self, sample: Sample) -> list[tuple[str, bool]]:
        """The sample's text in pieces that are learnt, or not.

        Of a conversation those are the assistant's words, thoughts and calls, with the mark that
        ends a turn; of a plain text all, with the tokens that begin and end it.
        """
        if sample and sample[0]["role"] == TEXT:
            ends = (self.tokenizer.bos_token or "", self.tokenizer.eos_token or "")
            return [(text, True) for text in (ends[0], sample[0]["content"], ends[1]) if text]
        try:
            return self._turns(self._with_all_fields(sample), sample)
        except (TemplateError, TypeError) as error:
            raise DataError(
                f"{sample.place}: the tokenizer's chat template refuses the conversation: {error}"
            ) from None

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
            after = self._render(turns[: index + 1], sample.tools).rstrip()
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
