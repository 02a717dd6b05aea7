"""The first minute on a GPU: what everything reaches there, and where the table chose wrongly.

``python -m benchmarks.first --out first.jsonl`` measures in parts, the most telling first, each
within its share of the time: the two ceilings; for Llama-3-8B's and MiniMind's linears in bfloat16,
forward and forward+backward by each strategy beside the frozen linear, in CUDA graphs and eagerly;
each product and each pass over memory by itself; what a call costs the host. Nothing is timed that
did not pass the gate. Rows are written as they come, a line of JSON each; what fails is a row that
says so, and the rest goes on. Last come the verdicts, as rows and in words.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import functools
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lora_kernels.kernels import STRATEGIES as BY_ROLE
from lora_kernels.kernels import Shape
from lora_kernels.proof import LayerCase, Lost, launches_of, processors, spread

from . import host, machine, measure
from .contenders import (
    FLOOR,
    OURS,
    STRATEGIES,
    Step,
    Work,
    build,
    make_inputs,
    sets_to_rotate,
    table_choice,
)
from .gate import Gate
from .pieces import PieceCall, operands, pieces
from .shapes import DROPOUTS, DTYPES, LINEARS, Problem
from .stage import Outcome, measure_together
from .tune import at_most, process_seconds, warm_up
from .verdicts import Row, summary, verdicts

TOKENS = {"llama-3-8b": 8192, "minimind": 4096}
LAYERS = (FLOOR, OURS, *(f"ours: {name}" for name in STRATEGIES))
WAYS = ("both", "forward")
# Of measuring one group in turn; large ones take longer, by the least number of rounds.
SECONDS, LEAST_ROUNDS = 0.2, 5
# Calls in a CUDA graph, about, and seconds that one replay should not exceed by much.
REPEATS, REPLAY_SECONDS = 20, 4e-3
HOST_ROUNDS = 10
# Kept back from the time limit for the verdicts and for the process to end in.
ENDING_SECONDS = 3.0
# What torch and Triton say when the GPU may answer this process no more.
GPU_ERRORS = ("CUDA error", "Error [CUDA]")


@dataclass
class Bench:
    """Where to measure and for how long.

    Attributes:
        device, capability, sms: of the GPU; what the table is asked for.
        timings: of ``graph`` and ``call``.
        seconds: of one group's rounds, at least.
        ceilings: as of `machine.ceilings`, once measured.
    """

    device: torch.device
    capability: tuple[int, int]
    sms: int
    timings: tuple[str, ...] = ("graph", "call")
    seconds: float = SECONDS
    ceilings: dict[str, Any] = field(default_factory=dict)

    def repeats(self, problem: Problem, timing: str, sets: int, way: str) -> int:
        """Calls in a graph, in whole turns of the buffers; 0 for none."""
        if timing != "graph":
            return 0
        flops = 2 * problem.m * problem.k * problem.n * (2 if way == "both" else 1)
        once = flops / self.ceilings.get("flops", {}).get(problem.dtype, 6e14)
        return sets * max(1, min(round(REPEATS / sets), int(REPLAY_SECONDS / once / sets)))


class Part(NamedTuple):
    """Rows that belong together, and their weight when the time is shared out."""

    name: str
    weight: float
    rows: Callable[[], Iterator[Row]]


class GpuLost(Exception):
    """The GPU may answer this process no more."""


def problems() -> list[Problem]:
    """Llama's linears and MiniMind's, without dropout and then with it."""
    return [
        Problem(linear.model, TOKENS[linear.model], linear.k, linear.n, dropout=p)
        for model in TOKENS
        for p in DROPOUTS
        for linear in LINEARS
        if linear.model == model
    ]


def parts(bench: Bench, wanted: Sequence[Problem], jobs: int) -> list[Part]:
    """All parts, in order; ``jobs`` processes compile ahead, none if that is 0."""
    listed = []
    if jobs:
        listed.append(Part("compile", 25.0, lambda: compiled(bench, wanted, jobs)))
    listed.append(Part("ceilings", 5.0, lambda: ceilings(bench)))
    for problem in wanted:
        about = describe(problem)
        listed.append(Part(f"layers, {about}", 3.0, functools.partial(layers, bench, problem)))
        listed.append(Part(f"pieces, {about}", 1.0, functools.partial(parts_of, bench, problem)))
    # Before what is told of MiniMind with dropout, which is the least of it.
    listed.insert(len(listed) - 8 if len(wanted) > 4 else len(listed), Part("host", 5.0, on_host))
    return listed


def run(
    listed: Sequence[Part],
    write: Callable[[Row], None],
    deadline: float,
    clock: Callable[[], float] = time.monotonic,
) -> list[Row]:
    """Make every part's rows within its share of the time until ``deadline`` of the clock.

    A part that fails or is cut short keeps the rows it has and adds one that says so.

    Args:
        listed: the parts.
        write: is given each row at once.
        deadline: when the last part ends.
        clock: of seconds.

    Returns:
        All rows.
    """
    rows: list[Row] = []

    def keep(row: Row) -> None:
        rows.append(row)
        write(row)

    lost: str | None = None
    for number, part in enumerate(listed):
        begin = clock()
        share = part.weight / sum(one.weight for one in listed[number:])
        limit = (deadline - begin) * share
        error: str | None = f"out of time after {limit:.1f} s"
        if lost is not None or limit <= 0:
            error = "not run: " + ("out of time" if lost is None else f"the GPU was lost to {lost}")
        else:
            with at_most(limit, part.name):
                try:
                    for row in part.rows():
                        keep({"part": part.name, **row})
                    error = None
                except GpuLost as loss:
                    lost = error = f"{part.name}: {loss}"
                except Exception as failure:
                    error = _told(failure)
                    lost = part.name if any(sign in error for sign in GPU_ERRORS) else None
        row = {"kind": "part", "part": part.name, "took": round(clock() - begin, 2)}
        keep(row if error is None else {**row, "error": error})
    for row in verdicts(rows):
        keep(row)
    return rows


def compiled(bench: Bench, wanted: Sequence[Problem], jobs: int) -> Iterator[Row]:
    """Compile what the layers launch into Triton's cache, in processes that touch no GPU."""
    cases = []
    dx_of = {name: name if name in BY_ROLE["dx"] else "fused" for name in BY_ROLE["forward"]}
    for problem in wanted:
        shape = Shape(problem.m, problem.n, problem.k, problem.rank)
        for forward, dx in dx_of.items():
            case = LayerCase(
                forward,
                dx,
                bench.capability,
                DTYPES[problem.dtype],
                shape,
                dropout_p=problem.dropout,
                wide=True,  # factors as a layer has them
                scale=0.5,  # as exact as that of the layers
            )
            if not case.refusal and forward != "aten":
                cases.append(case)
    tasks = [(case, bench.capability, bench.sms) for case in cases]
    running = spread(compile_layer, tasks, jobs, preload=["benchmarks.first"])
    with contextlib.closing(running):
        for index, result in running:
            if isinstance(result, Lost):
                case = cases[index]
                reason = result.reason.strip().splitlines()[0]
                name = f"{case.name} at {tuple(case.shape)}"
                yield {"kind": "compile", "name": name, "error": f"not compiled: {reason}"}


