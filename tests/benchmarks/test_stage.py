"""What a session of benchmarks keeps when it does not end well."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from _pytest.outcomes import Failed, Skipped

from benchmarks.stage import Outcome, Stage


class Benchmark:
    """pytest-benchmark's fixture, as far as a stage uses it."""

    def __init__(self):
        self.extra_info = {}
        self.times = 0

    def pedantic(self, target, args, setup, rounds):
        self.times = rounds
        for _ in range(rounds):
            setup()
            target(*args)


def session(*tests):
    """Requests of tests ``(problem, contender)`` of one session."""
    items = [
        SimpleNamespace(
            originalname="test_linear",
            callspec=SimpleNamespace(params={"problem": problem, "contender": contender}),
        )
        for problem, contender in tests
    ]
    return [SimpleNamespace(node=item, session=SimpleNamespace(items=items)) for item in items]


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rows_and_absences_are_in_the_journal_as_they_come(tmp_path):
    journal = tmp_path / "rows.jsonl"
    stage = Stage({"commit": "abc"}, journal=journal)
    first, second = session(("p", "ours"), ("p", "theirs"))
    outcomes = {"ours": Outcome([0.1, 0.2]), "theirs": Outcome(unavailable="not installed")}
    benchmark = Benchmark()
    stage.row(first, benchmark, lambda problem, names: outcomes, {"label": "L"})
    assert benchmark.times == 2
    (row,) = lines(journal)
    assert row["benchmarks"]["stats"] == {"data": [0.1, 0.2]}
    info = row["benchmarks"]["extra_info"]
    assert (info["contender"], info["suite"], info["label"]) == ("ours", "linear", "L")
    assert info["commit"] == "abc"
    with pytest.raises(Skipped, match="not installed"):
        stage.row(second, Benchmark(), lambda problem, names: outcomes, {"label": "L"})
    assert lines(journal)[1]["missing"]["reason"] == "not installed"


def test_nothing_is_measured_on_a_gpu_that_was_lost(tmp_path):
    stage = Stage({}, journal=tmp_path / "rows.jsonl")
    first, second = session(("p", "theirs"), ("q", "ours"))
    measured = []

    def measure(problem, names):
        measured.append(problem)
        error = "Traceback ...\nRuntimeError: CUDA error: an illegal memory access"
        return {name: Outcome(broken=error) for name in names}

    with pytest.raises(Failed, match="illegal memory access"):
        stage.row(first, Benchmark(), measure, {})
    with pytest.raises(Skipped, match="the GPU was lost to theirs, p"):
        stage.row(second, Benchmark(), measure, {})
    assert measured == ["p"]
    assert [m["reason"] for m in stage.missing][1] == "the GPU was lost to theirs, p"


def test_an_error_of_another_kind_ends_nothing():
    stage = Stage({})
    first, second = session(("p", "theirs"), ("q", "ours"))
    broken = {"theirs": Outcome(broken="ValueError: no")}
    with pytest.raises(Failed):
        stage.row(first, Benchmark(), lambda *_: broken, {})
    stage.row(second, Benchmark(), lambda *_: {"ours": Outcome([0.1])}, {})
    assert [row["contender"] for row in stage.rows] == ["ours"]
