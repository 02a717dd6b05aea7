"""From contenders measured together to one pytest-benchmark row each.

pytest-benchmark times one test after the other, which would compare minutes with each other. So
the first test of a problem measures all of the problem's selected contenders in turn, and each
test then replays its own samples to the `benchmark` fixture, through a timer that reads them.
"""

from __future__ import annotations

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from . import measure
from .contenders import Unavailable
from .gate import GateError

_now = 0.0


def replayed_seconds() -> float:
    """The timer for `pytest.mark.benchmark`: stands still but for what `Stage` replays."""
    return _now


def _stand() -> None:
    global _now
    _now = 0.0  # anew for each sample, which then comes out to the last digit


def _advance(samples: list[float]) -> None:
    global _now
    _now += samples.pop(0)


@dataclass
class Outcome:
    """What came of one contender on one problem: samples, or why there are none.

    Attributes:
        samples: seconds, one a round.
        peak_bytes: memory at most above what was held before; None if not measured.
        unavailable: why it could not take part.
        wrong: how its values are off, in which case nothing was timed.
        broken: the traceback of an exception that nobody expected; nothing was timed either.
        info: more for the row.
    """

    samples: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    unavailable: str | None = None
    wrong: str | None = None
    broken: str | None = None
    info: dict[str, Any] = field(default_factory=dict)


# Builds the call of one contender and proves it right, or raises Unavailable or GateError.
Make = Callable[[str], measure.Call]


def measure_together(
    names: list[str],
    make: Make,
    device: torch.device,
    seconds: float,
    least_rounds: int = 7,
    warmup_rounds: int = 2,
    graph_repeats: int = 0,
) -> dict[str, Outcome]:
    """Build, check and time contenders of one problem in turn.

    Args:
        names: who.
        make: see `Make`.
        device: where they work.
        seconds: for the rounds of all of them.
        least_rounds, warmup_rounds: see `measure.interleave`.
        graph_repeats: if not 0, time CUDA graphs of so many calls.
    """
    outcomes = {name: Outcome() for name in names}
    calls: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        try:
            call = make(name)
            outcome.peak_bytes = measure.peak_bytes(call, device)
            if graph_repeats:
                call = _graph(call, graph_repeats)
            calls[name] = call
        except (Unavailable, torch.OutOfMemoryError) as refusal:
            outcome.unavailable = str(refusal).splitlines()[0]
        except GateError as error:
            outcome.wrong = str(error)
        except Exception:
            outcome.broken = traceback.format_exc()
    # Collections at random moments would be someone's time.
    gc.collect()
    gc.disable()
    try:
        samples = measure.interleave(calls, device, seconds, least_rounds, warmup_rounds)
    finally:
        gc.enable()
    for name, taken in samples.items():
        call = calls[name]
        per_call = call.per_call(taken) if graph_repeats else taken
        outcomes[name].samples = [measure.rounded(sample) for sample in per_call]
    return outcomes


def _measured(
    measure_problem: Callable[[Any, list[str]], dict[str, Outcome]], problem: Any, names: list[str]
) -> dict[str, Outcome]:
    """An outcome for each name, also where what they all share cannot be made."""
    try:
        return measure_problem(problem, names)
    except torch.OutOfMemoryError as error:
        shared = Outcome(unavailable=str(error).splitlines()[0])
    except Exception:
        shared = Outcome(broken=traceback.format_exc())
    return dict.fromkeys(names, shared)


def _graph(call: measure.Call, repeats: int) -> measure.GraphCall:
    try:
        return measure.GraphCall(call, repeats)
    except RuntimeError as error:
        raise Unavailable(f"cannot be held in a CUDA graph: {error}") from error


def seconds_for(config: pytest.Config, default: float, full: float) -> float:
    """How long to measure a problem: as asked for by ``--seconds``, or by the selection."""
    asked = config.getoption("--seconds")
    return asked if asked is not None else full if config.getoption("--full") else default


