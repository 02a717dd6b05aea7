"""The plan of the first figures: its rows, its limits, what fails; on a CPU, without a figure."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import time

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import stub_process
import torch

from benchmarks import first, stub_driver
from benchmarks.contenders import FLOOR, OURS
from benchmarks.first import Bench, GpuLost, Part
from benchmarks.gate import GateError
from benchmarks.shapes import Problem
from benchmarks.stage import Outcome

pytestmark = pytest.mark.skipif(os.name == "nt", reason="parts are cut short by POSIX signals")
CPU = torch.device("cpu")
PROBLEM = Problem("llama-3-8b", 32, 24, 40, 4)


@pytest.fixture
def bench():
    ceilings = {"bandwidth": 4e12, "flops": {"bfloat16": 8e14, "float32": 1e14}}
    return Bench(CPU, (9, 0), 132, ("call",), seconds=0.0, ceilings=ceilings)


def run(listed, seconds=60.0, **more):
    written = []
    rows = first.run(listed, written.append, time.monotonic() + seconds, **more)
    assert rows == written
    return rows


def rows_of(*rows):
    return lambda: iter(rows)


A_ROW = {"kind": "host", "name": "x", "microseconds": 1.0}


def test_each_part_has_its_share_of_what_is_left(monkeypatch):
    now, limits = [100.0], []

    @contextlib.contextmanager
    def at_most(seconds, what):
        limits.append((what, seconds))
        yield

    def taking(seconds):
        def rows():
            now[0] += seconds
            yield A_ROW

        return rows

    monkeypatch.setattr(first, "at_most", at_most)
    listed = [Part("a", 1, taking(2)), Part("b", 3, taking(0)), Part("c", 1, taking(99))]
    listed.append(Part("d", 1, taking(0)))
    rows = first.run(listed, lambda row: None, 160.0, clock=lambda: now[0])
    assert limits == [("a", 10.0), ("b", 58 * 3 / 5), ("c", 29.0)]
    ends = {row["part"]: row for row in rows if row["kind"] == "part"}
    assert ends["a"] == {"kind": "part", "part": "a", "took": 2.0}
    assert ends["d"]["error"] == "not run: out of time"


def test_a_part_that_takes_too_long_keeps_its_rows_and_the_rest_goes_on():
    def endless():
        yield A_ROW
        time.sleep(30)
        yield A_ROW

    start = time.monotonic()
    rows = run([Part("slow", 1, endless), Part("next", 1, rows_of(A_ROW))], seconds=1.0)
    assert time.monotonic() - start < 5
    assert [(row["part"], row["kind"]) for row in rows] == [
        ("slow", "host"),
        ("slow", "part"),
        ("next", "host"),
        ("next", "part"),
    ]
    assert rows[1]["error"] == "out of time after 0.5 s" and "error" not in rows[3]


def test_a_part_that_fails_is_a_row_and_the_rest_goes_on():
    def broken():
        yield A_ROW
        raise ValueError("no\nsuch thing")

    rows = run([Part("broken", 1, broken), Part("next", 1, rows_of(A_ROW))])
    assert [row.get("error") for row in rows] == [None, "ValueError: ['no']", None, None]


@pytest.mark.parametrize(
    "loss", [GpuLost("ours: hopper"), RuntimeError("CUDA error: an illegal memory access")]
)
def test_on_a_lost_gpu_nothing_more_is_tried(loss):
    def broken():
        yield A_ROW
        raise loss

    rows = run([Part("broken", 1, broken), Part("next", 1, rows_of(A_ROW))])
    assert [row["kind"] for row in rows] == ["host", "part", "part"]
    assert rows[2]["error"].startswith("not run: the GPU was lost to broken")


def test_verdicts_come_last_as_rows():
    rows = [
        {
            "kind": "layer",
            "problem": "P",
            "name": name,
            "direction": "forward",
            "timing": "graph",
            "seconds": seconds,
            "p20": seconds,
            "p80": seconds,
            **({"table": {"forward": "hopper", "dx": "hopper"}} if name == OURS else {}),
        }
        for name, seconds in ((OURS, 2.0), ("ours: hopper", 2.0), ("ours: beta1", 1.0))
    ]
    last = run([Part("layers", 1, rows_of(*rows))])[-1]
    assert last["kind"] == "verdict" and last["gain"] == 2.0


@pytest.fixture
def timed(monkeypatch):
    """Put times by name in place of measured ones; everything is still built, checked and run."""

    def put(times, seen=None):
        def interleave(calls, device, seconds, least_rounds, warmup_rounds):
            for call in calls.values():
                call.prepare()
                with call.context():
                    call.run()
            if seen is not None:
                seen.append((list(calls), seconds, least_rounds))
            return {name: [times.get(name, 1e-3) * f for f in (1, 2, 3)] for name in calls}

        monkeypatch.setattr(first.measure, "interleave", interleave)
        monkeypatch.setattr(first.measure, "peak_bytes", lambda call, device: 0)

    return put


@pytest.mark.interpreted
def test_layers_are_held_against_the_frozen_linear_of_the_same_rounds(bench, timed):
    seen = []
    timed({FLOOR: 2e-3, OURS: 3e-3, "ours: fused": 5e-3}, seen)
    rows = list(first.layers(bench, PROBLEM))
    assert [(row["direction"], row["timing"]) for row in rows[:: len(first.LAYERS)]] == [
        ("both", "call"),
        ("forward", "call"),
    ]
    assert seen == [(list(first.LAYERS), 0.0, first.LEAST_ROUNDS)] * 2
    by_name = {row["name"]: row for row in rows if row["direction"] == "both"}
    assert tuple(by_name) == first.LAYERS
    assert by_name[OURS]["ratio"] == 1.5 and by_name["ours: fused"]["ratio"] == 2.5
    assert by_name[OURS]["seconds"] == 6e-3 and by_name[OURS]["rounds"] == 3
    assert by_name[OURS]["table"] == {"forward": "aten", "dx": "aten"}
    assert by_name[OURS]["problem"] == "llama-3-8b 24→40, M 32, p 0"
    assert not any("error" in row or "left_out" in row for row in rows)


@pytest.mark.interpreted
def test_who_fails_is_a_row_and_the_others_are_timed(bench, timed, monkeypatch):
    timed({})
    build, check = first.build, first.Gate.check

    def breaks(name, problem, device):
        if name == "ours: fused":
            raise RuntimeError("out of resources\nshared memory")
        return build(name, problem, device)

    def wrong(gate, step):
        if step.name == "ours: beta1":
            raise GateError("beta1: y is off")
        check(gate, step)

    monkeypatch.setattr(first, "build", breaks)
    monkeypatch.setattr(first.Gate, "check", wrong)
    rows = list(first.layers(bench, PROBLEM._replace(dropout=0.1)))
    assert len(rows) == 2 * len(first.LAYERS)
    by_name = {row["name"]: row for row in rows}
    assert by_name["ours: fused"]["error"] == "shared memory"
    assert by_name["ours: beta1"]["error"] == "WRONG: beta1: y is off"
    assert "takes no dropout" in by_name["ours: aten"]["left_out"]
    timed_ones = {name for name, row in by_name.items() if "seconds" in row}
    assert timed_ones == {FLOOR, OURS, "ours: one_kernel", "ours: hopper"}


def test_a_broken_gpu_is_told_after_its_rows(bench, monkeypatch):
    lost = Outcome(broken="Traceback\nRuntimeError: CUDA error: misaligned address")
    monkeypatch.setattr(first, "build", lambda *_: None)
    monkeypatch.setattr(
        first, "measure_together", lambda names, *_, **__: dict.fromkeys(names, lost)
    )
    rows = first.layers(bench, PROBLEM)
    taken = [next(rows) for _ in first.LAYERS]
    assert taken[-1]["error"] == "RuntimeError: CUDA error: misaligned address"
    with pytest.raises(GpuLost, match="frozen"):
        next(rows)


@pytest.mark.interpreted
def test_pieces_have_rates_and_shares_of_the_ceilings(bench, timed):
    # Three rounds of one, two and three times as long: the median is twice.
    timed({"y by torch": 1e-9, "xa": 1e-9})
    rows = {row["name"]: row for row in first.parts_of(bench, PROBLEM)}
    torchs, xa = rows["y by torch"], rows["xa"]
    assert torchs["tflops"] == round(2 * 32 * 24 * 40 / 2e-9 / 1e12, 3)
    assert torchs["share"] == round(2 * 32 * 24 * 40 / 2e-9 / 8e14, 3)
    assert xa["tbps"] == round((2 * (32 * 24 + 32 * 4) + 4 * 4 * 24) / 2e-9 / 1e12, 3)
    assert xa["share"] == round(xa["tbps"] / 4, 3)
    assert "tflops" not in xa and xa["block"].startswith("xa ")


def test_graphs_hold_whole_turns_and_do_not_last(bench):
    small = Problem("minimind", 4096, 512, 128)
    large = Problem("llama-3-8b", 8192, 4096, 14336)
    assert bench.repeats(small, "call", 14, "both") == 0
    assert bench.repeats(small, "graph", 3, "both") == 21
    assert bench.repeats(small, "graph", 64, "both") == 64
    assert bench.repeats(large, "graph", 2, "both") == 2
    once = 2 * 8192 * 4096 * 1024 / 8e14
    sets = bench.repeats(large._replace(n=1024), "graph", 2, "forward")
    assert sets == 20 or sets * once <= first.REPLAY_SECONDS + 2 * once


def test_host_costs_fail_one_by_one(monkeypatch):
    def broken():
        raise RuntimeError("no")

    costs = [("a", lambda: 12.34), ("b", broken), ("c", lambda: 5.0)]
    monkeypatch.setattr(first.host, "measurements", lambda rounds: iter(costs))
    assert [row.get("microseconds") for row in first.on_host()] == [12.3, None, 5.0]


def test_the_plan(bench):
    wanted = first.problems()
    assert len(wanted) == len(set(wanted)) == 16
    assert [(p.k, p.n) for p in wanted[:4]] == [
        (4096, 4096),
        (4096, 1024),
        (4096, 14336),
        (14336, 4096),
    ]
    assert {(p.m, p.rank, p.dtype, p.direction) for p in wanted[:8]} == {
        (8192, 16, "bfloat16", "both")
    }
    assert [p.dropout for p in wanted] == [0.0] * 4 + [0.1] * 4 + [0.0] * 4 + [0.1] * 4
    names = [part.name for part in first.parts(bench, wanted, jobs=0)]
    assert names[0] == "ceilings" and len(names) == len(set(names)) == 2 + 2 * 16
    assert names.index("host") < names.index("layers, minimind 512→512, M 4096, p 0.1")
    assert first.parts(bench, wanted, jobs=3)[0].name == "compile"


def test_rows_are_lines_that_outlast_the_process(tmp_path):
    with (tmp_path / "first.jsonl").open("w", encoding="utf-8") as file:
        write = first.writer(file)
        write({"kind": "layer", "problem": "4096→14336", "gain": math.inf})
        # Before the file is closed.
        text = (tmp_path / "first.jsonl").read_text(encoding="utf-8")
    assert json.loads(text) == {"kind": "layer", "problem": "4096→14336", "gain": None}
    assert first.writer(io.StringIO())({"a": 1}) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    assert first.main(["--out", str(tmp_path / "first.jsonl")]) == 1
    assert capsys.readouterr().out == "there is no CUDA GPU here to measure\n"
    assert not (tmp_path / "first.jsonl").exists()


# Prints how many kernels are compiled ahead, and which ones all the same when they are launched.
AHEAD = """
import json, tempfile, torch
from pathlib import Path
from triton import knobs
from benchmarks import first, host
from benchmarks.shapes import Problem

