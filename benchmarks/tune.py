"""Find block sizes for `lora_kernels.tuning` on the GPU at hand.

``python -m benchmarks.tune --minutes 5 --kernel gemm --kernel xa`` times every candidate that
compiles and computes the right thing, in turn with the table's present choice, and prints rows to
paste. A human pastes them, with the date and the gain.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lora_kernels import tuning
from lora_kernels.linear import backward, forward, gemm
from lora_kernels.tuning import KERNELS, Config, Shape

from . import machine, measure
from .gate import GateError, compare

SHAPES = tuple(
    Shape(m, n, k, 16)
    for n, k in ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
    for m in (8192, 1024)
) + (Shape(8192, 4096, 4096, 64), Shape(4096, 512, 512, 16))
SCALE = 2.0
LAST = 3  # how many candidates the final, longer comparison takes


class Trial(NamedTuple):
    """A kernel on one shape: how to launch it with a config, and what it must give."""

    launch: Callable[[Config], Sequence[Tensor]]
    plain: Sequence[Tensor]
    truth: Sequence[Tensor]


class Result(NamedTuple):
    """The best config for a kernel and shape.

    Attributes:
        gain: the present config's time over the best's, median of the rounds' ratios.
        seconds: of the best.
        tried, failed: how many candidates ran, and how many were refused and why.
    """

    kernel: str
    shape: Shape
    config: Config
    gain: float
    seconds: float
    tried: int
    failed: list[str]


class Bench(measure.Call):
    """A launch as a call; the caches are cold only as far as the tensors exceed them."""

    def __init__(self, launch: Callable[[Config], Any], config: Config) -> None:
        self.launch, self.config = launch, config

    def prepare(self) -> None:
        pass

    def run(self) -> Any:
        return self.launch(self.config)


def make_trial(kernel: str, shape: Shape, dtype: torch.dtype, device: torch.device) -> Trial:
    """Random inputs for a kernel, its launcher, and its values in dtype and in float64.

    Raises:
        ValueError: no such kernel.
    """
    m, n, k, r = shape
    generator = torch.Generator(device=device).manual_seed(0)

    def normal(*size: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*size, device=device, generator=generator)
        return drawn.mul_(std).to(dtype)

    x, weight, dy = normal(m, k), normal(n, k, std=k**-0.5), normal(m, n)
    a, b = normal(r, k, std=k**-0.5), normal(n, r, std=r**-0.5)
    xa, dxa = normal(m, r), normal(m, r)

    def trial(
        launch: Callable[[Config], Sequence[Tensor]],
        formula: Callable[..., Sequence[Tensor]],
        *tensors: Tensor,
    ) -> Trial:
        return Trial(launch, formula(*tensors), formula(*(t.double() for t in tensors)))

    if kernel == "xa":
        return trial(
            lambda config: forward.compute_xa(x, a, config=config)[:1],
            lambda x, a: [x @ a.t()],
            *(x, a),
        )
    if kernel == "one_kernel":
        return trial(
            lambda config: forward.one_kernel(
                x, weight, a, b, None, SCALE, None, 0.0, config=config
            )[:2],
            lambda x, w, a, b: [x @ w.t() + SCALE * ((x @ a.t()) @ b.t()), x @ a.t()],
            *(x, weight, a, b),
        )
    if kernel in ("gemm", "hopper"):
        product = gemm.pointer_gemm if kernel == "gemm" else gemm.hopper_gemm
        return trial(
            lambda config: [product(x, weight.t(), xa, b.t(), scale=SCALE, config=config)],
            lambda x, w, xa, b: [x @ w.t() + SCALE * (xa @ b.t())],
            *(x, weight, xa, b),
        )
    if kernel == "expand":
        return trial(
            lambda config: [gemm.expand(xa, b.t(), scale=SCALE, config=config)],
            lambda xa, b: [SCALE * (xa @ b.t())],
            *(xa, b),
        )
    if kernel == "dxa_db":
        return trial(
            lambda config: [
                t for t in backward.compute_dxa_db(dy, b, xa, SCALE, config=config) if t is not None
            ],
            lambda dy, b, xa: [SCALE * (dy @ b), SCALE * (dy.t() @ xa)],
            *(dy, b, xa),
        )
    if kernel == "da":
        return trial(
            lambda config: [backward.compute_da(dxa, x, config=config)],
            lambda dxa, x: [dxa.t() @ x],
            *(dxa, x),
        )
    raise ValueError(f"kernel must be one of {', '.join(KERNELS)}; got {kernel!r}")


def tune(
    kernel: str,
    shape: Shape,
    dtype: torch.dtype,
    device: torch.device,
    capability: tuple[int, int],
    configs: Sequence[Config] | None = None,
    seconds: float = 1.0,
) -> Result | None:
    """Search the candidates for one kernel and shape; None where none serves or works.

    Every candidate is checked against float64 first. All are timed in turn for a few rounds, and
    the best of them with the present config once more.
    """
    try:
        present = tuning.lookup(kernel, capability, dtype.itemsize, shape)
    except LookupError:  # a kernel that this GPU has no use for
        return None
    trial = make_trial(kernel, shape, dtype, device)
    listed = tuning.candidates(kernel, capability, dtype.itemsize) if configs is None else configs
    calls: dict[str, Any] = {}
    failed = []
    for config in dict.fromkeys((present, *listed)):
        try:
            for got, plain, truth in zip(
                trial.launch(config), trial.plain, trial.truth, strict=True
            ):
                compare(kernel, got, [plain], truth)
            machine.synchronize(device)
        except GateError as error:
            failed.append(f"{config}: WRONG: {error}")
        except Exception as error:  # compilers refuse in many ways; each is that candidate's end
            failed.append(f"{config}: {type(error).__name__}: {str(error).splitlines()[:1]}")
        else:
            calls[repr(config)] = Bench(trial.launch, config)
    if not calls:
        return None
    first = measure.interleave(calls, device, seconds, least_rounds=3)
    ordered = sorted(calls, key=lambda name: measure.spread(first[name]).median)
    last = {name: calls[name] for name in ordered[:LAST]}
    if repr(present) in calls:
        last[repr(present)] = calls[repr(present)]
    final = measure.interleave(last, device, seconds, least_rounds=7)
    best = min(final, key=lambda name: measure.spread(final[name]).median)
    against = final.get(repr(present), final[best])
    return Result(
        kernel=kernel,
        shape=shape,
        config=last[best].config,
        gain=measure.paired_ratio(against, final[best]).median,
        seconds=measure.spread(final[best]).median,
        tried=len(calls),
        failed=failed,
    )


def precompile(
    kernels: Sequence[str],
    shape: Shape,
    dtype: torch.dtype,
    capability: tuple[int, int],
    jobs: int,
) -> None:
    """Launch every candidate once, in so many processes, to fill Triton's cache on disk."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for kernel in kernels:
            configs = tuning.candidates(kernel, capability, dtype.itemsize)
            for start in range(jobs):
                pool.submit(_launch_each, kernel, shape, dtype, configs[start::jobs])


