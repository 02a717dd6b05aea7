"""Find block sizes for `lora_kernels.kernels.tuning` on the GPU at hand.

``python -m benchmarks.tune --minutes 5 --kernel gemm --kernel xa`` times every candidate that
compiles and computes the right thing, in turn with the table's present choice, and prints rows to
paste. A human pastes them, with the date and the gain.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import functools
import json
import math
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from lora_kernels.kernels import KERNELS, Config, Shape, candidates, lookup
from lora_kernels.proof import (
    Case,
    Launch,
    Lost,
    Tensors,
    launches_of,
    processors,
    source_of,
    spread,
)

from . import machine, measure
from .gate import GateError, compare

SHAPES = tuple(
    Shape(m, n, k, 16)
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    for m in (8192, 1024)
) + (Shape(8192, 4096, 4096, 64), Shape(4096, 512, 512, 16))
LAST = 3  # how many candidates the final, longer comparison takes
# Launches in one CUDA graph, about, and seconds that one replay should not exceed by much.
REPEATS, REPLAY_SECONDS = 20, 4e-3
# Kept back from the time limit for the process to end in.
ENDING_SECONDS = 5.0
# Of a case's operands those that its kernel reads, where these are not all.
READ = {"xa": "x a", "one_kernel": "x weight a b", "dxa_db": "dy b xa", "da": "xa x a"}


class Result(NamedTuple):
    """The best config for a kernel and shape.

    Attributes:
        gain: the present config's time over the best's, median of the rounds' ratios; None where
            the present one did not run.
        seconds: of the best.
        tried, failed: how many candidates ran, and how many were refused and why.
    """

    kernel: str
    shape: Shape
    config: Config
    gain: float | None
    seconds: float
    tried: int
    failed: list[str]


class Bench(measure.Call):
    """A case's launch, every time on the next set of operands."""

    def __init__(self, case: Case, ring: Sequence[Tensors]) -> None:
        self.case, self.ring, self.turn = case, ring, 0

    def prepare(self) -> None:
        self.turn = (self.turn + 1) % len(self.ring)

    def run(self) -> Any:
        return self.case.run(self.ring[self.turn])

    def per_call(self, samples: Sequence[float]) -> Sequence[float]:
        """As of `measure.GraphCall`."""
        return samples


def rotated(kernel: str, operands: Tensors, device: torch.device) -> list[Tensors]:
    """Copies of what a kernel reads, at least two, that should exceed the cache twice over.

    Operands of a few MB, which another kernel has mostly just written, are copied `REPEATS` times.
    """
    names = READ[kernel].split() if kernel in READ else list(operands)
    read = {name: operands[name] for name in names}
    size = sum(tensor.numel() * tensor.element_size() for tensor in read.values())
    sets = min(max(2, math.ceil(2 * machine.cache_bytes(device) / size)), REPEATS)
    return [{name: tensor.clone() for name, tensor in read.items()} for _ in range(sets)]


def to_time(bench: Bench, device: torch.device) -> Bench | measure.GraphCall:
    """What is timed of a bench: on a GPU a CUDA graph, since launches outlast small kernels.

    Raises:
        RuntimeError: no graph can hold it.
    """
    if device.type != "cuda":
        return bench
    # With its launch, which is near enough for what is only to bound a replay.
    once = measure.spread(measure.interleave({"": bench}, device, 0.0)[""]).median
    sets = len(bench.ring)  # whole turns of them
    turns = min(round(REPEATS / sets), int(REPLAY_SECONDS / once / sets))
    return measure.GraphCall(bench, sets * max(1, turns))


def listed(
    kernel: str, shape: Shape, dtype: torch.dtype, capability: tuple[int, int]
) -> list[Case]:
    """The present config and every candidate; nothing for a kernel that this GPU has no use for."""
    try:
        present = lookup(kernel, capability, dtype.itemsize, shape)
    except LookupError:
        return []
    configs = dict.fromkeys((present, *candidates(kernel, capability, dtype.itemsize)))
    return [Case(kernel, config, dtype, shape) for config in configs]


