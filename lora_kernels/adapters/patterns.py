"""Regular expressions of strangers, matched in a time that their length and the name's bound.

Python's `re` tries every way to match before it gives up, and ``(a+)+b`` has 2ⁿ of them. Here all
ways are followed at once, a character at a time (K. Thompson, Regular Expression Search Algorithm,
1968). What cannot be followed so, as back references and looking ahead, is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

try:
    from re import _parser  # type: ignore[attr-defined]
except ImportError:  # up to Python 3.10
    import sre_parse as _parser

# Steps of one expression, once {3,5} is written out; of all in a file, with the kinds of names; and
# how many are followed in all, some seconds' worth.
_MOST_STEPS, _MOST_KINDS, _MOST_WORK = 2_000, 20_000, 5_000_000
_START, _END, _SPLIT, _DONE = "start", "end", "split", "done"


class NamePattern:
    """A key of ``rank_pattern``, matched from a dot or the beginning to the end of a name.

    Raises:
        re.error: it is no regular expression, or one that is not followed here.
    """

    def __init__(self, key: str) -> None:
        try:
            tree = _parser.parse(rf"(?:.*\.)?(?:{key})")
        except (RecursionError, OverflowError) as error:
            raise re.error(f"too deep or too large: {error}") from None
        if tree.state.flags & ~re.UNICODE:
            raise re.error("flags are not supported here")
        # Each step is what it takes, and where it goes on to.
        self.steps: list[tuple[Any, list[int]]] = []
        self.work = 0
        self._begin = self._sequence(tree, self._step(_DONE, []))

    def matches(self, name: str) -> bool:
        """Whether the whole of ``name`` matches; ``work`` is then how many steps it took."""
        self.work = 0
        now = self._reached([self._begin], 0, len(name))
        for place, character in enumerate(name):
            taken = [
                target
                for step in now
                for target in self.steps[step][1]
                if isinstance(self.steps[step][0], re.Pattern)
                and self.steps[step][0].match(character)
            ]
            now = self._reached(taken, place + 1, len(name))
            if not now:
                return False
        return any(self.steps[step][0] == _DONE for step in now)

    def _reached(self, steps: Iterable[int], place: int, length: int) -> set[int]:
        """These steps, and what follows without taking a character."""
        reached, waiting = set(), list(steps)
        while waiting:
            step = waiting.pop()
            if step in reached:
                continue
            reached.add(step)
            self.work += 1
            what, targets = self.steps[step]
            open_ = what == _SPLIT or (what == _START and place == 0)
            if open_ or (what == _END and place == length):
                waiting += targets
        return reached

    def _step(self, what: Any, targets: list[int]) -> int:
        if len(self.steps) >= _MOST_STEPS:
            raise re.error("it is too large")
        self.steps.append((what, targets))
        return len(self.steps) - 1

    def _sequence(self, items: Any, after: int) -> int:
        for kind, argument in reversed(list(items)):
            after = self._item(str(kind), argument, after)
        return after

    def _item(self, kind: str, argument: Any, after: int) -> int:
        """The first step of one item of the parsed expression that goes on to ``after``."""
        if kind == "LITERAL":
            return self._step(re.compile(re.escape(chr(argument))), [after])
        if kind == "NOT_LITERAL":
            return self._step(re.compile(f"[^{re.escape(chr(argument))}]"), [after])
        if kind == "ANY":
            return self._step(re.compile("."), [after])
        if kind == "IN":
            return self._step(re.compile(_set(argument)), [after])
        if kind == "AT" and str(argument) in ("AT_BEGINNING", "AT_BEGINNING_STRING"):
            return self._step(_START, [after])
        if kind == "AT" and str(argument) in ("AT_END", "AT_END_STRING"):
            return self._step(_END, [after])
        if kind == "SUBPATTERN" and not argument[1] and not argument[2]:
            return self._sequence(argument[3], after)
        if kind == "BRANCH":
            return self._step(_SPLIT, [self._sequence(items, after) for items in argument[1]])
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, items = argument
            if str(most) == "MAXREPEAT":
                loop = self._step(_SPLIT, [after])
                self.steps[loop][1].append(self._sequence(items, loop))
                after = loop
            else:
                for _ in range(min(most - least, _MOST_STEPS)):
                    after = self._step(_SPLIT, [after, self._sequence(items, after)])
            for _ in range(min(least, _MOST_STEPS)):
                after = self._sequence(items, self._step(_SPLIT, [after]))
            return after
        raise re.error(f"{kind.lower()} is not supported here")


def _set(items: Iterable[tuple[Any, Any]]) -> str:
    """A parsed set of characters as it is written."""
    written = ""
    for kind, argument in items:
        if str(kind) == "NEGATE":
            written += "^"
        elif str(kind) == "LITERAL":
            written += re.escape(chr(argument))
        elif str(kind) == "RANGE":
            written += "-".join(re.escape(chr(end)) for end in argument)
        else:
            categories = {
                f"CATEGORY_{no}{word}": rf"\{letter.upper() if no else letter}"
                for word, letter in (("DIGIT", "d"), ("SPACE", "s"), ("WORD", "w"))
                for no in ("", "NOT_")
            }
            written += categories[str(argument)]
    return f"[{written}]"


class NamePatterns:
    """Values by `NamePattern`; the first key that matches wins, as in PEFT.

    Raises:
        re.error: a key is no regular expression, or they are too many or too large together.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = list(values.values())
        # Most keys are names, in which a dot is any character or is written \. to be one. They are
        # looked up: by their length, where the former are, and what else there is.
        self._names: dict[int, dict[tuple[int, ...], dict[str, int]]] = {}
        self._patterns: list[tuple[int, NamePattern]] = []
        self._left = _MOST_WORK
        kinds = 0
        for place, key in enumerate(values):
            if not re.fullmatch(r"\^?(?:[\w-]|\\?\.)*", key):
                self._patterns.append((place, NamePattern(key)))
                kinds += len(self._patterns[-1][1].steps)
            else:
                start = "^" if key.startswith("^") else ""
                characters = re.findall(r"\\\.|[^^]", key)
                any_ = tuple(at for at, one in enumerate(characters) if one == ".")
                text = "".join(one[-1] for one in characters)
                by_dots = self._names.setdefault(len(text), {})
                kinds += any_ not in by_dots
                by_dots.setdefault(any_, {}).setdefault(start + _without(text, any_), place)
            if kinds > _MOST_KINDS:
                raise re.error("there are too many expressions")

    def first(self, name: str, otherwise: Any) -> Any:
        """The value of the first key that matches, or ``otherwise``.

        Raises:
            re.error: all that was asked so far has taken too long.
        """
        least = len(self._values)
        starts = [0, *(dot.end() for dot in re.finditer(r"\.", name))]
        for start in starts:
            ending = name[start:]
            for any_, places in self._names.get(len(ending), {}).items():
                bare = _without(ending, any_)
                keys = [bare] if start else [bare, f"^{bare}"]
                least = min([least, *(places[key] for key in keys if key in places)])
        for place, pattern in self._patterns:
            if place >= least:
                break
            found = pattern.matches(name)
            self._left -= pattern.work
            if self._left < 0:
                raise re.error("the expressions take too long")
            if found:
                least = place
        return self._values[least] if least < len(self._values) else otherwise


def _without(text: str, places: Iterable[int]) -> str:
    """``text`` with one and the same character at these places, but where there is a new line."""
    characters = list(text)
    for place in places:
        characters[place] = "\n" if characters[place] == "\n" else "."
    return "".join(characters)
