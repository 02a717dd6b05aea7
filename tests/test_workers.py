"""Work in processes of their own: what is lost, and what is not."""

from __future__ import annotations

import math
import os

from lora_kernels import workers
from lora_kernels.workers import Lost, progress, spread


def test_an_exception_costs_its_own_item():
    results = dict(spread(math.sqrt, [4.0, -1.0, 9.0, 16.0], 2, preload=[]))
    assert sorted(results) == [0, 1, 2, 3]
    assert [results[i] for i in (0, 2, 3)] == [2.0, 3.0, 4.0]
    assert isinstance(results[1], Lost) and "ValueError" in results[1].reason


def test_a_crash_costs_its_own_item():
    results = dict(spread(os._exit, [3, 5], 1, preload=[]))
    assert {i: result.reason for i, result in results.items()} == {
        0: "its process ended with exit code 3",
        1: "its process ended with exit code 5",
    }


def test_nothing_to_do_starts_nothing():
    assert list(spread(math.sqrt, [], 4, preload=[])) == []


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr(workers, "tqdm", None)
    assert list(progress(iter(range(20)), 20, "counting")) == list(range(20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "counting: 2 of 20" and lines[-1] == "counting: 20 of 20"
    assert len(lines) == 10
