from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import measure, tune
from lora_kernels.kernels.tuning import KERNELS, Config, Row, Shape, lookup
from lora_kernels.proof.cases import Case
from lora_kernels.proof.workers import Lost

CPU = torch.device("cpu")
SHAPE = Shape(32, 32, 32, 4)
HOPPER = (9, 0)
interpreted = pytest.mark.interpreted


def search(kernel, configs, dtype=torch.float16, refused=(), device=CPU):
    """`tune` of the present config and some others."""
    present = lookup(kernel, HOPPER, dtype.itemsize, SHAPE)
    cases = [Case(kernel, config, dtype, SHAPE) for config in dict.fromkeys((present, *configs))]
    left_out = {case: "not compiled in time" for case in cases if case.config in refused}
    return tune.tune(cases, device, 0.0, left_out)


@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_launched_and_judged(kernel):
    found = search(kernel, [Config(16, 32, 32, 4, 2)])
    assert not found.failed
    assert found.kernel == kernel and found.tried == 2 and found.gain > 0 and found.seconds > 0


@pytest.fixture
def stand_in(monkeypatch):
    """Put a function in the place of xa's launcher."""

    def put(function):
        def launcher(x, lora_a, seed, p, *, config):
            return function(x @ lora_a.t(), config), None

        monkeypatch.setattr("lora_kernels.proof.cases.xa.compute_xa", launcher)

    return put


def test_wrong_and_broken_candidates_are_left_out(stand_in):
    def strange(xa, config):
        if config.block_m == 64:
            raise RuntimeError("does not fit\nat all")
        return xa * 1.1 if config.block_m == 128 else xa

    stand_in(strange)
    found = search("xa", [Config(m, 0, 32, 4, 2) for m in (16, 64, 128)], torch.float32)
    wrong, broken = sorted(found.failed, key=lambda text: "RuntimeError" in text)
    assert "block_m=128" in wrong and "WRONG: xa: xa is off by" in wrong
    assert "block_m=64" in broken and "does not fit" in broken
    assert found.config.block_m in (16, lookup("xa", HOPPER, 4, SHAPE).block_m)


def test_the_faster_candidate_wins(stand_in):
    def slow_unless_32(xa, config):
        time.sleep(0.0 if config.block_m == 32 else 0.01)
        return xa

    stand_in(slow_unless_32)
    assert lookup("xa", HOPPER, 2, SHAPE).block_m != 32
    found = search("xa", [Config(m, 0, 32, 4, 2) for m in (16, 32, 64)])
    assert found.config.block_m == 32 and found.gain > 2 and found.tried == 4


def test_what_is_not_compiled_is_not_launched(stand_in):
    launched = []
    stand_in(lambda xa, config: launched.append(config) or xa)
    present, other = lookup("xa", HOPPER, 2, SHAPE), Config(32, 0, 32, 4, 2)
    found = search("xa", [other], refused=[present])
    assert set(launched) == {other} and found.config == other and found.gain is None
    assert found.failed == [f"{present}: not compiled in time"]
    assert "before, none ran" in tune.row(found, HOPPER, 2)
    with pytest.raises(RuntimeError, match="none of 2 candidates works; .*not compiled in time"):
        search("xa", [other], refused=[present, other])


def test_what_no_graph_can_hold_has_failed(stand_in, monkeypatch):
    def to_time(bench, device):
        if bench.case.config.block_m == 32:
            raise RuntimeError("operation not permitted when stream is capturing")
        bench.per_call = lambda samples: [1e3 + sample for sample in samples]
        return bench

    stand_in(lambda xa, config: xa)
    monkeypatch.setattr(tune, "to_time", to_time)
    found = search("xa", [Config(32, 0, 32, 4, 2)])
    assert len(found.failed) == 1 and "not permitted when stream is capturing" in found.failed[0]
    assert found.config.block_m != 32 and found.seconds > 1e3  # as the graph counts


@pytest.mark.parametrize(
    ("sets", "once", "repeats"),
    [(2, 2e-5, 20), (7, 2e-5, 21), (20, 2e-5, 20), (2, 5e-4, 8), (3, 1e-3, 3), (2, 2e-2, 2)],
)
def test_a_replay_takes_whole_turns_and_not_too_long(sets, once, repeats, monkeypatch):
    monkeypatch.setattr(measure, "interleave", lambda calls, *_: {"": [once] * 3})
    monkeypatch.setattr(measure, "GraphCall", lambda bench, repeats: (bench, repeats))
    bench = tune.Bench(Case("xa", Config(), torch.float16, SHAPE), [{}] * sets)
    assert tune.to_time(bench, torch.device("cuda")) == (bench, repeats)
    assert tune.to_time(bench, CPU) is bench


