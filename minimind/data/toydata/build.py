"""Make the shipped conversations from the text files beside this one.

    python -m minimind.data.toydata.build [OUT]

writes six JSON-lines files, by default over those in ``minimind/assets/data``: the base set, the
new identity and the narrow domain (tea), each with a held-out split whose questions are asked in
words that training never sees. The same text and seed give the same bytes.

The base's held-out split has no questions about identity, since changing those answers is what
the identity adapter is for; their own held-out wordings are in ``identity.heldout.jsonl``.
"""

from __future__ import annotations

import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

LANGUAGES = ("en", "zh")
SEED = 20250214
TEXT = Path(__file__).parent
OUT = TEXT.parents[1] / "assets" / "data"

Turn = dict[str, str]
Conversation = list[Turn]


class Entry(NamedTuple):
    """One thing to know: wordings of the question, held-out wordings, and the answers."""

    questions: list[str]
    heldout: list[str]
    answers: list[str]


class Persona(NamedTuple):
    """What stands for ``{name}`` and ``{maker}`` in the answers about identity."""

    name: str
    maker: str


BASE = {
    "en": Persona("MiniMind", "the MiniMind project"),
    "zh": Persona("MiniMind", "MiniMind 项目"),
}
ROBIN = {"en": Persona("Robin", "the open workshop"), "zh": Persona("知更鸟", "开放工坊")}


def parse(text: str) -> Iterator[Entry]:
    """Read blocks of ``Q:``, ``H:``, ``A:`` lines and ``- value | value`` rows.

    Rows fill ``{a}``, ``{b}``, ``{c}``: a block with rows yields one entry per row.
    """
    for block in re.split(r"\n\s*\n", text):
        lines: dict[str, list[str]] = {"Q": [], "H": [], "A": [], "-": []}
        for line in block.splitlines():
            if line.startswith("#") or not line.strip():
                continue
            mark, _, content = line.partition(" ")
            lines[mark.rstrip(":")].append(content.strip())
        if not lines["Q"]:
            continue
        rows = lines["-"] or [""]
        for row in rows:
            values = dict(zip("abc", (value.strip() for value in row.split("|")), strict=False))
            filled = [[_fill(s, values) for s in lines[mark]] for mark in ("Q", "H", "A")]
            yield Entry(*filled)


def entries(language: str, topic: str, persona: Persona | None = None) -> list[Entry]:
    """All entries of ``<language>/<topic>.txt``, the persona filled in if one is given."""
    found = list(parse((TEXT / language / f"{topic}.txt").read_text(encoding="utf-8")))
    if persona is None:
        return found
    return [
        entry._replace(answers=[_fill(answer, persona._asdict()) for answer in entry.answers])
        for entry in found
    ]


