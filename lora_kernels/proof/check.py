"""Every kernel and configuration of the table against a float64 truth, on the machine at hand.

On a GPU the kernels are compiled and run there; without one they run on the CPU in Triton's
interpreter, which proves their arithmetic and their bounds but not the compiler's work.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton import knobs
from triton.backends.nvidia.compiler import get_ptxas

from ..kernels import tuning
from ..kernels.tuning import Shape
from .cases import (
    EXACT_SCALE,
    NARROW,
    PRODUCTS,
    SCALE,
    Case,
    LayerCase,
    products_in,
    served,
)
from .closeness import TF32_ROUNDING, distance
from .gate_cases import GateCase, gate_cases
from .group_cases import GroupCase, GroupLayerCase
from .group_probes import group_kernel_cases, group_layer_cases
from .workers import Lost, processors, progress, spread

AnyCase = Case | LayerCase | GroupCase | GroupLayerCase | GateCase
# The interpreter stands in for the GPU with the most kernels, as it does for the operators.
INTERPRETED_CAPABILITY = (9, 0)

# Processes that share a GPU take turns on it, so more of them only help to compile.
MOST_ON_GPU = 16
# A CUDA context, about half of it, and the float64 truth of the largest case.
MEMORY_OF_A_PROCESS = 2 << 30

# What torch and Triton say when the GPU may answer this process no more.
_GPU_ERRORS = ("CUDA error", "Error [CUDA]")


class Sizes(NamedTuple):
    """``(m, n, k)``: round ones, odd ones, odd ones that TMA takes, and more tiles than SMs."""

    round: tuple[int, int, int]
    odd: tuple[int, int, int]
    odd_tma: tuple[int, int, int]
    many: tuple[int, int, int]


ON_GPU = Sizes((1024, 768, 512), (333, 201, 309), (333, 200, 312), (4160, 4352, 192))
INTERPRETED = Sizes((160, 320, 128), (37, 41, 53), (37, 40, 56), (300, 520, 64))


class Probe(NamedTuple):
    """What one case of each configuration exercises; each tile of the rank comes with dropout
    and without, with round sizes and odd ones."""

    rank: int
    sizes: str
    dropped: bool
    bias: bool
    wide: bool


PROBES = (
    Probe(16, "odd", True, True, True),
    Probe(16, "round", False, True, False),
    Probe(1, "odd", False, False, True),
    Probe(5, "round", True, True, False),
    Probe(32, "round", True, False, True),
    Probe(48, "odd", True, True, False),
    Probe(64, "round", False, False, True),
    Probe(128, "odd", False, True, False),
    Probe(128, "many", True, False, False),
    Probe(16, "many", False, True, False),
)
QUICK_PROBES = PROBES[:2] + PROBES[5:6]
LAYER_RANKS = {"odd": 5, "round": 16, "odd_tma": 160}


class Output(NamedTuple):
    """One output of one case: distances from the truth, and what is wrong, if anything."""

    name: str
    ours: float
    plain: float
    budget: float
    problem: str


def kernel_cases(
    capability: tuple[int, int], sizes: Sizes, *, quick: bool, tf32: bool
) -> list[Case]:
    """Every configuration of the table in every dtype that it serves, by every probe."""
    dtypes = [(dtype, False) for dtype in (*NARROW, torch.float32)]
    dtypes += [(torch.float32, True)] if tf32 else []
    cases = []
    for kernel, (dtype, as_tf32) in product(tuning.KERNELS, dtypes):
        if quick and dtype == torch.float16:
            continue
        for probe in QUICK_PROBES if quick else PROBES:
            tma = kernel == "hopper" and probe.sizes == "odd"
            m, n, k = getattr(sizes, "odd_tma" if tma else probe.sizes)
            if probe.sizes == "many" and kernel not in PRODUCTS:
                continue
            for config, _ in served(kernel, capability, dtype.itemsize, probe.rank):
                case = Case(
                    kernel,
                    config,
                    dtype,
                    Shape(m, n, k, probe.rank),
                    bias=probe.bias and kernel not in ("xa", "da"),
                    dropout_p=0.1 if probe.dropped and kernel != "dxa_db" else 0.0,
                    wide=probe.wide and dtype != torch.float32,
                    tf32=as_tf32,
                    scale=SCALE if probe.dropped else EXACT_SCALE,
                )
                cases += _roles(case) if kernel in PRODUCTS else [case]
    return list(dict.fromkeys(cases))


def _roles(case: Case) -> list[Case]:
    """The product as forward, which has a bias, and as dx, which has a mask."""
    return [replace(case, dropout_p=0.0), replace(case, bias=False, dx=True)]


def layer_cases(
    capability: tuple[int, int], sizes: Sizes, *, quick: bool, tf32: bool
) -> list[LayerCase]:
    """Every strategy of forward and of dx in every dtype, with dropout and without.

    Some may be refused by `LayerCase.refusal`.
    """
    forwards, backwards = tuning.STRATEGIES["forward"], tuning.STRATEGIES["dx"]
    # Each strategy of either side at least once, without all pairs.
    pairs = [(name, name if name in backwards else "fused") for name in forwards]
    dtypes = [(dtype, False) for dtype in (*NARROW, torch.float32)]
    dtypes += [(torch.float32, True)] if tf32 else []
    cases = []
    for (fwd, dx), (dtype, as_tf32), dropout_p in product(pairs, dtypes, (0.0, 0.1)):
        if quick and dtype == torch.float16:
            continue
        for name, rank in LAYER_RANKS.items():
            if (fwd == "one_kernel" and rank > tuning.ONE_KERNEL_RANK) or (
                fwd == "hopper" and name == "odd"
            ):
                continue
            m, n, k = getattr(sizes, name)
            shape = Shape(m, n, k, rank)
            wide = name == "round" and dtype != torch.float32
            cases.append(
                LayerCase(
                    fwd,
                    dx,
                    capability,
                    dtype,
                    shape,
                    bias=name != "round",
                    dropout_p=dropout_p,
                    wide=wide,
                    tf32=as_tf32,
                    scale=EXACT_SCALE if name == "round" else SCALE,
                )
            )
    return cases


class _Poisoned(TorchFunctionMode):
    """Fresh memory comes back full of NaN or set bits: what no kernel wrote cannot hide."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty):
            out.fill_(float("nan") if out.is_floating_point() else 127)
        return out


