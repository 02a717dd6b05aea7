"""Honest timing: contenders in turn, cold buffers, medians with spread, peak memory.

The contenders of one problem run one after the other, in an order drawn anew each round, so that a
change of clock speed or a noisy neighbour meets all alike and ratios are taken within a round.
Every call gets the next of a set of buffers that together exceed the cache.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .machine import synchronize

# More rounds than this narrow the spread of a median no further.
MOST_ROUNDS = 200


class Call(Protocol):
    """One way to do one piece of work."""

    def prepare(self) -> None:
        """What belongs before the work and not into its time."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """To be entered around the work, outside of its time."""
        return contextlib.nullcontext()

    def run(self) -> Any:
        """The work."""


class Spread(NamedTuple):
    """Median, 20th and 80th percentile."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Median, 20th and 80th percentile of at least one sample, interpolated."""
    ordered = sorted(samples)

    def at(share: float) -> float:
        position = share * (len(ordered) - 1)
        index = int(position)
        above = ordered[min(index + 1, len(ordered) - 1)]
        return ordered[index] + (position - index) * (above - ordered[index])

    return Spread(at(0.5), at(0.2), at(0.8))


def paired_ratio(samples: Sequence[float], against: Sequence[float]) -> Spread:
    """Spread of the ratios taken round by round.

    Raises:
        ValueError: the two were not measured in the same rounds.
    """
    if len(samples) != len(against):
        raise ValueError(f"{len(samples)} samples cannot be paired with {len(against)}")
    return spread([a / b for a, b in zip(samples, against, strict=True)])


def interleave(
    calls: Mapping[str, Call],
    device: torch.device,
    seconds: float,
    least_rounds: int = 7,
    warmup_rounds: int = 2,
    seed: int = 0,
) -> dict[str, list[float]]:
    """Time every call once a round, in a random order, for about ``seconds`` in all.

    Args:
        calls: by name. On a GPU they are timed with CUDA events and nothing is waited for, as in
            training: where the host launches more slowly than the GPU works, that is charged, and
            elsewhere not; see `GraphCall` for the other way.
        device: where they work.
        seconds: wall clock to spend on the rounds, `MOST_ROUNDS` at most.
        least_rounds: done however long they take.
        warmup_rounds: before anything is counted.
        seed: of the order.

    Returns:
        Seconds of each call, in the order of the rounds.
    """
    order = random.Random(seed)
    names = list(calls)
    samples: dict[str, list[Any]] = {name: [] for name in names}
    deadline = 0.0
    clock = _EventClock() if device.type == "cuda" else _HostClock()
    for round_number in range(-warmup_rounds, MOST_ROUNDS):
        if round_number == 0:
            synchronize(device)
            deadline = time.perf_counter() + seconds
        if round_number >= least_rounds and time.perf_counter() > deadline:
            break
        order.shuffle(names)
        for name in names:
            call = calls[name]
            call.prepare()
            with call.context():
                sample = clock.time(call.run)
            if round_number >= 0:
                samples[name].append(sample)
    synchronize(device)
    return {name: [clock.seconds(s) for s in taken] for name, taken in samples.items()}


class _HostClock:
    def time(self, run: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = run()
        end = time.perf_counter()
        del result  # what it frees belongs to no one's time
        return end - start

    def seconds(self, sample: Any) -> float:
        return sample


class _EventClock:
    def time(self, run: Callable[[], Any]) -> Any:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        return start, end

    def seconds(self, sample: Any) -> float:
        start, end = sample
        return start.elapsed_time(end) / 1e3


class GraphCall:
    """A call recorded as a CUDA graph, once over each set of buffers: no launch is waited for.

    Args:
        call: what to record.
        repeats: how often it is recorded into the graph; its time is divided by as much by
            `per_call`.

    Raises:
        RuntimeError: the call does what a graph cannot hold.
    """

    def __init__(self, call: Call, repeats: int) -> None:
        self.repeats = repeats
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                _once(call)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            for _ in range(repeats):
                _once(call)

    def prepare(self) -> None:
        """Nothing: the buffers are part of the recording."""

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """Nothing either."""
        return contextlib.nullcontext()

    def run(self) -> None:
        """Replay."""
        self.graph.replay()

    def per_call(self, samples: Sequence[float]) -> list[float]:
        """Seconds of one call, of seconds of replays."""
        return [sample / self.repeats for sample in samples]


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory that a call holds above what was held before it, its result included."""
    call.prepare()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        with call.context():
            result = call.run()
        synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - held
    cpu = torch.profiler.ProfilerActivity.CPU
    # With acc_events torch 2.11 has nothing to warn of.
    options: dict[str, Any] = {"activities": [cpu], "profile_memory": True, "acc_events": True}
    with (
        call.context(),
        torch.profiler.profile(**options) as profile,
    ):
        result = call.run()
    del result
    held = most = 0
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [event for event in events if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def _once(call: Call) -> None:
    call.prepare()
    with call.context():
        call.run()


def rounded(seconds: float) -> float:
    """To the nanosecond, which is finer than any clock here."""
    return round(seconds, 9)
