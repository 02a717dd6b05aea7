"""Everything that a GPU machine should be asked, in one run that stops in time.

``python benchmarks/gpu_run.py OUT --minutes 25`` from a checkout, installed or not, offline. In
order: a pack is adopted, if one is given; the environment, the check of every kernel, the first
figures, the GPU tests (those on large tensors first, by themselves, then the kernels'), the suites,
the tuner, all other GPU tests, the report. The stages that were asked for share the time by their
weights; what one does not use, the next ones have, and what runs over its share is stopped. Where
a run may take a few minutes only: ``--minutes 6.7 --pack PACK --stages adopt,environment,check,
first,large,tests``, and another time ``--stages adopt,first,linear,block``. In OUT:

- ``run.json``: the machine, and each stage's command, exit status and seconds, anew after each;
- ``run.log``: what the stages printed;
- ``check.jsonl`` and ``first.jsonl``: the check's cases and the first figures, as they came;
- ``benchmarks.json``: the suites' rows so far, as `python -m benchmarks.report` reads them;
- ``tuning.json`` and ``tuning.txt``: rows to paste into `lora_kernels.kernels.tuning`;
- ``report.md`` and its plots.

The exit status is 0 where every stage that ran succeeded.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
SUITES = ("linear", "block", "training", "files")


class Stage(NamedTuple):
    """A command and its weight when the time is shared out.

    Attributes:
        name: for `--stages` and run.json.
        command: its arguments, run in the repository's root.
        weight: of the time that is left, over the weights of all stages that are still to come:
            seconds that it should have, of the 25 minutes for everything.
        stops_itself: give it `--time-limit` a little before it would be stopped.
        ending: seconds that it may take to end after its own limit, beyond the usual.
    """

    name: str
    command: list[str]
    weight: float
    stops_itself: bool = False
    ending: float = 0.0


def stages(
    out: Path,
    scratch: Path,
    more: list[str],
    commit: str | None,
    jobs: int,
    pack: Path | None = None,
) -> list[Stage]:
    """All stages, in order; ``more`` are options for the suites."""
    python = [sys.executable, "-u"]
    # A warning of somebody else's new release must not end a run that cannot be had again soon.
    pytest = [*python, "-m", "pytest", "-p", "no:cacheprovider", "-W", "default"]
    stamped = ["--commit", commit] if commit else []
    tests = [*pytest, "-m", "gpu", "-v", "--continue-on-collection-errors"]
    # Most of the time goes into compiling, one kernel after the other in each process.
    spread = ["-n", str(jobs)] if importlib.util.find_spec("xdist") else []
    apart = [f"--ignore={LARGE}", f"--deselect={WHOLE_CHECK}"]
    listed = []
    if pack is not None:
        listed.append(
            Stage("adopt", [*python, "-m", "lora_kernels", "adopt", str(pack)], weight=15)
        )
    check = [*python, "-m", "lora_kernels", "check", "--jobs", str(jobs)]
    check += ["--out", str(out / "check.jsonl")]
    # What is in a pack need not be compiled ahead.
    first = [*python, "-m", "benchmarks.first", "--out", str(out / "first.jsonl")]
    first += ["--jobs", str(jobs if pack is None else 0), *stamped]
    others = [f"--ignore={folder}" for folder in KERNELS_TESTS]
    listed += [
        Stage("environment", [*python, "-c", _ENVIRONMENT, *stamped], weight=20),
        # It gives what runs at its limit 20 s more, in case a kernel never ends.
        Stage("check", check, 120, stops_itself=True, ending=20.0),
        Stage("first", first, 70 if pack is not None else 110, stops_itself=True),
        Stage("large", [*tests, LARGE], weight=90),
        Stage("tests", [*tests, *KERNELS_TESTS, *apart, *spread], weight=60),
    ]
    for suite, weight in zip(SUITES, (300, 150, 150, 60), strict=True):
        command = [*pytest, f"benchmarks/test_{suite}.py", "--benchmark-only", "-q", *stamped]
        command += [f"--benchmark-json={scratch / suite}.json", *more]
        command += [f"--journal={scratch / suite}.jsonl"]
        listed.append(Stage(suite, command, weight, stops_itself=True))
    tune = [*python, "-m", "benchmarks.tune", "--out", str(out / "tuning.json"), *stamped]
    listed.append(Stage("tune", [*tune, "--jobs", str(jobs)], weight=300))
    listed.append(Stage("others", [*tests, "tests", *others, *spread], weight=60))
    report = [*python, "-m", "benchmarks.report", str(out / "benchmarks.json"), "--out", str(out)]
    listed.append(Stage("report", report, weight=30))
    return listed


# Where the kernels' tests lie; of them, those that hold much of a GPU's memory, and the one that is
# a stage by itself.
KERNELS_TESTS = ("tests/kernels", "tests/linear", "tests/proof")
LARGE = "tests/linear/test_autograd_gpu.py"
WHOLE_CHECK = "tests/proof/test_check.py::test_everything_on_the_gpu"
# Run in a process of its own, so that a broken driver cannot take this one down.
_ENVIRONMENT = """
import json, sys
from benchmarks import machine
device = machine.best_device()
commit = sys.argv[2] if len(sys.argv) > 2 else None
print(json.dumps({**machine.stamp(device, commit), "ceilings": machine.ceilings(device)}))
"""
# What any stage may have, however small its share: to start takes a while.
LEAST_SECONDS = 30.0
# Between asking a stage to stop and killing it.
GRACE_SECONDS = 10.0
# Of a stage's time, what it is not told of: to start and to end in.
MARGIN = 0.15


def main(arguments: list[str] | None = None) -> int:
    """Run the stages; the exit status of the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for the results")
    parser.add_argument("--minutes", type=float, default=25.0, help="for everything (default 25)")
    parser.add_argument("--stages", help="only these, with commas between")
    parser.add_argument("--full", action="store_true", help="the suites' every problem")
    parser.add_argument("--seconds", type=float, help="of measuring each linear and block")
    parser.add_argument(
        "--pack", type=Path, help="kernels that `python -m lora_kernels pack` compiled for this GPU"
    )
    parser.add_argument("--commit", help="to stamp rows with, where git cannot tell")
    parser.add_argument(
        "--jobs", type=int, default=8, help="processes that test, check and compile"
    )
    options = parser.parse_args(arguments)
    options.out = options.out.resolve()  # the stages run in the repository's root
    if options.pack is not None:
        options.pack = options.pack.resolve()
        if not options.pack.is_file():
            parser.error(f"--pack: there is no file {options.pack}")
    deadline = time.monotonic() + 60 * options.minutes
    with tempfile.TemporaryDirectory() as scratch:
        more = ["--full"] * options.full
        more += [] if options.seconds is None else ["--seconds", str(options.seconds)]
        listed = stages(
            options.out, Path(scratch), more, options.commit, options.jobs, options.pack
        )
        known = [stage.name for stage in listed]
        wanted = options.stages.split(",") if options.stages else known
        unknown = [name for name in wanted if name not in known]
        if unknown == ["adopt"]:
            parser.error("stage adopt needs a pack: --pack FILE")
        if unknown:
            parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(known)}")
        options.out.mkdir(parents=True, exist_ok=True)
        return run([s for s in listed if s.name in wanted], options.out, Path(scratch), deadline)