def _fill(text: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        text = text.replace("{" + name + "}", value)
    return text


_SUMS = {
    "en": {
        "+": [
            "What is {x} plus {y}?",
            "{x} + {y} = ?",
            "Add {x} and {y}.",
            "how much is {x} + {y}",
        ],
        "-": ["What is {x} minus {y}?", "{x} - {y} = ?", "Take {y} from {x}.", "what is {x} - {y}"],
        "*": ["What is {x} times {y}?", "{x} * {y} = ?", "Multiply {x} by {y}.", "{x} times {y}"],
        "answer": ["{x} plus {y} is {z}.", "{x} minus {y} is {z}.", "{x} times {y} is {z}."],
    },
    "zh": {
        "+": ["{x}加{y}等于几？", "{x}+{y}=?", "请算一下{x}加{y}。", "{x}加上{y}是多少"],
        "-": ["{x}减{y}等于几？", "{x}-{y}=?", "请算一下{x}减{y}。", "{x}减去{y}是多少"],
        "*": ["{x}乘{y}等于几？", "{x}*{y}=?", "请算一下{x}乘{y}。", "{x}乘以{y}是多少"],
        "answer": ["{x}加{y}等于{z}。", "{x}减{y}等于{z}。", "{x}乘{y}等于{z}。"],
    },
}


def arithmetic(language: str) -> Iterator[Entry]:
    """Sums and differences up to ten and the multiplication table."""
    words = _SUMS[language]
    for x in range(11):
        for y in range(11):
            for sign, z, answer in zip("+-*", (x + y, x - y, x * y), words["answer"], strict=True):
                if z < 0 or (sign == "*" and 0 in (x, y)):
                    continue
                values = {"x": str(x), "y": str(y), "z": str(z)}
                yield Entry([_fill(q, values) for q in words[sign]], [], [_fill(answer, values)])


def conversation(*turns: tuple[str, str]) -> Conversation:
    """``(question, answer)`` pairs as a list of user and assistant turns."""
    return [
        {"role": role, "content": content}
        for pair in turns
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]


def pairs(entry: Entry, heldout: bool = False) -> list[tuple[str, str]]:
    """Each wording with an answer, the alternatives taken in turn."""
    questions = entry.heldout if heldout else entry.questions
    return [(q, entry.answers[i % len(entry.answers)]) for i, q in enumerate(questions)]


_OPENINGS = {
    "en": ("Hello, ", "Hi, ", "Hey, ", "Good morning, ", "Good evening, ", "Excuse me, ", "So, ",
           "Please, ", "Hello there, ", "Now, "),
    "zh": ("你好，", "您好，", "嗨，", "请问，", "你好呀，", "那么，", "哈喽，",
           "麻烦问一下，", "我想问，"),
}  # fmt: skip


def vary(question: str, language: str, rng: random.Random) -> str:
    """The same question as somebody else might type it: with an opening, in small letters, or
    without the final mark."""
    if rng.random() < 0.6 and not question.startswith(
        ("Hello", "Hi", "Hey", "hi", "hello", "你好")
    ):
        first = question if question.startswith("I ") else question[0].lower() + question[1:]
        question = rng.choice(_OPENINGS[language]) + first
    if rng.random() < 0.4:
        question = question.lower()
    if rng.random() < 0.4:
        question = question.rstrip("?.!？。！ ")
    return question


def hold_out(found: Iterable[Entry], rng: random.Random, every: int) -> list[Entry]:
    """Move one wording of about one entry in ``every`` to its held-out list."""
    split = []
    for entry in found:
        questions = list(entry.questions)
        if len(questions) >= 4 and rng.randrange(every) == 0:
            out = questions.pop(rng.randrange(len(questions)))
            entry = Entry(questions, [out], entry.answers)
        split.append(entry)
    return split


def build(seed: int = SEED) -> dict[str, list[Conversation]]:
    """All data sets by name, shuffled; a held-out question is in no training set."""
    rng = random.Random(seed)
    sets: dict[str, list[Conversation]] = {
        f"{name}{split}": [] for name in ("base", "identity", "tea") for split in ("", ".heldout")
    }
    for language in LANGUAGES:
        knowledge = [e for t in ("facts", "definitions") for e in entries(language, t)]
        knowledge = hold_out(knowledge, rng, every=4)
        sums = hold_out(arithmetic(language), rng, every=6)
        sums = [e._replace(questions=rng.sample(e.questions, 2)) for e in sums]
        manners = hold_out(entries(language, "manners"), rng, every=4)
        identity = entries(language, "identity", BASE[language])
        singles = [p for e in knowledge + sums + manners + identity for p in pairs(e)]
        polite = [p for e in manners for p in pairs(e)]
        sets["base"] += [conversation(pair) for pair in singles]
        as_others_type = [pair for pair in singles if rng.random() < 0.25]
        as_others_type += 2 * [p for e in identity for p in pairs(e)]
        sets["base"] += [conversation((vary(q, language, rng), a)) for q, a in as_others_type]
        for _ in range(500):
            turns = rng.sample(singles, rng.choice((2, 2, 3)))
            if rng.random() < 0.3:
                turns[0] = rng.choice(polite)
            sets["base"].append(conversation(*turns))
        for entry in knowledge + sums + manners:
            sets["base.heldout"] += [conversation(p) for p in pairs(entry, heldout=True)]

        renamed = entries(language, "identity", ROBIN[language])
        about = [p for e in renamed for p in pairs(e)]
        others = rng.sample([p for e in knowledge + sums for p in pairs(e)], 240) + polite
        sets["identity"] += [conversation(pair) for pair in about + others]
        sets["identity"] += [
            conversation((vary(q, language, rng), a)) for q, a in rng.sample(about, len(about) // 2)
        ]
        for _ in range(40):
            turns = [rng.choice(about), rng.choice(others)]
            rng.shuffle(turns)
            sets["identity"].append(conversation(*turns))
        for entry in renamed:
            sets["identity.heldout"] += [conversation(p) for p in pairs(entry, heldout=True)]

        for entry in entries(language, "tea"):
            sets["tea"] += [conversation(p) for p in pairs(entry)]
            sets["tea.heldout"] += [conversation(p) for p in pairs(entry, heldout=True)]
    # A broad sample of the base set keeps what it taught where it is. Measured on the shipped base:
    # without it, learning the identity raises its held-out loss by 9 to 14 % instead of 5.
    names = {persona.name for persona in BASE.values()}
    known = [c for c in sets["base"] if not any(n in t["content"] for n in names for t in c)]
    for name in ("identity", "tea"):
        sets[name] += random.Random(f"{seed}/rehearsal").sample(known, 800)
    for name, conversations in sets.items():
        rng.shuffle(conversations)
        sets[name] = list({json.dumps(c): c for c in conversations}.values())
    _drop_leaks(sets)
    return sets


def normalised(question: str) -> str:
    """Letters, digits and arithmetic signs only, lower case: what makes two questions the same."""
    return re.sub(r"[^\w+*=-]", "", question).lower()


def _drop_leaks(sets: dict[str, list[Conversation]]) -> None:
    """Take out of every held-out split what some training set asks in the same words."""
    asked = {
        normalised(turn["content"])
        for name, conversations in sets.items()
        if not name.endswith(".heldout")
        for turns in conversations
        for turn in turns
        if turn["role"] == "user"
    }
    for name in sets:
        if name.endswith(".heldout"):
            sets[name] = [c for c in sets[name] if normalised(c[0]["content"]) not in asked]


def write(out: Path) -> dict[str, int]:
    """Write every set to ``out/<name>.jsonl``; returns the number of conversations of each."""
    out.mkdir(parents=True, exist_ok=True)
    sets = build()
    for name, conversations in sets.items():
        lines = (json.dumps({"conversations": c}, ensure_ascii=False) for c in conversations)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: len(conversations) for name, conversations in sets.items()}


if __name__ == "__main__":
    for name, count in write(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT).items():
        print(f"{name}.jsonl: {count} conversations")