bench = first.Bench(torch.device("cpu"), (9, 0), 132, ("call",), 0.0)
if __name__ == "__main__":
    cubins = lambda: set(Path(knobs.cache.dir).rglob("*.cubin"))
    wanted = [Problem("llama-3-8b", 256, 128, 128, dropout=p) for p in (0.0, 0.1)]
    failed = list(first.compiled(bench, wanted, 2))
    ahead = cubins()
    with tempfile.TemporaryDirectory() as folder:
        host.use_stub(folder)
        first.Gate.check = lambda *_: None
        first.LAYERS, first.LEAST_ROUNDS = first.LAYERS[:-1], 1  # but aten, which has no kernel
        first.measure.peak_bytes = lambda *_: 0
        for problem in wanted:
            for make in (first.layers, first.parts_of):
                failed += [row for row in make(bench, problem) if "seconds" not in row]
    late = [path.stem for path in cubins() - ahead]
    print(json.dumps({"ahead": len(ahead), "late": late, "failed": failed}))
"""


@pytest.mark.slow
@pytest.mark.skipif(bool(stub_driver.missing()), reason=stub_driver.missing())
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is launched on the stub")
def test_all_that_is_launched_was_compiled_ahead(tmp_path):
    (tmp_path / "ahead.py").write_text(AHEAD, encoding="utf-8")
    status, found = stub_process.run_python(tmp_path / "cache", str(tmp_path / "ahead.py"))
    assert status == 0 and found["ahead"] >= 10
    assert found["late"] == [] and found["failed"] == []
