"""``python -m lora_kernels``: check this machine's kernels, list what kernels take of a GPU."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from . import __version__, tuning

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
exit status: 0 if everything passed, 1 if something failed, 2 for a mistake on the command line.
If a kernel fails on your GPU, take the plain path, `with lora_kernels.use_backend("reference"):`,
and report what `--json` prints.

examples:
  python -m lora_kernels check                  everything; some minutes, most of them compiling
  python -m lora_kernels check --quick          fewer cases, no float16
  python -m lora_kernels check --only hopper    one kernel"""

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
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
    if not torch.cuda.is_available():
        # Read by Triton when it is imported, which the worker processes do anew.
        os.environ["TRITON_INTERPRET"] = "1"
    tool = importlib.import_module("lora_kernels.check")
    facts = tool.machine()
    if not options.json:
        print(f"lora_kernels {__version__} on {facts['device']}")
        versions = (f"{name} {fact}" for name, fact in facts.items() if name != "device")
        print(", ".join(versions), end="\n\n", flush=True)
    results, left_out = tool.check(quick=options.quick, only=options.only, jobs=options.jobs)
    failed = [result for result in results if not result.passed]
    if options.json:
        _print_json(facts, results=[_result_record(result) for result in results])
    else:
        _print_check(results, left_out, failed)
    return 1 if failed or not results else 0


def _print_check(results: list[Any], left_out: list[str], failed: list[Any]) -> None:
    groups: dict[tuple[str, str, str], list[Any]] = {}
    for result in results:
        case = result.case
        groups.setdefault((case.name, case.block, case.dtype_name), []).append(result)
    rows: list[Sequence[str]] = []
    for key, group in sorted(groups.items(), key=lambda item: -max(r.strain for r in item[1])):
        worst = max(group, key=lambda result: result.strain)
        passed = sum(result.passed for result in group)
        output = worst.worst
        rows.append(
            (
                *key,
                f"{passed} of {len(group)}",
                output.name,
                f"{output.ours:.2e}",
                f"{output.plain:.2e}",
                f"{output.budget:.2e}",
                "pass" if passed == len(group) else "FAIL",
            )
        )
    titles = "kernel|configuration|dtype|cases pass|worst output|error|plain torch|allowed|"
    _print_table(titles.split("|"), rows)
    print()
    for reason in left_out:
        print(f"left out: {reason}")
    for result in failed[:SHOWN_FAILURES]:
        case, output = result.case, result.worst
        sizes = f"m={case.shape.m} n={case.shape.n} k={case.shape.k}"
        print(f"FAIL {case.name} {case.block} {case.dtype_name}, {sizes}, {case.variant}")
        error = f"error {output.ours:.2e}, plain torch {output.plain:.2e}" if output.name else ""
        print(f"     {output.name} {output.problem} {error}".rstrip())
    if len(failed) > SHOWN_FAILURES:
        print(f"... and {len(failed) - SHOWN_FAILURES} more; --json lists them all")
    print(f"{len(results) - len(failed)} of {len(results)} cases pass")


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


def _print_json(facts: dict[str, Any], **lists: Any) -> None:
    print(json.dumps({"lora_kernels": __version__, **facts, **lists}, indent=1, allow_nan=False))


if __name__ == "__main__":
    raise SystemExit(main())
