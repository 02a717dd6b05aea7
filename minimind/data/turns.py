"""Conversations as a chat template takes them: turns checked, each field put where it acts.

What decides what is learnt is never dropped: a field goes to the template or to the loss mask, or
it is refused by name. Empty fields are as if they were not there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .reading import DataError, short

Conversation = list[dict[str, Any]]

ROLES = ("system", "user", "assistant", "tool")
# The role of a Sample's only turn, where that is a plain text; files cannot say it.
TEXT = "text"
_OTHER_NAMES = {
    "developer": "system",
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function": "tool",
    "observation": "tool",
}
_LEARNT = ("weight", "train", "loss")
_TOOLS = ("tools", "functions")
# What may stand beside the turns and acts on all of them.
BESIDE = ("system", *_TOOLS)
_INERT_IN_TURNS = ("id", "index", "timestamp")


class Sample(list[dict[str, Any]]):
    """A conversation, or a plain text as one turn of the role ``text``; the turns are the items.

    Attributes:
        place: where it was read, for messages.
        form: what it was read as.
        tools: descriptions for the chat template, or None.
        unlearnt: numbers of the assistant's turns that have weight 0.
    """

    __slots__ = ("form", "place", "tools", "unlearnt")

    def __init__(
        self,
        turns: Iterable[dict[str, Any]],
        place: str,
        form: str = "conversations",
        tools: list[Any] | None = None,
        unlearnt: Collection[int] = (),
    ) -> None:
        super().__init__(turns)
        self.place, self.form, self.tools, self.unlearnt = place, form, tools, unlearnt

    @property
    def teaches(self) -> bool:
        """Whether there is a word to be learnt in it."""
        learnt = (i for i, t in enumerate(self) if t["role"] in ("assistant", TEXT))
        return any(i not in self.unlearnt for i in learnt)


def empty(value: Any) -> bool:
    """Nothing, by any of its names; neither 0 nor False is."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value != value or (isinstance(value, (list, dict)) and not value)


def parsed(value: Any) -> Any:
    """Lists and objects that a file holds as texts of JSON, as what they are; else the value."""
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def text_sample(text: Any, place: str) -> Sample:
    """A plain text, which is learnt as a whole.

    Raises:
        DataError: it is no text, or blank.
    """
    if not isinstance(text, str) or empty(text):
        raise DataError(f'{place}: no words in "text": {short(text)}; write some or delete the row')
    _whole(text, f'{place}: "text"')
    return Sample([{"role": TEXT, "content": text}], place, TEXT)


def sample_of(
    turns: Sequence[Any],
    place: str,
    beside: Mapping[str, Any] | None = None,
    form: str = "conversations",
    names: tuple[str, str] = ("role", "content"),
) -> Sample:
    """The sample that ``turns`` are, each a dictionary with a role, a content and more.

    Args:
        turns: kept as they are where nothing is to be done to them.
        beside: fields of the row that act on the whole: system, tools, functions.
        names: what a turn calls its role and its content.

    Raises:
        DataError: a turn is not of the format, has a field that nothing reads, or fields disagree.
    """
    beside = {name: value for name, value in (beside or {}).items() if not empty(value)}
    conversation: Conversation = []
    unlearnt: list[int] = []
    found = [(place, name, beside[name]) for name in _TOOLS if name in beside]
    for index, raw in enumerate(turns):
        where = f"{place}: turn {index + 1}"
        turn, tools, learnt = _turn(raw, where, names)
        if turn["role"] == "system" and index:
            raise DataError(f"{where} is a system turn; only the first turn may be one")
        found += [(where, name, value) for name, value in tools]
        if not learnt:
            unlearnt.append(index)
        conversation.append(turn)
    if "system" in beside:
        system = {"role": "system", "content": beside["system"]}
        system = _turn(system, f'{place}: "system"', ("role", "content"))[0]
        if conversation[0]["role"] != "system":
            conversation.insert(0, system)
            unlearnt = [index + 1 for index in unlearnt]
        elif conversation[0]["content"] != system["content"]:
            raise DataError(
                f'{place}: "system" beside the turns and the first turn say different things; '
                "keep one of them"
            )
    return Sample(conversation, place, form, _one_list(found), unlearnt)