def compile_layer(task: tuple[LayerCase, tuple[int, int], int]) -> None:
    """Compile what a layer launches, as the launch itself would, without a GPU."""
    case, capability, sms = task
    # A layer's call is recorded as one kernel's is.
    recorded: Any = case
    warm_up(launches_of(recorded, case.operands(torch.device("meta")), sms), capability)


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the GPU's memory and arithmetic reach at all."""
    bench.ceilings = machine.ceilings(bench.device)
    flops = {f"{dtype} tflops": rate / 1e12 for dtype, rate in bench.ceilings["flops"].items()}
    yield {"kind": "ceilings", "tbps": bench.ceilings["bandwidth"] / 1e12, **flops}


def layers(bench: Bench, problem: Problem) -> Iterator[Row]:
    """The layer by each strategy beside the frozen linear, both ways and forward alone."""
    table = table_choice(problem, bench.capability, bench.sms)
    gate = Gate(problem, bench.device)
    steps: dict[str, Step | Exception] = {}
    sets = sets_to_rotate(problem, bench.device)
    ring = [make_inputs(problem, bench.device, seed) for seed in range(sets)]
    shared = [0]

    def proven(name: str, way: str) -> Work:
        if name not in steps:
            try:
                step = build(name, problem, bench.device)
                gate.check(step)
                steps[name] = step
            except Exception as refusal:
                steps[name] = refusal
        found = steps[name]
        if isinstance(found, Exception):
            raise found
        return Work(found, way, ring, shared)

    for timing in bench.timings:
        for way in WAYS:
            outcomes = measure_together(
                list(LAYERS),
                functools.partial(proven, way=way),
                bench.device,
                bench.seconds,
                LEAST_ROUNDS,
                warmup_rounds=1,
                graph_repeats=bench.repeats(problem, timing, sets, way),
            )
            base = outcomes[FLOOR].samples
            for name, outcome in outcomes.items():
                row = _row("layer", problem, name, outcome)
                row |= {"direction": way, "timing": timing}
                row |= {"table": table} if name == OURS else {}
                if outcome.samples and base:
                    row["ratio"] = round(measure.ratio(outcome.samples, base).median, 4)
                yield row
            _unless_lost(outcomes)