def _launch_each(kernel: str, shape: Shape, dtype: torch.dtype, configs: list[Config]) -> None:
    trial = make_trial(kernel, shape, dtype, torch.device("cuda"))
    for config in configs:
        # What fails here fails again, and is reported, in `tune`.
        with contextlib.suppress(Exception):
            trial.launch(config)


def row(result: Result, capability: tuple[int, int], itemsize: int) -> str:
    """A line for `tuning.ROWS`, bounded by the shape that was measured."""
    c, shape = result.config, result.shape
    sizes = f"Config({c.block_m}, {c.block_n}, {c.block_k}, {c.warps}, {c.stages}, {c.group})"
    bounds = f"m={shape.m}, n={shape.n}, k={shape.k}, r={shape.r}"
    date = datetime.datetime.now(datetime.timezone.utc).date()
    return (
        f'Row({capability}, "{result.kernel}", {itemsize}, {sizes}, {bounds}),'
        f"  # {date}: {result.gain:.2f} times as fast as before"
    )


def main(arguments: list[str] | None = None) -> int:
    """Tune, printing each row as it is found; 1 where there is no GPU to tune on."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--kernel", action="append", choices=KERNELS, help="default: all")
    parser.add_argument("--minutes", type=float, default=10.0, help="stop after so many")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--shape", action="append", metavar="M,N,K,R", help="default: Llama's")
    parser.add_argument("--seconds", type=float, default=1.0, help="of timing a search")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile beforehand")
    parser.add_argument("--commit", help="to stamp results with, where git cannot tell")
    parser.add_argument("--out", type=Path, help="JSON file, written anew after each search")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("there is no CUDA GPU here to tune on")
        return 1
    device, dtype = torch.device("cuda"), getattr(torch, options.dtype)
    capability = torch.cuda.get_device_capability(device)
    shapes = [Shape(*map(int, s.split(","))) for s in options.shape] if options.shape else SHAPES
    deadline = time.monotonic() + 60 * options.minutes
    found: list[Result] = []
    kernels = options.kernel or KERNELS
    for shape in shapes:
        if options.jobs and time.monotonic() < deadline:
            precompile(kernels, shape, dtype, capability, options.jobs)
        for kernel in kernels:
            if time.monotonic() > deadline:
                print("out of time")
                return 0
            result = tune(kernel, shape, dtype, device, capability, seconds=options.seconds)
            if result is None:
                print(f"# {kernel} at {shape}: no candidate works")
                continue
            found.append(result)
            print(row(result, capability, dtype.itemsize), flush=True)
            if options.out:
                write(found, options.out, machine.stamp(device, options.commit))
    return 0


def write(found: Sequence[Result], path: Path, stamp: dict[str, Any]) -> None:
    """All results so far as JSON."""
    results = [{**r._asdict(), "shape": r.shape._asdict(), "config": vars(r.config)} for r in found]
    path.write_text(json.dumps({**stamp, "results": results}, indent=1), encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