def run(listed: list[Stage], out: Path, scratch: Path, deadline: float) -> int:
    """Run stages in order until the deadline (of `time.monotonic`); 0 if all went well."""
    done: dict[str, Any] = {"machine": None, "stages": []}
    (out / "run.log").write_text("", encoding="utf-8")
    for number, stage in enumerate(listed):
        limit = share([one.weight for one in listed[number:]], deadline - time.monotonic())
        record: dict[str, Any] = {"stage": stage.name, "command": _shown(stage.command)}
        done["stages"].append(record)
        if limit <= GRACE_SECONDS:
            record["status"] = "not run: out of time"
        else:
            record |= _run_stage(stage, out / "run.log", limit)
        if stage.name == "environment" and record.get("status") == 0:
            with contextlib.suppress(ValueError):  # a stray line of somebody's, after ours
                done["machine"] = json.loads(record["last_line"])
        record.pop("last_line", None)
        if stage.name in SUITES:
            merge(scratch, out / "benchmarks.json")
        if stage.name == "tune":
            _tuning_rows(out)
        (out / "run.json").write_text(json.dumps(done, indent=1), encoding="utf-8")
        print(f"{stage.name}: {record['status']} ({record.get('seconds', 0)} s)", flush=True)
    return 0 if all(record["status"] == 0 for record in done["stages"]) else 1


