"""Work in processes of their own: what is lost, and what is not."""

from __future__ import annotations

import math
import multiprocessing
import os
import time
from types import SimpleNamespace

import pytest

from lora_kernels.proof import workers
from lora_kernels.proof.workers import Lost, progress, spread

PRELOAD = [workers.__name__]


def test_an_exception_costs_its_own_item():
    results = dict(spread(math.sqrt, [4.0, -1.0, 9.0, 16.0], 2, PRELOAD))
    assert sorted(results) == [0, 1, 2, 3]
    assert [results[i] for i in (0, 2, 3)] == [2.0, 3.0, 4.0]
    assert isinstance(results[1], Lost) and "ValueError" in results[1].reason


def test_a_crash_costs_its_own_item():
    results = dict(spread(os._exit, [3, 5], 1, PRELOAD))
    assert {i: result.reason for i, result in results.items()} == {
        0: "its process ended with exit code 3",
        1: "its process ended with exit code 5",
    }


def test_nothing_to_do_starts_nothing():
    assert list(spread(math.sqrt, [], 4, PRELOAD)) == []


@pytest.fixture
def clock(monkeypatch):
    """What `time.monotonic` says to the workers' file, in a list of one."""
    now = [1000.0]
    monkeypatch.setattr(workers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def test_nothing_starts_after_the_deadline(clock):
    running = spread(math.sqrt, [4.0, 9.0, 16.0], 1, PRELOAD, deadline=1010.0)
    assert next(running) == (0, 2.0)
    clock[0] = 1010.0
    assert list(running) == []
    assert list(spread(math.sqrt, [4.0], 1, PRELOAD, deadline=1010.0)) == []


def test_what_runs_at_the_deadline_may_end(clock):
    running = spread(time.sleep, [0.0, 1.0, 0.0], 2, PRELOAD, deadline=1010.0)
    first, _ = next(running)
    clock[0] = 1010.0 + workers.GRACE_SECONDS / 2
    assert first == 0 and dict(running).get(1, "not there") is None


STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(20)"


def test_what_never_ends_is_killed_and_lost(clock):
    running = spread(exec, [STUBBORN, "pass", STUBBORN, "pass"], 3, PRELOAD, deadline=1010.0)
    assert next(running) == (1, None)
    clock[0] = 1010.0 + workers.GRACE_SECONDS - 0.5
    assert dict(running) == {0: Lost("did not end"), 2: Lost("did not end")}
    assert multiprocessing.active_children() == []


def test_processes_end_with_who_asked_for_them():
    with pytest.raises(KeyboardInterrupt):
        for _ in progress(spread(exec, ["pass", STUBBORN, STUBBORN], 2, PRELOAD), 3, "running"):
            raise KeyboardInterrupt
    assert multiprocessing.active_children() == []


def test_progress_without_tqdm(monkeypatch, capsys):
    monkeypatch.setattr(workers, "tqdm", None)
    assert list(progress(iter(range(20)), 20, "counting")) == list(range(20))
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "counting: 2 of 20" and lines[-1] == "counting: 20 of 20"
    assert len(lines) == 10
