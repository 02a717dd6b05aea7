"""Work shared among processes: the order of one, its errors, and nobody left behind."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time

import pytest

from minimind.data.workers import in_order, usable_cores

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere all is done in one process"
)


def described(number):
    time.sleep(0.01 * (number % 3))
    return number, os.getpid()


@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 3, 20])
def test_results_come_in_order(processes, count):
    results = list(in_order(described, range(count), processes))
    assert [number for number, _ in results] == list(range(count))
    served = {process for _, process in results}
    if processes == 1:
        assert served <= {os.getpid()}
    else:
        assert len(served) == min(processes, count) and os.getpid() not in served


def test_large_items_and_results_pass():
    blocks = [bytes([i]) * 300_000 for i in range(7)]
    assert list(in_order(lambda block: block + b"!", blocks, 2)) == [b + b"!" for b in blocks]


def test_items_are_not_taken_long_before_they_are_used():
    taken = []
    items = (taken.append(i) or i for i in range(100))
    for done, _ in enumerate(in_order(described, items, 2)):
        assert len(taken) <= done + 4


def fails(number):
    if number in (3, 5):
        raise ValueError(f"number {number}")
    return number


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_the_first_error_comes_after_the_results_before_it(processes):
    seen = []
    with pytest.raises(ValueError, match="number 3"):
        for result in in_order(fails, range(9), processes):
            seen.append(result)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_an_error_of_the_items_comes_after_all_results(processes):
    def items():
        yield from range(3)
        raise KeyError("items")

    seen = []
    with pytest.raises(KeyError, match="items"):
        for result in in_order(fails, items(), processes):
            seen.append(result)
    assert seen == [0, 1, 2]


def children():
    path = f"/proc/{os.getpid()}/task/{os.getpid()}/children"
    with open(path) as file:
        return set(file.read().split())


def test_who_stops_listening_leaves_nobody_behind():
    before = children()
    results = in_order(described, range(100), 3)
    next(results)
    assert len(children() - before) == 3
    results.close()
    assert children() <= before


def killing(number):
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_killed_process_is_said():
    with pytest.raises(ChildProcessError, match="a process was killed"):
        list(in_order(killing, range(9), 2))


def test_ctrl_c_is_the_first_process_to_tell():
    answers = in_order(functools.partial(_interrupted), range(4), 2)
    assert list(answers) == [0, 1, 2, 3]


def _interrupted(number):
    os.kill(os.getpid(), signal.SIGINT)
    return number


SCRIPT = """
import os, sys, time
from minimind.data.workers import in_order
def work(number):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(0.01)
for _ in in_order(work, iter(int, 1), 2):
    pass
"""


def test_processes_of_a_killed_one_end():
    with subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=subprocess.PIPE, text=True) as run:
        served = {int(run.stdout.readline()) for _ in range(6)}
        run.kill()
        run.stdout.read()  # ends once nobody has it open
    assert len(served) == 2
    for process in served:
        assert _gone(process)


def _gone(process):
    for _ in range(1200):
        try:
            with open(f"/proc/{process}/stat") as file:
                if file.read().rpartition(")")[2].split()[0] == "Z":
                    return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


def test_usable_cores_are_those_that_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(3)))
    assert usable_cores() == 3
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(300)))
    assert usable_cores() == 16
    monkeypatch.setattr(sys, "platform", "darwin")
    assert usable_cores() == 1