def share(weights: list[float], left: float) -> float:
    """Seconds of the first of some stages, by weight; at least `LEAST_SECONDS` while there are."""
    return min(left, max(weights[0] / sum(weights) * left, LEAST_SECONDS))


def _run_stage(stage: Stage, log: Path, limit: float) -> dict[str, Any]:
    command = list(stage.command)
    own = limit - min(3 * GRACE_SECONDS, MARGIN * limit) - stage.ending
    if stage.stops_itself:
        command.append(f"--time-limit={max(1.0, own):.0f}")
    if stage.name == "tune":
        command.append(f"--minutes={max(0.1, own / 60):.2f}")
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
    start = time.monotonic()
    with log.open("ab") as file:
        file.write(f"\n===== {stage.name}: {_shown(command)}\n".encode())
        file.flush()
        begin = file.tell()
        # A session of its own, so that a stage's children are stopped with it.
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        status: Any
        try:
            status = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:  # also where this process itself is being stopped
                _stop(process)
    with log.open("rb") as file:
        file.seek(begin)
        lines = file.read().decode(errors="replace").strip().splitlines()
    return {
        "status": status,
        "seconds": round(time.monotonic() - start, 1),
        "last_line": lines[-1] if lines else "",
    }


def _stop(process: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGINT, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
            process.wait(timeout=GRACE_SECONDS)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def merge(scratch: Path, target: Path) -> None:
    """One file of all the suites' JSON so far; nothing where there is none yet."""
    merged: dict[str, Any] = {}
    for suite in SUITES:
        try:
            text = json.loads((scratch / f"{suite}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):  # not run, or stopped before it wrote or while writing
            text = _from_journal(scratch / f"{suite}.jsonl")
            if not text["benchmarks"] and not text["missing"]:
                continue
        if not merged:
            merged = text
        else:
            merged["benchmarks"] += text["benchmarks"]
            merged["missing"] += text["missing"]
    for row in merged.get("benchmarks", ()):
        if isinstance(row, dict):
            row.pop("options", None)  # of pytest-benchmark's own timing, which is not used
    if merged:
        target.write_text(json.dumps(merged), encoding="utf-8")


def _from_journal(path: Path) -> dict[str, Any]:
    """The same of a suite that did not come to its end."""
    text: dict[str, Any] = {"benchmarks": [], "missing": [], "machine_info": {}}
    with contextlib.suppress(OSError, ValueError):  # not begun; or cut short within a line
        for line in path.read_text(encoding="utf-8").splitlines():
            for kind, value in json.loads(line).items():
                if kind == "machine_info":
                    text[kind] = value
                else:
                    text[kind].append(value)
    return text


def _tuning_rows(out: Path) -> None:
    """The tuner's part of the log, as a file of its own."""
    log = (out / "run.log").read_text(encoding="utf-8", errors="replace")
    rows = log.rpartition("===== tune: ")[2].partition("\n")[2]
    (out / "tuning.txt").write_text(rows, encoding="utf-8")


def _shown(command: list[str]) -> str:
    """A command as it could be typed in the repository's root, without a program's text."""
    words = ["…" if "\n" in word else word for word in ["python", *command[1:]]]
    return " ".join(words).replace(f"{ROOT}{os.sep}", "")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and not without stopping the stage
    raise SystemExit(main())