# What torch and Triton say when the GPU may answer this process no more.
_GPU_ERRORS = ("CUDA error", "Error [CUDA]")


class Stage:
    """The session's measurements.

    Args:
        stamp: goes into every row.
        deadline: `time.monotonic` after which nothing new is measured, or None.
        journal: file to which each row is added as it is made, in case the session does not end.
    """

    def __init__(
        self,
        stamp: dict[str, Any],
        deadline: float | None = None,
        journal: Path | None = None,
    ) -> None:
        self.stamp, self.deadline, self.journal = stamp, deadline, journal
        # Who broke the GPU, after which nothing can be measured.
        self.broken_by: str | None = None
        self.measured: dict[Any, dict[str, Outcome]] = {}
        # Rows of the report, and what is missing from it: (row without times, reason).
        self.rows: list[dict[str, Any]] = []
        self.missing: list[dict[str, Any]] = []

    def row(
        self,
        request: pytest.FixtureRequest,
        benchmark: Any,
        measure_problem: Callable[[Any, list[str]], dict[str, Outcome]],
        info: dict[str, Any],
    ) -> None:
        """Make the row of this test, which is parametrised by ``problem`` and ``contender``.

        Args:
            measure_problem: from a problem and the names of its selected contenders, called once.
            info: what the row is about.
        """
        problem = request.node.callspec.params["problem"]
        contender = request.node.callspec.params["contender"]
        key = request.node.originalname, problem
        info = {"suite": request.node.originalname.removeprefix("test_"), **info}
        info |= {"contender": contender, **self.stamp}
        if key not in self.measured:
            if self.broken_by is not None:
                self._miss(info, f"the GPU was lost to {self.broken_by}")
                pytest.skip(f"the GPU was lost to {self.broken_by}")
            if self.deadline is not None and time.monotonic() > self.deadline:
                self._miss(info, "out of time")
                pytest.skip("out of time")
            names = [
                item.callspec.params["contender"]
                for item in request.session.items
                if getattr(item, "originalname", None) == request.node.originalname
                and item.callspec.params["problem"] == problem  # type: ignore[attr-defined]
            ]
            self.measured[key] = _measured(measure_problem, problem, names)
            for name, each in self.measured[key].items():
                if any(sign in (each.broken or "") for sign in _GPU_ERRORS):
                    self.broken_by = f"{name}, {problem}"
                    break
        outcome = self.measured[key][contender]
        benchmark.group = f"{info['suite']}: {problem}"
        if outcome.unavailable is not None:
            self._miss(info, outcome.unavailable)
            pytest.skip(f"{contender}: {outcome.unavailable}")
        if outcome.wrong is not None:
            self._miss(info, f"WRONG: {outcome.wrong}")
            pytest.fail(f"not timed, since it is wrong: {outcome.wrong}", pytrace=False)
        if outcome.broken is not None:
            last = outcome.broken.strip().splitlines()[-1]
            self._miss(info, f"BROKEN: {last}")
            pytest.fail(outcome.broken, pytrace=False)
        info |= {"peak_bytes": outcome.peak_bytes, **outcome.info}
        low, high = measure.spread(outcome.samples)[1:]
        benchmark.extra_info.update(info, p20=low, p80=high)
        self.rows.append({**info, "samples": list(outcome.samples)})
        stats = {"data": list(outcome.samples)}
        self.note("benchmarks", {"extra_info": dict(benchmark.extra_info), "stats": stats})
        waiting = list(outcome.samples)
        benchmark.pedantic(_advance, args=(waiting,), setup=_stand, rounds=len(waiting))

    def _miss(self, info: dict[str, Any], reason: str) -> None:
        self.missing.append({**info, "reason": reason})
        self.note("missing", self.missing[-1])

    def note(self, kind: str, value: Any) -> None:
        """Add a line to the journal: a part of pytest-benchmark's JSON, and where it belongs."""
        if self.journal is not None:
            with self.journal.open("a", encoding="utf-8") as file:
                file.write(json.dumps({kind: value}) + "\n")