def _turn(
    raw: Any, where: str, names: tuple[str, str]
) -> tuple[dict[str, Any], list[tuple[str, Any]], bool]:
    """A turn for the template, the tools that it names, and whether it is learnt."""
    fields = dict(raw) if isinstance(raw, dict) else {}
    given = fields.pop(names[0], None)
    role = _OTHER_NAMES.get(given, given) if isinstance(given, str) else None
    content = fields.pop(names[1], None)
    if role not in ROLES:
        raise DataError(f"{where} has {names[0]} {short(given)}; use one of {', '.join(ROLES)}")
    where = f"{where} ({given})"
    turn: dict[str, Any] = {"role": role, "content": content}
    fields = {name: value for name, value in fields.items() if not empty(value)}
    learnt = _learnt(fields, role, where)
    tools = [(name, fields.pop(name)) for name in _TOOLS if name in fields]
    if role == "assistant":
        calls = [fields.pop(name) for name in ("tool_calls", "function_call") if name in fields]
        if given == "function_call":
            calls.append(content)
            turn["content"] = content = ""
        if len(calls) > 1:
            raise DataError(f"{where} has its calls in two places; keep one of them")
        if calls:
            turn["tool_calls"] = _calls(calls[0], where)
            turn["content"] = content = "" if content is None else content
        if "reasoning_content" in fields:
            turn["reasoning_content"] = _words(fields.pop("reasoning_content"), where, "thought")
    if isinstance(content, list) and all(isinstance(p, dict) and "text" in p for p in content):
        turn["content"] = content = "".join(str(part["text"]) for part in content)
    turn["content"] = _words(content, where, names[1])
    if role == "assistant" and not content.strip() and "tool_calls" not in turn:
        raise DataError(f"{where}: the assistant says nothing; write its answer or delete the turn")
    if "reasoning_content" in turn and "</think>" in content:
        raise DataError(f"{where} has a thought in its content and in reasoning_content; keep one")
    for name in ("name", "tool_call_id"):
        if name in fields:
            turn[name] = _words(fields.pop(name), where, name)
    for name, value in fields.items():
        if name not in _INERT_IN_TURNS:
            raise DataError(
                f"{where} has the field {short(name)}, {short(value)}, which is not known here; "
                "delete it if nothing of it is to be learnt"
            )
    return (raw if turn == raw else turn), tools, learnt


def _learnt(fields: dict[str, Any], role: str, where: str) -> bool:
    """Take weight, train and loss out of ``fields``: whether the turn is learnt."""
    said: dict[bool, str] = {}
    for name in _LEARNT:
        if name in fields:
            value = fields.pop(name)
            if not isinstance(value, (int, float)) or value not in (0, 1):
                raise DataError(
                    f"{where} has {name} {short(value)}, expected 0 or 1: a turn is learnt or not"
                )
            said[bool(value)] = name
    if len(said) > 1:
        raise DataError(f"{where}: {said[True]} and {said[False]} disagree; keep one of them")
    if role != "assistant" and True in said:
        raise DataError(
            f"{where} has {said[True]} 1, but only what the assistant says can be learnt; "
            "delete the field"
        )
    return False not in said or role != "assistant"


def _words(value: Any, where: str, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'{where} has no "{name}" text; give it a string')
    return _whole(value, where)


def _whole(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where} holds half a surrogate pair; write whole characters") from None
    return text


def _listed(value: Any, where: str, what: str) -> list[dict[str, Any]]:
    """A list of functions or calls, however it is written; each has a name."""
    value = parsed(value)
    items = [parsed(item) for item in (value if isinstance(value, list) else [value])]
    for item in items:
        inner = item.get("function", item) if isinstance(item, dict) else None
        if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
            raise DataError(
                f"{where}: {what} must be a list of objects with a name, or JSON text of one, got "
                f"{short(value)}"
            )
    _whole(json.dumps(items, ensure_ascii=False), where)
    return items


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    """Calls with arguments as objects, which is what templates write as JSON."""
    calls = []
    for call in _listed(value, where, "tool_calls"):
        inner = call.get("function", call)
        arguments = parsed(inner.get("arguments"))
        arguments = {} if empty(arguments) else arguments
        if not isinstance(arguments, dict):
            raise DataError(
                f"{where} calls {inner['name']} with arguments {short(arguments)}, expected an "
                "object or JSON text of one"
            )
        inner = {**inner, "arguments": arguments}
        calls.append({**call, "function": inner} if "function" in call else inner)
    return calls


def _one_list(found: list[tuple[str, str, Any]]) -> list[dict[str, Any]] | None:
    """The tools of a conversation, which may be named in several places if they are the same."""
    lists = [(where, _listed(value, where, name)) for where, name, value in found]
    for where, tools in lists[1:]:
        if tools != lists[0][1]:
            raise DataError(
                f"{where} names other tools than {lists[0][0]}; a template takes one list for the "
                "whole conversation"
            )
    return lists[0][1] if lists else None