def test_operands_rotate_and_exceed_the_cache_twice(monkeypatch, stand_in):
    case = Case("dxa_db", Config(), torch.float16, SHAPE)
    operands = case.operands(CPU)
    size = sum(operands[name].nbytes for name in ("dy", "b", "xa"))  # x and weight are not read
    for cache in (0.0, 2.2 * size, 1e3 * size):
        monkeypatch.setattr(tune.machine, "cache_bytes", lambda device, cache=cache: cache)
        ring = tune.rotated("dxa_db", operands, CPU)
        assert len(ring) == min(max(2, math.ceil(2 * cache / size)), 20)
        assert {tuple(one) for one in ring} == {("dy", "b", "xa")}
        assert len({one["dy"].data_ptr() for one in ring}) == len(ring)
    read = []
    monkeypatch.setattr(Case, "run", lambda case, t: read.append(t["dy"].data_ptr()))
    bench = tune.Bench(case, ring[:3])
    for _ in range(6):
        bench.prepare()
        bench.run()
    assert len(set(read)) == 3 and read[:3] == read[3:]


def test_transposed_operands_stay_so():
    operands = Case("gemm", Config(), torch.float16, SHAPE).operands(CPU)
    for one in tune.rotated("gemm", operands, CPU):
        assert {n: t.stride() for n, t in one.items()} == {
            n: t.stride() for n, t in operands.items()
        }


def test_no_row_no_tuning():
    assert tune.listed("hopper", SHAPE, torch.float16, (8, 0)) == []
    cases = tune.listed("hopper", SHAPE, torch.float16, HOPPER)
    assert cases[0].config == lookup("hopper", HOPPER, 2, SHAPE)
    assert len(cases) == len(set(cases)) > 20


def test_rows_can_be_pasted():
    config = Config(1, 2, 3, 4, 5, 6, 7)
    result = tune.Result("gemm", Shape(8, 4, 2, 1), config, 1.25, 1e-3, 9, [])
    text = tune.row(result, HOPPER, 2)
    pasted = eval(text.partition(",  #")[0], {"Row": Row, "Config": Config})
    assert pasted == Row(HOPPER, "gemm", 2, config, m=8, n=4, k=2, r=1)
    assert "1.25 times as fast" in text


COMPILE = """
import json, sys, torch
from pathlib import Path
from benchmarks import tune
from lora_kernels.kernels import Config, Shape
from lora_kernels.proof import Case

def cases(config):
    shapes = Shape(8192, 4096, 4096, 16), Shape(1024, 512, 2048, 16), Shape(8192, 4096, 4096, 64)
    return [Case("expand", config, torch.bfloat16, shape) for shape in shapes]

if __name__ == "__main__":
    fits, never = cases(Config(32, 128, 0, 4, 1)), cases(Config(32, 100, 0, 4, 1))
    refused = tune.compile_all([*fits, never[0]], (9, 0), 132, 2, 300.0)
    built = len(list(Path(sys.argv[1]).rglob("*.cubin")))
    # What a launch does with real operands, up to the launch itself, has all it needs.
    tune._on_meta = lambda kernel, dtype, shape: fits[1].operands(torch.device("cpu"))
    tune.compile_case((fits[1], (9, 0), 132))
    again = len(list(Path(sys.argv[1]).rglob("*.cubin")))
    print(json.dumps([built, again, [case == never[0] for case in refused], *refused.values()]))
"""