def run_case(case: AnyCase) -> list[Output]:
    """Run a case twice and judge its outputs; in the interpreter, which repeats itself, once.

    Raises:
        RuntimeError: the GPU is out of order, after this case or an earlier one.
    """
    device = torch.device("cpu" if knobs.runtime.interpret else "cuda")
    try:
        with products_in(case.tf32):
            operands = case.operands(device)
            with _Poisoned():
                ours = case.run(operands)
                again = ours if device.type == "cpu" else case.run(operands)
            plain = case.state(operands)
            wide = {
                name: tensor.to(case.dtype).double() if tensor.is_floating_point() else tensor
                for name, tensor in operands.items()
            }
            truth = case.state(wide)
            rounding = TF32_ROUNDING if case.tf32 else None
            return [
                _judge(name, ours.get(name), again.get(name), plain[name], truth[name], rounding)
                for name in truth
            ]
    except Exception as error:
        if any(sign in str(error) for sign in _GPU_ERRORS):
            raise
        return [_failed(f"{type(error).__name__}: {error}")]


def _judge(
    name: str,
    ours: Tensor | None,
    again: Tensor | None,
    plain: Tensor,
    truth: Tensor,
    rounding: float | None,
) -> Output:
    if ours is None or again is None:
        return _failed("not computed", name)
    if ours.shape != truth.shape or ours.dtype != plain.dtype:
        came = f"{ours.dtype} {tuple(ours.shape)}"
        return _failed(f"{came} instead of {plain.dtype} {tuple(truth.shape)}", name)
    same = torch.equal(_bits_of(ours), _bits_of(again))
    if ours.dtype == torch.bool:
        wrong = int((ours != truth).sum())
        problem = f"{wrong} of {truth.numel()} keep bits differ" if wrong else ""
        found = float(wrong), 0.0, 0.0
    else:
        measured = distance(ours, plain, truth, rounding)
        problem = "" if measured.within else "beyond the budget"
        found = measured.ours, measured.plain, measured.budget
    return Output(name, *found, problem or ("" if same else "other bits when run again"))


