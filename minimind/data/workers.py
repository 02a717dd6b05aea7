"""A function over many items in several processes, in order, with no more in memory than needed.

Each process has a pipe of its own and one item at a time, so that neither side can wait for a full
pipe of the other's; that whoever is first may have to wait for its neighbour costs a few per cent
where items are much alike. A process whose pipe ends, since the first process was killed, ends too.

Processes are forked: they have the function, and the memory it needs, without a copy. Elsewhere
than on Linux that is not safe, and all is done in this process.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# One process reads for all, and is busy with that for about so many.
MOST = 16


def usable_cores() -> int:
    """The cores that this process may run on, where forked processes can share the work; else 1."""
    if not sys.platform.startswith("linux"):
        return 1
    return min(MOST, len(os.sched_getaffinity(0)))


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], processes: int
) -> Iterator[Result]:
    """``map(function, items)``, some items ahead of what is asked for.

    Args:
        processes: 1 does all in this one.

    Raises:
        Exception: what the function raised, after the results of the items before; or what the
            items did, after those of all that they gave.
        ChildProcessError: a process was killed.
    """
    if processes == 1:
        yield from map(function, items)
        return
    fork = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    started: list[Any] = []
    given = taken = 0
    failure: BaseException | None = None
    iterator = iter(items)
    try:
        while True:
            item, more = None, False
            if failure is None:
                try:
                    item, more = next(iterator), True
                except StopIteration:
                    failure = None
                except Exception as error:  # after what came before it
                    failure = error
            if more and len(pipes) < processes:
                ours, theirs = fork.Pipe()
                pipes.append(ours)
                process = fork.Process(
                    target=_serve, args=(function, theirs, list(pipes)), daemon=True
                )
                with warnings.catch_warnings():
                    # Threads, such as torch's, are not forked; what runs here needs none.
                    warnings.simplefilter("ignore", DeprecationWarning)
                    process.start()
                started.append(process)
                theirs.close()
            elif taken < given and (not more or given - taken == len(pipes)):
                yield _result(pipes[taken % len(pipes)])
                taken += 1
            if more:
                pipes[given % len(pipes)].send(item)
                given += 1
            elif taken == given:
                break
        if failure is not None:
            raise failure
    finally:
        for pipe in pipes:
            pipe.close()
        for process in started:
            if sys.exc_info()[0] is not None:
                process.terminate()
            process.join()


def _result(pipe: Connection) -> Any:
    try:
        fine, value = pipe.recv()
    except (EOFError, ConnectionResetError):
        raise ChildProcessError("a process was killed") from None
    if not fine:
        raise value
    return value


def _serve(function: Callable[[Any], Any], pipe: Connection, others: list[Connection]) -> None:
    """What a process does: answer each item, until there is nobody to ask."""
    for other in others:
        other.close()  # or it would never end while this process lives
    for signum in (signal.SIGINT, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)  # the first process ends the others
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(EOFError, OSError):
        while True:
            item = pipe.recv()
            try:
                answer = True, function(item)
            except Exception as error:
                answer = False, error
            pipe.send(answer)