def parts_of(bench: Bench, problem: Problem) -> Iterator[Row]:
    """Each product in TFLOP/s of the base product, each pass over memory in TB/s."""
    listed = {piece.name: piece for piece in pieces(problem, bench.capability)}
    sets = sets_to_rotate(problem, bench.device)
    ring = [
        operands(make_inputs(problem, bench.device, seed), problem.dropout) for seed in range(sets)
    ]
    timing = bench.timings[0]
    outcomes = measure_together(
        list(listed),
        lambda name: PieceCall(listed[name].prepared(), ring),
        bench.device,
        bench.seconds,
        LEAST_ROUNDS,
        warmup_rounds=1,
        graph_repeats=bench.repeats(problem, timing, sets, "forward"),
    )
    for name, outcome in outcomes.items():
        piece = listed[name]
        row = _row("piece", problem, name, outcome)
        row |= {"timing": timing, "block": piece.block, "role": piece.role}
        if outcome.samples:
            unit, work = ("tbps", piece.bytes) if piece.bytes else ("tflops", piece.flops)
            row[unit] = round(work / row["seconds"] / 1e12, 3)
            if bench.ceilings:
                bandwidth, flops = bench.ceilings["bandwidth"], bench.ceilings["flops"]
                most = bandwidth if piece.bytes else flops[problem.dtype]
                row["share"] = round(work / row["seconds"] / most, 3)
        yield row
    _unless_lost(outcomes)


def on_host() -> Iterator[Row]:
    """µs of the host a call, forward and backward."""
    for name, cost in host.measurements(HOST_ROUNDS):
        row: Row = {"kind": "host", "name": name}
        try:
            yield {**row, "microseconds": round(cost(), 1)}
        except Exception as failure:
            yield {**row, "error": _told(failure)}


def describe(problem: Problem) -> str:
    """Such as ``llama-3-8b 4096→1024, M 8192, p 0.1``."""
    p = problem.dropout
    return f"{problem.model} {problem.k}→{problem.n}, M {problem.m}, p {p:g}"


def _row(kind: str, problem: Problem, name: str, outcome: Outcome) -> Row:
    """What is known of one contender, and its times or why there are none."""
    row: Row = {"kind": kind, "problem": describe(problem), "name": name}
    row |= {"m": problem.m, "k": problem.k, "n": problem.n, "r": problem.rank}
    if outcome.unavailable is not None:
        return {**row, "left_out": outcome.unavailable}
    if outcome.wrong is not None:
        return {**row, "error": f"WRONG: {outcome.wrong}"}
    if outcome.broken is not None:
        return {**row, "error": outcome.broken.strip().splitlines()[-1]}
    median, low, high = map(measure.rounded, measure.spread(outcome.samples))
    return {**row, "seconds": median, "p20": low, "p80": high, "rounds": len(outcome.samples)}


def _unless_lost(outcomes: dict[str, Outcome]) -> None:
    for name, outcome in outcomes.items():
        if any(sign in (outcome.broken or "") for sign in GPU_ERRORS):
            raise GpuLost(name)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"


def writer(file: Any) -> Callable[[Row], None]:
    """Adds rows to a file, each at once a line that outlasts this process."""

    def write(row: Row) -> None:
        # JSON knows no infinite numbers.
        finite = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in row.items()
        }
        file.write(json.dumps(finite, ensure_ascii=False, allow_nan=False) + "\n")
        file.flush()

    return write


def main(arguments: list[str] | None = None) -> int:
    """Measure and print verdicts; 1 where something failed, or there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="written anew")
    parser.add_argument(
        "--time-limit", type=float, default=60.0, metavar="SECONDS", help="default 60"
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=processors(),
        help="processes that compile ahead; 0 where a pack was adopted",
    )
    parser.add_argument("--commit", help="to stamp rows with, where git cannot tell")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here to measure")
        return 1
    left = options.time_limit - process_seconds()
    deadline = time.monotonic() + left - ENDING_SECONDS
    # Even if the GPU never answers again.
    faulthandler.dump_traceback_later(max(left, 1.0), exit=True)
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    bench = Bench(device, capability, sms)
    with options.out.open("w", encoding="utf-8") as file:
        write = writer(file)
        write({"kind": "stamp", **machine.stamp(device, options.commit)})
        rows = run(parts(bench, problems(), max(0, options.jobs)), write, deadline)
    print("\n".join(summary(rows)), flush=True)
    return 1 if any("error" in row for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