def _bits_of(tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32}[tensor.itemsize])


def _failed(problem: str, name: str = "") -> Output:
    nan = float("nan")
    return Output(name, nan, nan, nan, problem)


class Result(NamedTuple):
    """What one case came to."""

    case: AnyCase
    outputs: list[Output]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong with any output."""
        return not any(output.problem for output in self.outputs)

    @property
    def worst(self) -> Output:
        """The output that failed, or came closest to it."""
        return max(self.outputs, key=_strain)

    @property
    def strain(self) -> float:
        """Share of its budget that the worst output uses, more than any other if it failed."""
        return _strain(self.worst)


def _strain(output: Output) -> float:
    share = output.ours / output.budget if output.budget else 0.0
    if output.problem:
        return 1e9 + (share if share < math.inf else 0.0)  # also a NaN comes first
    return share


def plan(*, quick: bool = False, only: Sequence[str] = ()) -> tuple[list[AnyCase], list[str]]:
    """The cases for the machine at hand, and what is left out of them with the reason.

    Args:
        quick: fewer cases, and none in float16.
        only: names of kernels, ``"layers"`` for the strategies end to end, or ``"groups"`` for
            those of groups; empty for all.
    """
    interpreted = knobs.runtime.interpret
    capability = INTERPRETED_CAPABILITY if interpreted else torch.cuda.get_device_capability()
    sizes = INTERPRETED if interpreted else ON_GPU
    options = {"quick": quick, "tf32": not interpreted}
    cases: list[AnyCase] = []
    left_out = []
    kernels: tuple[Case | GroupCase | GateCase, ...] = (
        *kernel_cases(capability, sizes, **options),
        *group_kernel_cases(capability, sizes, **options),
        *gate_cases(sizes, quick=quick),
    )
    for kernel_case in kernels:
        if not only or kernel_case.kernel in only:
            cases.append(kernel_case)
    layers: dict[str, Sequence[LayerCase | GroupLayerCase]] = {
        "layers": layer_cases(capability, sizes, **options),
        "groups": group_layer_cases(capability, sizes, **options),
    }
    for name, of_name in layers.items():
        if only and name not in only:
            continue
        for layer_case in of_name:
            if layer_case.refusal:
                left_out.append(layer_case.refusal)
            else:
                cases.append(layer_case)
    return cases, list(dict.fromkeys(left_out))


def check(
    cases: Sequence[AnyCase], *, jobs: int | None = None, deadline: float | None = None
) -> Iterator[tuple[int, Result]]:
    """Run cases in worker processes, which take TRITON_INTERPRET from this one's environment.

    Args:
        cases: of `plan`.
        jobs: processes; by default as many as `default_jobs` says.
        deadline: of `time.monotonic`. No case starts from then on; one that runs for
            `workers.GRACE_SECONDS` more is killed and fails.

    Yields:
        The index of a case and its result, as each ends; nothing for a case that did not run.
    """
    running = spread(run_case, cases, jobs or default_jobs(), [__name__], deadline)
    for index, found in progress(running, len(cases), "checking"):
        outputs = [_failed(found.reason)] if isinstance(found, Lost) else found
        yield index, Result(cases[index], outputs)


def default_jobs() -> int:
    """The processors there are, less two for the rest of the machine where there are over four.

    On a GPU no more than `MOST_ON_GPU`, nor than its memory holds.
    """
    count = processors()
    jobs = count - 2 if count > 4 else count
    if knobs.runtime.interpret:
        return jobs
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return max(1, min(jobs, MOST_ON_GPU, memory // MEMORY_OF_A_PROCESS))


def machine() -> dict[str, str]:
    """What the results hold for: GPU, driver and versions."""
    found = {"torch": torch.__version__, "triton": triton.__version__}
    if knobs.runtime.interpret:
        return {
            "device": "the CPU, in Triton's interpreter: small shapes, the table of sm_90",
            **found,
        }
    major, minor = torch.cuda.get_device_capability()
    return {
        "device": f"{torch.cuda.get_device_name()} (sm_{major}{minor})",
        **found,
        "ptxas": get_ptxas(major * 10 + minor).version,
        "driver": _driver(),
    }


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return answer.stdout.split("\n")[0].strip()
