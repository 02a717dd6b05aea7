"""Cases through Triton's own launcher and tensor-map encoder, on a stub of the CUDA driver.

``python tests/helpers/launching.py --target sm_90 --all`` launches every case that
``python -m lora_kernels check`` runs on such a GPU. Nothing is computed: what is shown is that each
kernel compiles as it is launched, and that its arguments, grid, shared memory and tensor maps are
such as a driver takes. Without ``--all`` a part of them, with each kernel in each of its uses and
dtypes, and each strategy of a layer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import stub_driver
from lora_kernels.kernels import hopper, tuning
from lora_kernels.kernels import launching as way
from lora_kernels.kernels.tuning import Shape
from lora_kernels.proof import check
from lora_kernels.proof.cases import Case, products_in
from lora_kernels.proof.commands import TARGETS
from lora_kernels.proof.workers import Lost, processors, progress, spread

TIMES = 2  # the first call compiles, the second finds what the first one left


class Task(NamedTuple):
    """One case for one GPU, on the stub at ``stub``."""

    case: check.AnyCase
    target: str
    stub: str


class Launched(NamedTuple):
    """What came of a case: launches that the driver took, and the error, empty if none."""

    count: int
    error: str


def every_case(target: str) -> list[check.AnyCase]:
    """What ``check`` runs on this GPU."""
    capability, _ = TARGETS[target]
    options: dict[str, Any] = {"quick": False, "tf32": True}
    layers = [
        *check.layer_cases(capability, check.ON_GPU, **options),
        *check.group_layer_cases(capability, check.ON_GPU, **options),
    ]
    return [
        *check.kernel_cases(capability, check.ON_GPU, **options),
        *check.group_kernel_cases(capability, check.ON_GPU, **options),
        *check.gate_cases(check.ON_GPU),
        *(layer for layer in layers if not layer.refusal),
    ]


def some_cases(target: str) -> list[check.AnyCase]:
    """Each kernel in each use and dtype with all it can take along, and in bfloat16 plain too;
    each pair of strategies of a layer in bfloat16, with dropout and without."""
    found: dict[Any, check.AnyCase] = {}
    for case in every_case(target):
        loaded = case.dropout_p > 0 or case.bias, case.wide
        if hasattr(case, "kernel"):
            key: Any = case.name, case.dtype_name, case.dtype_name == "bf16" and loaded
            if key not in found or (loaded > _loads(found[key]) and case.dtype_name != "bf16"):
                found[key] = case
        elif case.dtype == torch.bfloat16:
            found.setdefault((case.name, case.dropout_p), case)
    return list(found.values())


def _loads(case: check.AnyCase) -> tuple[bool, bool]:
    return case.dropout_p > 0 or case.bias, case.wide


_stub: dict[str, Any] = {}


def driver_for(target: str, stub: str) -> Any:
    """The stub posing as this GPU in this process, which has no other."""
    if not _stub:
        capability, sms = TARGETS[target]
        shared = tuning.shared_memory(capability)
        _stub["loaded"], _stub["driver"] = stub_driver.activate(Path(stub), capability, sms, shared)
    return _stub["loaded"]


def launch(task: Task) -> Launched:
    """Run a case on the stub, and compare what arrived there with what was to be launched."""
    case, (_, sms) = task.case, TARGETS[task.target]
    stub = driver_for(task.target, task.stub)
    before = stub.stub_launches()
    absent = case.operands(torch.device("meta"))
    operands = {
        name: torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        for name, like in absent.items()
    }
    try:
        with products_in(case.tf32):
            with way.recording(sms) as expected:
                case.run(absent)
            for _ in range(TIMES):
                case.run(operands)
    except Exception as error:
        return Launched(stub.stub_launches() - before, f"{type(error).__name__}: {error}")
    count = stub.stub_launches() - before
    wrong = count != TIMES * len(expected)
    problem = f"{count} launches arrived in {TIMES} runs of {len(expected)}" if wrong else ""
    return Launched(count, problem)


def _described(case: check.AnyCase) -> str:
    sizes = f"m={case.shape.m} n={case.shape.n} k={case.shape.k}"
    return f"{case.name} {case.block} {case.dtype_name}, {sizes}, {case.variant}"


@contextlib.contextmanager
def _changed(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _overlapping() -> Any:
    real = way.TensorDescriptor

    def overlapping(tensor: Any, shape: Any, strides: Any, block: Any) -> Any:
        return real(tensor, shape, [shape[1] - 8, strides[1]], block)

    return _changed(way, "TensorDescriptor", overlapping)


def _wide_box() -> Any:
    utils = _stub["driver"].utils
    name = next(name for name in dir(utils) if name in ENCODERS)
    real = getattr(utils, name)

    def wide(address: int, swizzle: int, size: int, kind: int, box: Any, *others: Any) -> Any:
        return real(address, swizzle, size, kind, [257, *box[1:]], *others)

    return _changed(utils, name, wide)


ENCODERS = ("fill_tma_descriptor", "fill_tma_descriptor_tiled")


def _text_for_a_size() -> Any:
    class Mistyped(way.Prepared):
        def __init__(self, *first: Any) -> None:
            *others, arguments, boxes = first
            super().__init__(*others, arguments | {"M": "1024"}, boxes)

    return _changed(hopper, "Prepared", Mistyped)


PLANTED = {
    "overlapping stride": _overlapping,
    "box of 257": _wide_box,
    "text for a size": _text_for_a_size,
    "a tensor for a descriptor": lambda: _changed(way.Box, "over", lambda box, tensor: tensor),
}


def planted(target: str, stub: str) -> dict[str, str]:
    """What is said of one product with each fault planted, and of it as it is."""
    case = Case(
        "hopper",
        tuning.lookup("hopper", (9, 0), 2, Shape(1024, 768, 512, 16)),
        torch.bfloat16,
        Shape(1024, 768, 512, 16),
    )
    task = Task(case, target, stub)
    said = {"": launch(task).error}
    for name, plant in PLANTED.items():
        with plant():
            said[name] = launch(task).error
    return said | {"again": launch(task).error}


def main(arguments: list[str] | None = None) -> int:
    """Launch what was asked for; 1 if something failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, default="sm_90")
    parser.add_argument("--all", action="store_true", help="every case of check")
    parser.add_argument("--planted", action="store_true", help="one product with planted faults")
    parser.add_argument("--jobs", type=int, default=processors())
    options = parser.parse_args(arguments)
    if lacking := stub_driver.missing():
        parser.error(lacking)
    with tempfile.TemporaryDirectory() as folder:
        stub = str(stub_driver.build(Path(folder)))
        if options.planted:
            print(json.dumps(planted(options.target, stub)))
            return 0
        cases = every_case(options.target) if options.all else some_cases(options.target)
        tasks = [Task(case, options.target, stub) for case in cases]
        results: list[Any] = [None] * len(tasks)
        ended = spread(launch, tasks, options.jobs, [__name__])
        for index, result in progress(ended, len(tasks), "launching"):
            results[index] = Launched(0, result.reason) if isinstance(result, Lost) else result
    failed = [
        f"{_described(case)}: {result.error}"
        for case, result in zip(cases, results, strict=True)
        if result.error
    ]
    launches = sum(result.count for result in results)
    facts = {"cases": len(cases), "launches": launches, "failed": failed}
    print(json.dumps(facts, indent=1))
    return 1 if failed or not launches else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    import launching  # its functions by the name under which the worker processes find them

    sys.exit(launching.main())