@pytest.mark.slow
def test_equal_kernels_are_compiled_once_and_found_again(tmp_path):
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    script.write_text(COMPILE, encoding="utf-8")
    root = str(Path(tune.__file__).parent.parent)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    environment["PYTHONPATH"] = root
    ran = subprocess.run(
        [sys.executable, str(script), str(cache)], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    built, again, refused, reason = json.loads(ran.stdout.splitlines()[-1])
    assert built == again == 2  # rank 64 has a tile of its own
    assert refused == [True] and reason.startswith("not compiled: ")


def test_compiling_stops_in_time(monkeypatch, capsys):
    def spread(function, tasks, jobs, preload):
        assert [task[0] for task in tasks] == [cases[0], *cases[2:]] and jobs == 3
        yield 2, None
        yield 0, None
        yield 1, Lost("SystemError: no such instruction\nand more")
        time.sleep(60)

    cases = [
        Case("xa", Config(m), torch.float16, shape)
        for m, shape in ((1, SHAPE), (1, Shape(64, 32, 32, 4)), (2, SHAPE), (3, SHAPE), (4, SHAPE))
    ]
    monkeypatch.setattr(tune, "spread", spread)
    kernel = "{0.config.block_m}".format
    monkeypatch.setattr(
        tune, "_launches", lambda case, sms: [SimpleNamespace(options=kernel(case))]
    )
    monkeypatch.setattr(tune, "source_of", lambda launch: SimpleNamespace(hash=lambda: "same"))
    start = time.monotonic()
    refused = tune.compile_all(cases, HOPPER, 4, 3, 0.5)
    assert 0.4 < time.monotonic() - start < 5
    assert refused == {
        cases[2]: "not compiled: SystemError: no such instruction",
        cases[4]: "not compiled in time",
    }
    assert "compiling: out of time" in capsys.readouterr().out


def test_time_is_up_even_if_it_is_not_heard_at_once(capsys):
    heard, start = [], time.monotonic()
    with tune.at_most(0.1, "work"):
        try:
            time.sleep(30)
        except BaseException as error:  # as a destructor does
            heard.append(error)
        while True:
            try:
                time.sleep(30)
            except Exception as error:
                heard.append(error)
    assert len(heard) == 1 and time.monotonic() - start < 10
    assert "work: out of time" in capsys.readouterr().out
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    with tune.at_most(60, "nothing"):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


@pytest.mark.slow
def test_a_process_knows_its_age():
    code = (
        "import time; time.sleep(0.7); from benchmarks import tune; print(tune.process_seconds())"
    )
    start = time.monotonic()
    root = Path(tune.__file__).parent.parent
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert 0.7 < float(ran.stdout) < time.monotonic() - start + 0.1, ran.stderr


@pytest.fixture
def gpu(monkeypatch):
    """As much of a GPU as `main` asks for, in a process that is 10 s old."""
    cuda = SimpleNamespace(
        is_available=lambda: True,
        get_device_capability=lambda device: HOPPER,
        get_device_properties=lambda device: SimpleNamespace(multi_processor_count=132),
    )
    asked = SimpleNamespace(compiled=None, killed=None, refused={})

    def compile_all(cases, capability, sms, jobs, seconds):
        asked.compiled = cases, seconds
        return asked.refused

    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(tune.machine, "stamp", lambda device, commit: {"commit": commit})
    monkeypatch.setattr(tune, "process_seconds", lambda: 10.0)
    monkeypatch.setattr(tune, "compile_all", compile_all)
    monkeypatch.setattr(
        tune.faulthandler,
        "dump_traceback_later",
        lambda seconds, exit: setattr(asked, "killed", seconds),
    )
    return asked


def test_results_are_there_as_they_come(gpu, monkeypatch, tmp_path, capsys):
    path, seen = tmp_path / "tuning.json", []

    def tuned(cases, device, seconds, refused):
        seen.append(len(json.loads(path.read_text())["results"]) if path.exists() else 0)
        assert refused is gpu.refused
        if len(seen) == 2:
            raise RuntimeError("none of 9 candidates works")
        if len(seen) == 4:
            raise KeyboardInterrupt
        return tune.Result("xa", cases[0].shape, cases[0].config, 1.5, 1e-5, 9, [])

    monkeypatch.setattr(tune, "tune", tuned)
    arguments = ["--kernel", "xa", "--kernel", "da", "--out", str(path), "--commit", "abc"]
    with pytest.raises(KeyboardInterrupt):
        tune.main([*arguments, "--minutes", "4"])
    assert seen == [0, 1, 1, 2]
    written = json.loads(path.read_text())
    assert written["commit"] == "abc"
    assert [one["shape"]["m"] for one in written["results"]] == [8192, 1024]
    printed = capsys.readouterr().out
    assert "da at (8192, 4096, 4096, 16): none of 9 candidates works" in printed
    assert printed.count("1.50 times as fast") == 2
    cases, seconds = gpu.compiled
    assert len(cases) > 600 and seconds == pytest.approx((240 - 10 - 5) / 3, abs=1.0)
    assert gpu.killed == pytest.approx(229)


def test_it_ends_in_time(gpu, monkeypatch, capsys):
    monkeypatch.setattr(tune, "tune", lambda *_: time.sleep(60))
    start = time.monotonic()
    assert tune.main(["--minutes", f"{15.5 / 60}"]) == 0
    assert 0.3 < time.monotonic() - start < 5
    assert "tuning: out of time" in capsys.readouterr().out


def test_a_stop_while_writing_leaves_the_file_before(monkeypatch, tmp_path):
    path = tmp_path / "tuning.json"
    tune.write([], path, {"commit": "abc"})

    def stopped(self, text, encoding):
        with open(self, "w", encoding=encoding) as file:
            file.write(text[:10])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        tune.write([], path, {"commit": "xyz"})
    assert json.loads(path.read_text()) == {"commit": "abc", "results": []}


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main(["--minutes", "1"]) == 1
    assert "no CUDA GPU" in capsys.readouterr().out


@pytest.mark.gpu
def test_graphs_of_small_kernels_on_a_gpu():
    shape, dtype, device = Shape(1024, 512, 512, 16), torch.bfloat16, torch.device("cuda")
    capability = torch.cuda.get_device_capability()
    for kernel in ("xa", "expand", "da"):
        cases = tune.listed(kernel, shape, dtype, capability)[:3]
        found = tune.tune(cases, device, 0.0, {})
        assert not found.failed and 1e-6 < found.seconds < 30e-6, found
