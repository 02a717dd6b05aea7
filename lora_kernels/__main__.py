"""``python -m lora_kernels``: check this machine's kernels, list what kernels take of a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, TextIO

import torch

from . import __version__
from .kernels import tuning

LAYERS = "layers"
# Compute capability, and multiprocessors of the largest GPU that has it.
TARGETS = {
    "sm_80": ((8, 0), 108),
    "sm_86": ((8, 6), 84),
    "sm_89": ((8, 9), 142),
    "sm_90": ((9, 0), 132),
    "sm_100": ((10, 0), 148),
    "sm_120": ((12, 0), 188),
}
SHOWN_FAILURES = 20

_CHECK = """\
Compare every kernel and block configuration that the table has for this machine's GPU with a
float64 truth, then whole layers, forward and every gradient, by each strategy.

Each output's largest error is printed beside that of plain torch in the same dtype. It may be at
most 2 times as large, plus one rounding of the largest value. Each call runs twice and has to give
the same bits, into memory that was filled with NaN before, so that what is not written shows.

Without a GPU the kernels run on the CPU in Triton's interpreter, on small shapes: that proves
their arithmetic and bounds, not what the compiler makes of them."""

_CHECK_NEXT = """\
exit status: 0 if everything passed; 1 if something failed, or did not run within --time-limit; 2
for a mistake on the command line; 130 after Ctrl-C, which still prints what ran until then.
If a kernel fails on your GPU, take the plain path, `with lora_kernels.use_backend("reference"):`,
and report what `--json` prints.

examples:
  python -m lora_kernels check                  everything; some minutes, most of them compiling
  python -m lora_kernels check --quick          fewer cases, no float16
  python -m lora_kernels check --only hopper    one kernel
  python -m lora_kernels check --time-limit 300 --out check.jsonl
                                                what five minutes allow, kept case by case"""

_RESOURCES = """\
Compile every kernel and block configuration that the table has for a GPU, without that GPU, and
print what each takes: registers a thread, bytes spilled to memory, shared memory a block, and
the tensor-core instructions that it multiplies with (mma up to Ada, wgmma on Hopper, tcgen05 on
Blackwell; none for float32 in full precision). Sizes are taken to be multiples of 16."""

_RESOURCES_NEXT = """\
A matrix product (gemm, hopper, expand, one_kernel) fails if it spills at all; the passes that wait
for memory may spill up to 64 bytes a thread, which is a warning. Anything fails that does not
compile or needs more shared memory than a block may have, and so does a hopper product without
wgmma. What is compiled is kept in Triton's cache (~/.triton), so that a second run is quick.

exit status: 0 if everything is fine, 1 if something failed, 2 for a mistake on the command line.

examples:
  python -m lora_kernels resources --target sm_90               H100, H200
  python -m lora_kernels resources --target sm_80 --only da     one kernel, A100"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels",
        description="Check the kernels on this machine, or see what they take of a GPU.",
    )
    parser.add_argument("--version", action="version", version=f"lora_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, text: str, about: tuple[str, str], run: Callable[[argparse.Namespace], int]
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=about[0],
            epilog=about[1],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    check = add(
        "check", "compare every kernel with float64 on this machine", (_CHECK, _CHECK_NEXT), _check
    )
    check.add_argument("--quick", action="store_true", help="fewer cases, and none in float16")
    check.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help="start no case after this time; what runs 20 s longer is stopped and fails",
    )
    check.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append each result to this file when its case ends, as a line of JSON",
    )
    _add_common(check, (*tuning.KERNELS, LAYERS))

    text = "compile every kernel for a GPU, without it"
    resources = add("resources", text, (_RESOURCES, _RESOURCES_NEXT), _resources)
    resources.add_argument(
        "--target",
        required=True,
        choices=TARGETS,
        metavar="SM",
        help=f"the GPU's compute capability: {', '.join(TARGETS)}",
    )
    _add_common(resources, tuning.KERNELS)
    return parser


