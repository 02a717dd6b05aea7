"""The forms that data comes in, told by the fields of a file's first row.

A file holds one form. What is in a row beside the form's own fields acts on the whole conversation
(system, tools), is known to act on nothing (`INERT`), or is refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .reading import DataError, read_rows, short
from .turns import BESIDE, Conversation, Sample, empty, parsed, sample_of, text_sample

# Where a row comes from and what it is about; nothing of it is learnt.
INERT = (
    "id", "idx", "index", "uuid", "conversation_id", "prompt_id", "source", "dataset", "url",
    "category", "topic", "tags", "language", "lang", "model", "score", "date", "timestamp",
    "metadata",
)  # fmt: skip
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Form:
    """One way to write samples down.

    Attributes:
        name: what `--format` and messages call it.
        needs: fields that every row has; the form is told by them.
        build: makes the sample of a row that has them; takes the place too.
        takes: further fields that ``build`` reads.
        inert: fields that repeat what the form's own say.
        fits: whether a row with the fields is of this form; another may have the same.
    """

    name: str
    needs: tuple[str, ...]
    build: Callable[[Row, str], Sample]
    takes: tuple[str, ...] = BESIDE
    inert: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True

    def example(self) -> str:
        """The fields that a row needs, for messages."""
        return "{" + ", ".join(f'"{name}": …' for name in self.needs) + "}"


def _turns(form: str, field: str, names: tuple[str, str]) -> Callable[[Row, str], Sample]:
    def build(row: Row, place: str) -> Sample:
        turns = parsed(row.get(field))
        if not isinstance(turns, list) or not turns:
            raise DataError(
                f'{place}: no "{field}" list; each line must be one object like '
                f'{{"{field}": [{{"{names[0]}": "{_USERS[names[0]]}", "{names[1]}": "…"}}, …]}}'
            )
        return sample_of(turns, place, _beside(row), form, names)

    return build


_USERS = {"role": "user", "from": "human"}


def _pair(question: str, answer: str) -> Form:
    name = f"{question}/{answer}"

    def build(row: Row, place: str) -> Sample:
        asked, told = row[question], row[answer]
        if isinstance(asked, list) or isinstance(told, list):
            # As TRL has them: turns on both sides, of which the second are learnt.
            earlier = asked if isinstance(asked, list) else _talk(asked, None)[:1]
            turns = told if isinstance(told, list) else _talk(None, told)[1:]
            sample = sample_of([*earlier, *turns], place, _beside(row), name)
            shift = len(sample) - len(earlier) - len(turns)
            first = range(shift, shift + len(earlier))
            given = (i for i in first if sample[i]["role"] == "assistant")
            sample.unlearnt = sorted({*sample.unlearnt, *given})
            return sample
        _texts(row, (question, answer), place)
        return sample_of(_talk(asked, told), place, _beside(row), name)

    return Form(name, (question, answer), build)


def _texts(row: Row, names: tuple[str, ...], place: str) -> None:
    """Raise DataError, in the words of the row rather than of turns, unless all are texts."""
    for name in names:
        if not isinstance(row[name], str):
            raise DataError(
                f'{place}: "{name}" must be a text, got {short(row[name])}; write it in quotes'
            )


def _talk(question: Any, answer: Any) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _alpaca(row: Row, place: str) -> Sample:
    parts = [row["instruction"], row.get("input")]
    asked = "\n".join(part for part in parts if isinstance(part, str) and not empty(part))
    wrong = [part for part in parts if not isinstance(part, str) and not empty(part)]
    if wrong or not asked:
        raise DataError(
            f"{place}: instruction and input must be texts, and one of them not empty, got "
            + " and ".join(short(part) for part in parts)
        )
    _texts(row, ("output",), place)
    history = parsed(row.get("history"))
    turns: Conversation = []
    if not empty(history):
        pairs = isinstance(history, list) and all(
            isinstance(pair, list) and len(pair) == 2 for pair in history
        )
        if not pairs:
            raise DataError(
                f"{place}: history must be a list of [question, answer], got {short(history)}"
            )
        for question, answer in history:
            turns += _talk(question, answer)
    return sample_of([*turns, *_talk(asked, row["output"])], place, _beside(row), "alpaca")


def _beside(row: Row) -> dict[str, Any]:
    return {name: row[name] for name in BESIDE if name in row}


def _says_from(row: Row) -> bool:
    turns = parsed(row.get("conversations"))
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "from" in first and "role" not in first


FORMS = (
    Form(
        "sharegpt",
        ("conversations",),
        _turns("sharegpt", "conversations", ("from", "value")),
        fits=_says_from,
    ),
    Form(
        "conversations",
        ("conversations",),
        _turns("conversations", "conversations", ("role", "content")),
        fits=lambda row: not _says_from(row),
    ),
    Form("messages", ("messages",), _turns("messages", "messages", ("role", "content"))),
    # Some hold the same once more as "text", in the template of the first such data.
    Form(
        "alpaca",
        ("instruction", "output"),
        _alpaca,
        takes=("input", "history", *BESIDE),
        inert=("text",),
    ),
    _pair("prompt", "completion"),
    _pair("prompt", "response"),
    _pair("question", "answer"),
    _pair("query", "response"),
    _pair("input", "output"),
    Form("text", ("text",), lambda row, place: text_sample(row["text"], place), takes=()),
)
_OF_FORMS = {name for form in FORMS for name in form.needs}
_PREFERENCES = ("chosen", "rejected")


class Reader:
    """Makes samples of a file's rows, all of one form.

    Args:
        form: the name of one of `FORMS`; by default the first row tells. Fields of other forms
            are then passed over where they stand beside those of this one.

    Attributes:
        form: the form, once it is known.

    Raises:
        ValueError: there is no form of that name.
    """

    def __init__(self, form: str | None = None) -> None:
        known = {each.name: each for each in FORMS}
        if form is not None and form not in known:
            raise ValueError(f"format must be one of {', '.join(known)}; got {form!r}")
        self.form = known[form] if form else None
        self._given = form is not None
        self._first = ""

    def sample(self, place: str, row: Any) -> Sample:
        """The sample that a row is.

        Raises:
            DataError: the row is of no form, of another than the first, or has a field that
                nothing reads.
        """
        told = None if self._given else tell(row, place)
        # A row that tells nothing is held against the form that the README shows.
        form = self.form or told or _nearest(row, place)
        if told is not None and told is not form:
            raise DataError(
                f"{place}: a row of the form {told.name} in a file of the form {form.name}, as "
                f"{self._first} tells; put each form into a file of its own"
            )
        sample = _sample(form, row, place, forced=self._given)
        if self.form is None:
            self.form, self._first = form, place
        return sample


def read_samples(path: str | os.PathLike[str], form: str | None = None) -> Iterator[Sample]:
    """The samples of a file, one after the other; nothing is kept.

    Args:
        form: as of `Reader`.

    Raises:
        FileNotFoundError: no such file.
        DataError: the file cannot be read, or a row of it cannot be used; see `Reader`.
        ValueError: there is no form of that name.
    """
    reader = Reader(form)
    for place, row in read_rows(path):
        yield reader.sample(place, row)


def read_conversations(path: str | os.PathLike[str], form: str | None = None) -> list[Sample]:
    """All samples of a file, conversations or plain texts; see `read_samples` for the rest.

    Raises:
        FileNotFoundError, DataError, ValueError: as `read_samples`; or the file is empty.
    """
    samples = list(read_samples(path, form))
    if not samples:
        raise DataError(nothing_in(path))
    return samples


def nothing_in(source: str | os.PathLike[str]) -> str:
    """What to say of data without a single row."""
    return f"{source} holds nothing to learn; write conversations or texts into it, a row each"


def tell(row: Any, place: str) -> Form | None:
    """The form that a row's fields are of, or None.

    Raises:
        DataError: it holds a preference between answers.
    """
    if not isinstance(row, dict):
        return None
    if any(not empty(row.get(name)) for name in _PREFERENCES):
        raise DataError(
            f"{place}: chosen and rejected answers are preferences, for methods such as DPO; here "
            "answers are learnt as they stand: write the chosen ones as conversations"
        )
    for form in FORMS:
        if all(row.get(name) is not None for name in form.needs) and form.fits(row):
            return form
    return None


def _nearest(row: Any, place: str) -> Form:
    if isinstance(row, dict) and row and "conversations" not in row:
        names = ", ".join(list(map(short, row))[:8]) + (", …" if len(row) > 8 else "")
        raise DataError(
            f'{place}: no "conversations" list, nor the fields of another form, but {names}; '
            f"known forms: {', '.join(form.name + ' ' + form.example() for form in FORMS[1:])}"
        )
    return FORMS[1]


def _sample(form: Form, row: Any, place: str, forced: bool) -> Sample:
    lacking = [name for name in form.needs if not isinstance(row, dict) or row.get(name) is None]
    if lacking == ["conversations"]:
        return form.build({}, place)  # which says what a line must be
    if lacking:
        raise DataError(
            f'{place}: no "{lacking[0]}", which each row of the form {form.name} has: '
            f"{form.example()}"
        )
    sample = form.build(row, place)
    known = {*form.needs, *form.takes, *form.inert, *INERT, *(_OF_FORMS if forced else ())}
    for name, value in row.items():
        if name in known or empty(value):
            continue
        # Some sets repeat the question beside the conversation that begins with it.
        if isinstance(value, str) and any(value == turn["content"] for turn in sample):
            continue
        raise DataError(
            f"{place} has the field {short(name)}, {short(value)}, which is not known here beside "
            f"{', '.join(form.needs)}; delete it if nothing of it is to be learnt"
        )
    return sample
