"""Honest timing: contenders in turn, cold buffers, medians with spread, peak memory.

The contenders of one problem run one after the other, in an order drawn anew each round, so that a
change of clock speed or a noisy neighbour meets all alike and ratios are taken within a round.
Every call gets the next of a set of buffers that together exceed the cache.
"""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from .machine import synchronize

# Counted calls of a burst on a GPU, and the seconds from which on a call needs no burst.
BURST, LONG = 2, 0.02
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


def ratio(samples: Sequence[float], against: Sequence[float]) -> Spread:
    """`paired_ratio`, or that of the medians where they were not measured in the same rounds."""
    if len(samples) == len(against):
        return paired_ratio(samples, against)
    return Spread(*[spread(samples).median / spread(against).median] * 3)


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
        calls: by name. On a GPU they are timed with CUDA events in bursts of one contender, the
            first call of which is not counted: where the host launches more slowly than the GPU
            works, that is charged, and elsewhere not, as in training; see `GraphCall` for the
            other way.
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
            sample = clock.sample(calls[name])
            if round_number >= 0:
                samples[name].append(sample)
    synchronize(device)
    return {name: [clock.seconds(s) for s in taken] for name, taken in samples.items()}


class _HostClock:
    def sample(self, call: Call) -> Any:
        call.prepare()
        with call.context():
            start = time.perf_counter()
            result = call.run()
            end = time.perf_counter()
        del result  # what it frees belongs to no one's time
        return end - start

    def seconds(self, sample: Any) -> float:
        return sample


class _EventClock:
    """Bursts of `BURST` calls behind one that is not counted, from an empty queue.

    The first fills the queue, if this contender keeps it full, and so no one's launches hide
    behind another's work. A call of over `LONG` seconds stands alone: its start is no part of it.
    """

    def __init__(self) -> None:
        self.long: set[int] = set()

    def sample(self, call: Call) -> Any:
        torch.cuda.synchronize()
        pairs = []
        start = time.perf_counter()
        for number in range(1 if id(call) in self.long else 1 + BURST):
            pairs.append(self._once(call))
            if number == 0 and time.perf_counter() - start > LONG:
                break
        if len(pairs) == 1:
            return pairs
        torch.cuda.synchronize()
        if time.perf_counter() - start > LONG * (1 + BURST):
            self.long.add(id(call))
        return pairs[1:]

    def _once(self, call: Call) -> Any:
        call.prepare()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with call.context():
            begin.record()
            call.run()
            end.record()
        return begin, end

    def seconds(self, sample: Any) -> float:
        return sum(begin.elapsed_time(end) for begin, end in sample) / len(sample) / 1e3


class GraphCall:
    """A call recorded as a CUDA graph, once over each set of buffers: no launch is waited for.

    Args:
        call: what to record.
        repeats: how often it is recorded into the graph, in whole turns of its buffers; its time
            is divided by as much by `per_call`.

    Raises:
        RuntimeError: the call does what a graph cannot hold, or a replay does not do its work.
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
            for number in range(repeats):
                result = _once(call)
                if number < repeats - 1:
                    del result
        # y's graph must not outlive the recording, or its nodes would meet other streams.
        replayed = _detached(result)
        del result
        self._compare(call, replayed)

    def _compare(self, call: Call, replayed: list[torch.Tensor]) -> None:
        """Work that missed the recording would be fast: a replay must give what calls give.

        The last of as many calls as were recorded, from the same state of torch's generator.
        """
        for tensor in replayed:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
        torch.cuda.manual_seed(0)
        self.graph.replay()
        torch.cuda.synchronize()
        torch.cuda.manual_seed(0)
        for number in range(self.repeats):
            result = _once(call)
            if number < self.repeats - 1:
                del result
        for got, wanted in zip(replayed, _detached(result), strict=True):
            if not _alike(got, wanted):
                raise RuntimeError("a replay does not give what a call gives")

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


def _once(call: Call) -> Any:
    call.prepare()
    with call.context():
        return call.run()


def _alike(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    if not wanted.is_floating_point():
        return torch.equal(got, wanted)
    # A NaN is not alike.
    return (got - wanted).abs().max().item() <= 2.0**-6 * wanted.abs().max().item()


def _detached(result: Any) -> list[torch.Tensor]:
    """The tensors of a call's result, out of any graph."""
    if isinstance(result, torch.Tensor):
        return [result.detach()]
    if isinstance(result, Mapping):
        result = tuple(result.values())
    return [tensor for part in result or () for tensor in _detached(part)]


def rounded(seconds: float) -> float:
    """To the nanosecond, which is finer than any clock here."""
    return round(seconds, 9)
