"""Expressions of strangers: matched as `re` does, in bounded time, or refused."""

from __future__ import annotations

import itertools
import re

import pytest

from lora_kernels.adapters import patterns
from lora_kernels.adapters.patterns import NamePattern, NamePatterns

KEYS = [
    "q_proj",
    r"^model\.layers\.0\.q_proj",
    "model.layers.0.q_proj",
    r"layers\.\d+\.q_proj",
    r"layers\.(0|1|12)\..*",
    ".*",
    "",
    "[qk]_proj",
    "[^qk]_proj",
    r"layers\.[0-9]{1,2}\.(?:q|k)_proj",
    r"layers\.\D\.x",
    r"\w+\.q_proj",
    r"(a+)+b",
    "a{2}b{0,2}",
    "a{2,}",
    "(a|aa)*?c",
    "(q)?_proj$",
    "x|q_proj",
    "^x|q_proj",
    r"[\w-]+",
    r"q\-proj",
    "^",
    "$",
]
NAMES = [
    "q_proj",
    "k_proj",
    "model.layers.0.q_proj",
    "model.layers.12.k_proj",
    "other.model.layers.0.q_proj",
    "modelxlayers.0.q_proj",
    "layers.x.x",
    "",
    "x",
    "x.q_proj",
    "q-proj",
    "_proj",
    "\n",
    *("".join(letters) for n in range(1, 6) for letters in itertools.product("abc", repeat=n)),
]


@pytest.mark.parametrize("key", KEYS)
def test_matched_as_re_does(key):
    expression = re.compile(rf"(?:.*\.)?(?:{key})\Z")
    pattern = NamePattern(key)
    wrong = [name for name in NAMES if pattern.matches(name) != bool(expression.match(name))]
    assert not wrong
    alone = NamePatterns({key: 1})
    assert not [n for n in NAMES if (alone.first(n, 0) == 1) != bool(expression.match(n))]


def test_the_first_key_that_matches_wins():
    for keys in itertools.permutations(["q_proj", r"layers\.0\..*", r"^layers\.0\.q_proj", "x"]):
        chosen = NamePatterns({key: key for key in keys})
        for name in ("layers.0.q_proj", "a.layers.0.q_proj", "layers.0.k", "q_proj", "y"):
            matching = [k for k in keys if re.match(rf"(.*\.)?({k})$", name)]
            assert chosen.first(name, None) == next(iter(matching), None)


@pytest.mark.parametrize("key", ["(a+)+b", "(a|a)*b", "(a|aa)+b", "(.*a){20}b", "(a*)*(a*)*(a*)*b"])
def test_what_backtracks_for_ages_is_soon_done(key):
    assert not NamePattern(key).matches("a" * 2000)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("(", "missing"),
        (r"(a)\1", "groupref is not supported"),
        ("(?=a)", "assert is not supported"),
        ("(?i)a", "flags"),
        ("(?i:a)", "not supported"),
        (r"\bq", "at is not supported"),
        ("(a{1000}){1000}", "too large"),
        ("a" * 5000, "too large"),
        ("(" * 5000 + ")" * 5000, "too deep"),
    ],
)
def test_what_is_not_followed_is_refused(key, why):
    with pytest.raises(re.error, match=why):
        NamePattern(key)


def test_too_many_are_refused():
    with pytest.raises(re.error, match="too many"):
        NamePatterns({f"{n}.*" + "a" * 1000: 1 for n in range(30)})
    names = NamePatterns({f"layers.{n}.q": n for n in range(20_000)})  # names cost little
    assert names.first("model.layers.19999.q", None) == 19999


def test_what_takes_too_long_in_all_is_refused(monkeypatch):
    monkeypatch.setattr(patterns, "_MOST_WORK", 20_000)
    slow = NamePatterns({"(a*)*(a*)*b": 1})
    assert slow.first("aaa", 0) == 0
    with pytest.raises(re.error, match="take too long"):
        for _ in range(20):
            slow.first("a" * 500, 0)