def tune(
    cases: Sequence[Case], device: torch.device, seconds: float, refused: Mapping[Case, str]
) -> Result:
    """Search the cases of one kernel and shape, of which the first has the present config.

    Every one is checked against float64 first. All are timed in turn for a few rounds, and the
    best of them with the present one once more.

    Args:
        cases: see `listed`.
        seconds: of timing, in each of the two comparisons.
        refused: cases to leave out, and why.

    Raises:
        RuntimeError: none of them works; the message says why the first does not.
    """
    present, kernel = cases[0], cases[0].kernel
    operands = present.operands(device)
    plain = present.state(operands)
    truth = present.state({name: tensor.double() for name, tensor in operands.items()})
    ring = rotated(kernel, operands, device)
    calls: dict[str, Any] = {}
    by_name, failed = {repr(case.config): case for case in cases}, []
    for name, case in by_name.items():
        if case in refused:
            failed.append(f"{name}: {refused[case]}")
            continue
        try:
            bench = Bench(case, ring)
            ours = bench.run()
            for output, expected in truth.items():
                compare(f"{kernel}: {output}", ours[output], [plain[output]], expected)
            machine.synchronize(device)
            del ours
            calls[name] = to_time(bench, device)
        except GateError as error:
            failed.append(f"{name}: WRONG: {error}")
        except Exception as error:  # compilers refuse in many ways; each is that candidate's end
            failed.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]}")
    if not calls:
        raise RuntimeError(f"none of {len(failed)} candidates works; {failed[0]}")

    def timed(names: Sequence[str], least_rounds: int) -> dict[str, Sequence[float]]:
        chosen = {name: calls[name] for name in names}
        samples = measure.interleave(chosen, device, seconds, least_rounds=least_rounds)
        return {name: calls[name].per_call(taken) for name, taken in samples.items()}

    first, now = timed(list(calls), 3), repr(present.config)
    last = sorted(calls, key=lambda name: measure.spread(first[name]).median)[:LAST]
    final = timed([*last, now] if now in calls else last, 7)
    best = min(final, key=lambda name: measure.spread(final[name]).median)
    return Result(
        kernel=kernel,
        shape=present.shape,
        config=by_name[best].config,
        gain=measure.paired_ratio(final[now], final[best]).median if now in calls else None,
        seconds=measure.spread(final[best]).median,
        tried=len(calls),
        failed=failed,
    )


class _TimeUp(BaseException):  # not to be caught as a candidate's failure
    pass


@contextlib.contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Leave the ``with`` after so many seconds, wherever it is by then, and say so."""

    def leave(*_: Any) -> None:
        raise _TimeUp

    before = signal.signal(signal.SIGALRM, leave)
    # Again and again: raised in a destructor, an exception is lost.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), 2.0)
    try:
        yield
    except _TimeUp:
        print(f"# {what}: out of time", flush=True)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def compile_all(
    cases: Sequence[Case], capability: tuple[int, int], sms: int, jobs: int, seconds: float
) -> dict[Case, str]:
    """Compile what the cases launch into Triton's cache on disk, equal kernels once.

    In so many processes, which touch no GPU, and for so many seconds at the most.

    Returns:
        The cases that are not compiled, and why.
    """
    refused = dict.fromkeys(cases, "not compiled in time")
    alike: dict[str, list[Case]] = {}
    with at_most(seconds, "compiling"):
        for case in cases:
            launches = _launches(case, sms)
            kernels = [(source_of(one).hash(), one.options) for one in launches]
            alike.setdefault(str(kernels), []).append(case)
        groups = list(alike.values())
        tasks = [(group[0], capability, sms) for group in groups]
        # By its name: run as a program, this module goes by another one.
        running = spread(compile_case, tasks, jobs, preload=["benchmarks.tune"])
        with contextlib.closing(running):
            for index, result in running:
                for case in groups[index]:
                    if isinstance(result, Lost):
                        refused[case] = f"not compiled: {result.reason.strip().splitlines()[0]}"
                    else:
                        del refused[case]
    return refused


def compile_case(task: tuple[Case, tuple[int, int], int]) -> None:
    """Compile what a case launches, as the launch itself would, without a GPU."""
    case, capability, sms = task
    warm_up(_launches(case, sms), capability)


def warm_up(launches: Sequence[Launch], capability: tuple[int, int]) -> None:
    """Compile launches into Triton's cache, without a GPU; this process launches none after it."""
    major, minor = capability
    stand_in = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 10 * major + minor, 32),
    )
    driver.set_active(stand_in)
    for launch in launches:
        launch.kernel.warmup(**launch.arguments, grid=(1,), **launch.options)