def _add_common(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    parser.add_argument(
        "--only",
        nargs="+",
        choices=names,
        default=[],
        metavar="NAME",
        help=f"only these of {', '.join(names)}",
    )
    parser.add_argument(
        "--jobs", type=_count, metavar="N", help="processes at a time (default: by processors)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after `check` has printed what it has found until then.
    """
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        print(
            "triton is not installed, so there are no kernels here: every call takes the plain "
            "path. On Linux: pip install triton",
            file=sys.stderr,
        )
        return 1


def _check(options: argparse.Namespace) -> int:
    limit = options.time_limit
    deadline = None if limit is None else time.monotonic() + limit
    if not torch.cuda.is_available():
        # Read by Triton when it is imported, which the worker processes do anew.
        os.environ["TRITON_INTERPRET"] = "1"
    tool = importlib.import_module("lora_kernels.check")
    try:  # before the minutes that it is for
        out = options.out.open("a", encoding="utf-8") if options.out else nullcontext()
    except OSError as error:
        print(f"--out: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    facts = tool.machine()
    if not options.json:
        print(f"lora_kernels {__version__} on {facts['device']}")
        versions = (f"{name} {fact}" for name, fact in facts.items() if name != "device")
        print(", ".join(versions), end="\n\n", flush=True)
    cases, left_out = tool.plan(quick=options.quick, only=options.only)
    ended: dict[int, Any] = {}
    with out as file:
        try:
            for index, result in tool.check(cases, jobs=options.jobs, deadline=deadline):
                ended[index] = result
                if file is not None:
                    _append(file, facts, result)
        finally:  # also after Ctrl-C
            results = [ended[index] for index in sorted(ended)]
            if options.json:
                records = [_result_record(result) for result in results]
                _print_json(facts, not_run=len(cases) - len(results), results=records)
            else:
                _print_check(cases, results, left_out)
            sys.stdout.flush()  # a process that cannot be killed would hold up the end of this one
    everything = len(results) == len(cases) > 0 and all(result.passed for result in results)
    return 0 if everything else 1


def _append(file: TextIO, facts: dict[str, Any], result: Any) -> None:
    record = {"lora_kernels": __version__, **facts, **_result_record(result)}
    file.write(json.dumps(record, allow_nan=False) + "\n")
    file.flush()  # to outlast this process, however it ends


def _group(case: Any) -> tuple[str, str, str]:
    return case.name, case.block, case.dtype_name


def _print_check(cases: list[Any], results: list[Any], left_out: list[str]) -> None:
    planned = Counter(_group(case) for case in cases)
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for result in results:
        groups.setdefault(_group(result.case), []).append(result)
    rows: list[Sequence[str]] = []
    for key, group in sorted(groups.items(), key=lambda item: -max(r.strain for r in item[1])):
        worst = max(group, key=lambda result: result.strain)
        passed = sum(result.passed for result in group)
        verdict = "pass" if passed == planned[key] else "not all ran"
        output = worst.worst
        rows.append(
            (
                *key,
                f"{passed} of {planned[key]}",
                output.name,
                f"{output.ours:.2e}",
                f"{output.plain:.2e}",
                f"{output.budget:.2e}",
                verdict if passed == len(group) else "FAIL",
            )
        )
    titles = "kernel|configuration|dtype|cases pass|worst output|error|plain torch|allowed|"
    _print_table(titles.split("|"), rows)
    print()
    for reason in left_out:
        print(f"left out: {reason}")
    failed = [result for result in results if not result.passed]
    for result in failed[:SHOWN_FAILURES]:
        case, output = result.case, result.worst
        sizes = f"m={case.shape.m} n={case.shape.n} k={case.shape.k}"
        print(f"FAIL {case.name} {case.block} {case.dtype_name}, {sizes}, {case.variant}")
        error = f"error {output.ours:.2e}, plain torch {output.plain:.2e}" if output.name else ""
        print(f"     {output.name} {output.problem} {error}".rstrip())
    if len(failed) > SHOWN_FAILURES:
        print(f"... and {len(failed) - SHOWN_FAILURES} more; --json lists them all")
    passed, not_run = len(results) - len(failed), len(cases) - len(results)
    if not_run:
        print(f"{passed} of the {len(results)} cases that ran pass, {not_run} did not run")
    else:
        print(f"{passed} of {len(results)} cases pass")


def _result_record(result: Any) -> dict[str, Any]:
    case = result.case
    return {
        "kernel": case.name,
        "configuration": case.block,
        "dtype": case.dtype_name,
        "shape": case.shape._asdict(),
        "variant": case.variant,
        "passed": result.passed,
        "outputs": [
            {name: _finite(value) for name, value in output._asdict().items()}
            for output in result.outputs
        ],
    }


def _finite(value: Any) -> Any:
    """None for what JSON has no number for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _resources(options: argparse.Namespace) -> int:
    os.environ.pop("TRITON_INTERPRET", None)  # the worker processes shall compile
    tool = importlib.import_module("lora_kernels.resources")
    capability, sms = TARGETS[options.target]
    limit = tuning.shared_memory(capability)
    entries = tool.sweep(capability, sms, only=options.only, jobs=options.jobs)
    failed = [entry for entry in entries if entry.problem]
    if options.json:
        facts = {"target": options.target, "shared_limit": limit, **tool.versions(capability)}
        _print_json(facts, kernels=[_entry_record(entry) for entry in entries])
    else:
        found = ", ".join(f"{name} {fact}" for name, fact in tool.versions(capability).items())
        print(f"lora_kernels {__version__} for {options.target}, {found}\n")
        _print_resources(options.target, entries, limit, failed)
    return 1 if failed or not entries else 0


def _print_resources(target: str, entries: list[Any], limit: int, failed: list[Any]) -> None:
    rows = []
    for entry in entries:
        found: tuple[str, ...] = ("-", "-", "-", "-")
        if entry.resources is not None:
            registers, spilled, shared, cores = entry.resources
            counts = ", ".join(f"{count} {name}" for name, count in cores.items())
            found = str(registers), str(spilled), str(shared), counts or "-"
        verdict = "FAIL" if entry.problem else "warning" if entry.warning else "ok"
        rows.append((entry.kernel, entry.block, entry.dtype, entry.variant, *found, verdict))
    titles = f"kernel|configuration|dtype|with|registers|spilled|shared (of {limit})|tensor cores|"
    _print_table(titles.split("|"), rows)
    print()
    for entry in entries:
        text = f"{entry.kernel} {entry.block} {entry.dtype}, {entry.variant}"
        if entry.problem:
            print(f"FAIL {text}: {entry.problem.strip()[:500]}")
        elif entry.warning:
            print(f"warning {text}: {entry.warning}")
    print(f"{target}: {len(entries) - len(failed)} of {len(entries)} compiled kernels are fine")


def _entry_record(entry: Any) -> dict[str, Any]:
    resources = entry.resources
    return entry._asdict() | {"resources": None if resources is None else resources._asdict()}


def _print_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [titles, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(titles))]
    for line in lines:
        cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        print("  ".join(cells).rstrip())


def _print_json(facts: dict[str, Any], **found: Any) -> None:
    print(json.dumps({"lora_kernels": __version__, **facts, **found}, indent=1, allow_nan=False))


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    raise SystemExit(status)
