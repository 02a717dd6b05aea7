"""Run a function over many items in processes of their own, so that what kills one loses one item.

A faulty kernel can end its process, or leave it with a GPU that answers nothing any more; a
compiler can crash. The processes are forked from a clean server, which has imported the modules
once and touched no GPU.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import connection
from typing import Any, NamedTuple

try:
    from tqdm import tqdm
except ImportError:  # it comes with the extra [train]
    tqdm = None


# After a deadline, for what has started, before it is killed.
GRACE_SECONDS = 20.0
# For a killed process to go; one that is stuck in a driver may never do so.
DYING_SECONDS = 5.0


class Lost(NamedTuple):
    """Stands for the result of an item whose process raised or died."""

    reason: str


def processors() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def spread(
    function: Callable[[Any], Any],
    items: Sequence[Any],
    workers: int,
    preload: list[str],
    deadline: float | None = None,
) -> Iterator[tuple[int, Any]]:
    """``(index, function(items[index]))`` for every item, in the order in which they end.

    An exception costs the process in which it was raised, and gives `Lost`; so does a crash.

    Args:
        function: at the top level of a module; it, the items and the results can be pickled.
        items: what to run over.
        workers: how many processes.
        preload: modules to import before processes are made.
        deadline: of `time.monotonic`. No item starts from then on, and those that never did are
            not among the results; what still runs `GRACE_SECONDS` later is killed, and `Lost`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    idle: list[_Worker] = []
    waiting = iter(enumerate(items))
    busy: dict[Any, tuple[_Worker, int]] = {}

    def left(grace: float = 0.0) -> float | None:
        return None if deadline is None else max(0.0, deadline + grace - time.monotonic())

    try:
        while True:
            while len(busy) < workers and left() != 0 and (job := next(waiting, None)) is not None:
                worker = idle.pop() if idle else _Worker(context, function)
                worker.pipe.send(job[1])
                busy[worker.pipe] = worker, job[0]
            if not busy:
                return
            ended = connection.wait(list(busy), left(GRACE_SECONDS))
            if not ended:
                _stop([worker for worker, _ in busy.values()])
                yield from ((index, Lost("did not end")) for _, index in busy.values())
                return
            for pipe in ended:
                worker, index = busy.pop(pipe)
                result = worker.result()
                if isinstance(result, Lost):
                    _stop([worker])
                else:
                    idle.append(worker)
                yield index, result
    finally:
        _stop([*idle, *(worker for worker, _ in busy.values())])


class _Worker:
    def __init__(self, context: Any, function: Callable[[Any], Any]):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(function, theirs), daemon=True)
        self.process.start()
        theirs.close()

    def result(self) -> Any:
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionError):
            self.process.join(DYING_SECONDS)
            return Lost(f"its process ended with exit code {self.process.exitcode}")


def _stop(workers: Sequence[_Worker]) -> None:
    for worker in workers:  # all of them before the first wait: a GPU is slow to let go
        worker.pipe.close()
        worker.process.kill()
    end = time.monotonic() + DYING_SECONDS
    for worker in workers:
        worker.process.join(max(0.0, end - time.monotonic()))


def _serve(function: Callable[[Any], Any], pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent hears Ctrl-C and stops us
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        try:
            result = function(item)
        except Exception as error:
            pipe.send(Lost(f"{type(error).__name__}: {error}"))
            return
        pipe.send(result)


def progress(results: Iterable[Any], total: int, label: str) -> Iterator[Any]:
    """The same, with a bar on stderr, or a line now and then where tqdm is not installed."""
    if tqdm is not None:
        interval = 0.2 if sys.stderr.isatty() else 10  # a log file wants few lines
        yield from tqdm(results, total=total, desc=label, mininterval=interval, dynamic_ncols=True)
        return
    for done, result in enumerate(results, 1):
        yield result
        if done % max(1, total // 10) == 0:
            print(f"{label}: {done} of {total}", file=sys.stderr, flush=True)