def _launches(case: Case, sms: int) -> list[Launch]:
    return launches_of(case, _on_meta(case.kernel, case.dtype, case.shape), sms)


@functools.cache
def _on_meta(kernel: str, dtype: torch.dtype, shape: Shape) -> Tensors:
    return Case(kernel, Config(), dtype, shape).operands(torch.device("meta"))


def row(result: Result, capability: tuple[int, int], itemsize: int) -> str:
    """A line for `tuning.ROWS`, bounded by the shape that was measured."""
    c, shape = result.config, result.shape
    sizes = f"{c.block_m}, {c.block_n}, {c.block_k}, {c.warps}, {c.stages}, {c.group}, {c.per_sm}"
    bounds = f"m={shape.m}, n={shape.n}, k={shape.k}, r={shape.r}"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    gain = f"{result.gain:.2f} times as fast as before" if result.gain else "before, none ran"
    return (
        f'Row({capability}, "{result.kernel}", {itemsize}, Config({sizes}), {bounds}),'
        f"  # {date}: {gain}"
    )


def write(found: Sequence[Result], path: Path, stamp: dict[str, Any]) -> None:
    """All results so far as JSON; whenever it is stopped, the file is whole."""
    results = [{**r._asdict(), "shape": r.shape._asdict(), "config": vars(r.config)} for r in found]
    beside = path.with_name(f"{path.name}.part")
    beside.write_text(json.dumps({**stamp, "results": results}, indent=1), encoding="utf-8")
    os.replace(beside, path)


def process_seconds() -> float:
    """Since this process was started, its imports included."""
    started = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK")


def main(arguments: list[str] | None = None) -> int:
    """Tune, printing each row as it is found; 1 where there is no GPU to tune on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="for everything (default 10)")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shape", action="append", metavar="M,N,K,R", help="default: Llama's")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a search")
    parser.add_argument("--jobs", type=int, default=processors(), help="processes that compile")
    parser.add_argument("--commit", help="to stamp results with, where git cannot tell")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each search")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here to tune on")
        return 1
    left = 60 * options.minutes - process_seconds()
    deadline = time.monotonic() + left - ENDING_SECONDS
    # Even if the GPU never answers again; a second early, since the exit takes time, too.
    faulthandler.dump_traceback_later(max(left - 1, 1), exit=True)
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    capability = torch.cuda.get_device_capability(device)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    shapes = [Shape(*map(int, s.split(","))) for s in options.shape] if options.shape else SHAPES
    pairs = [(kernel, shape) for shape in shapes for kernel in options.kernel or KERNELS]
    searches = [cases for pair in pairs if (cases := listed(*pair, dtype, capability))]
    every = [case for cases in searches for case in cases]
    third = (deadline - time.monotonic()) / 3
    refused = compile_all(every, capability, sms, max(1, options.jobs), third)
    print(f"# {len(refused)} of {len(every)} candidates left out: not compiled", flush=True)
    stamp, found = machine.stamp(device, options.commit), []
    with at_most(deadline - time.monotonic(), "tuning"):
        for cases in searches:
            try:
                result = tune(cases, device, options.seconds, refused)
            except RuntimeError as error:  # out of memory is one
                what, why = cases[0], str(error).partition("\n")[0]
                print(f"# {what.kernel} at {tuple(what.shape)}: {why}", flush=True)
                continue
            found.append(result)
            print(row(result, capability, dtype.itemsize), flush=True)
            if options.out:
                write(found, options.out, stamp)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
