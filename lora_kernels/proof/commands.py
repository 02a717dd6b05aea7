"""What `python -m lora_kernels` runs and prints.

Triton is imported by what these functions call and not before: it reads when it is imported
whether to interpret, and may be absent.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any, TextIO

import torch

from ..kernels import tuning
from .packs import PackError

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


def run_check(options: argparse.Namespace, version: str) -> int:
    """Check the kernels of this machine as ``options`` of the command say; the exit status.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after what has been found until then is printed.
    """
    limit = options.time_limit
    deadline = None if limit is None else time.monotonic() + limit
    if not torch.cuda.is_available():
        # Read by Triton when it is imported, which the worker processes do anew.
        os.environ["TRITON_INTERPRET"] = "1"
    tool = importlib.import_module(".check", __package__)
    try:  # before the minutes that it is for
        out = options.out.open("a", encoding="utf-8") if options.out else nullcontext()
    except OSError as error:
        print(f"--out: cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    facts = {"lora_kernels": version, **tool.machine()}
    if not options.json:
        print(f"lora_kernels {version} on {facts['device']}")
        shown = (name for name in facts if name not in ("lora_kernels", "device"))
        versions = (f"{name} {facts[name]}" for name in shown)
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
    record = {**facts, **_result_record(result)}
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


def run_resources(options: argparse.Namespace, version: str) -> int:
    """Compile the kernels for a GPU as ``options`` of the command say; the exit status."""
    os.environ.pop("TRITON_INTERPRET", None)  # the worker processes shall compile
    tool = importlib.import_module(".resources", __package__)
    capability, sms = TARGETS[options.target]
    limit = tuning.shared_memory(capability)
    entries = tool.sweep(capability, sms, only=options.only, jobs=options.jobs)
    failed = [entry for entry in entries if entry.problem]
    if options.json:
        facts = {"lora_kernels": version, "target": options.target, "shared_limit": limit}
        facts |= tool.versions(capability)
        _print_json(facts, kernels=[_entry_record(entry) for entry in entries])
    else:
        found = ", ".join(f"{name} {fact}" for name, fact in tool.versions(capability).items())
        print(f"lora_kernels {version} for {options.target}, {found}\n")
        _print_resources(options.target, entries, limit, failed)
    return 1 if failed or not entries else 0


def run_pack(options: argparse.Namespace, version: str) -> int:
    """Compile for a GPU and pack as ``options`` of the command say; the exit status."""
    os.environ.pop("TRITON_INTERPRET", None)  # the worker processes shall compile
    folder = options.out.parent  # looked at before the minutes that it is for
    if options.out.is_dir() or not (folder.is_dir() and os.access(folder, os.W_OK)):
        print(f"{options.out} is not a file that can be written", file=sys.stderr)
        return 2
    tool = importlib.import_module(".packing", __package__)
    capability, sms = TARGETS[options.target]
    try:
        made = tool.pack(options.out, capability, sms, jobs=options.jobs)
    except OSError as error:
        print(f"cannot write to {options.out}: {error.strerror}", file=sys.stderr)
        return 2
    for failure in made.failed[:SHOWN_FAILURES]:
        print(f"FAIL {failure}")
    if len(made.failed) > SHOWN_FAILURES:
        print(f"... and {len(made.failed) - SHOWN_FAILURES} more")
    size = f"{made.size / 1e6:.1f} MB"
    print(f"{made.kernels} kernels for {options.target} packed into {options.out}, {size}")
    return 1 if made.failed or not made.kernels else 0


def run_adopt(options: argparse.Namespace, version: str) -> int:
    """Put a pack into Triton's cache as ``options`` of the command say; the exit status."""
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels have no place in a cache
    tool = importlib.import_module(".packing", __package__)
    try:
        found = tool.adopt(options.pack)
    except (PackError, OSError) as error:
        print(f"nothing adopted: {error}", file=sys.stderr)
        return 2
    for difference in found.differs[:SHOWN_FAILURES]:
        print(f"{difference}: compiled here as ever", file=sys.stderr)
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if here is not None and f"sm_{here[0]}{here[1]}" != found.target:
        print(f"this GPU is sm_{here[0]}{here[1]}, the pack is for {found.target}", file=sys.stderr)
    print(f"{found.fresh} kernels for {found.target} adopted, {found.present} were there already")
    return 0 if found.fresh or found.present else 1


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
    print(json.dumps({**facts, **found}, indent=1, allow_nan=False))
