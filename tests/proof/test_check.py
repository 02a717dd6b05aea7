"""`python -m lora_kernels check` passes what is right and notices each thing that can be wrong."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels import __main__ as command
from lora_kernels.kernels import tuning
from lora_kernels.kernels.tuning import Config, Shape
from lora_kernels.proof import cases, check
from lora_kernels.proof.cases import Case, LayerCase
from lora_kernels.proof.check import Output, Result, run_case
from lora_kernels.proof.workers import Lost

CASE = Case("gemm", Config(16, 16, 16), torch.float32, Shape(20, 19, 17, 3), bias=True)
LAYER = LayerCase("fused", "fused", (9, 0), torch.float16, Shape(9, 8, 16, 4), True, 0.3)


def problems(case):
    return {output.name: output.problem for output in run_case(case)}


def test_every_kernel_of_the_table_in_every_dtype():
    found = check.kernel_cases((9, 0), check.ON_GPU, quick=False, tf32=True)
    kinds = {(case.name, case.dtype_name) for case in found}
    products = [f"{kernel} {role}" for kernel in cases.PRODUCTS for role in ("y", "dx")]
    names = [kernel for kernel in tuning.KERNELS if kernel not in cases.PRODUCTS] + products
    dtypes = ("bf16", "fp16", "fp32", "tf32")
    assert kinds == {
        (name, dtype)
        for name in names
        for dtype in dtypes
        if not (name.startswith("hopper") and dtype in ("fp32", "tf32"))
    }
    for name in names:
        of_kernel = [case for case in found if case.name == name]
        dropped = {case.dropout_p > 0 for case in of_kernel}
        assert dropped == ({False} if name == "dxa_db" or name.endswith(" y") else {False, True})


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_every_configuration_that_a_call_can_get_is_among_the_cases(capability):
    checked = {
        (case.kernel, case.dtype.itemsize, case.config)
        for case in check.kernel_cases(capability, check.ON_GPU, quick=False, tf32=False)
    }
    draw = random.Random(0)
    for _ in range(2000):
        sizes = [int(2 ** draw.uniform(0, 15)) for _ in range(3)]
        kernel, itemsize = draw.choice(tuning.KERNELS), draw.choice((2, 4))
        rank = draw.randint(1, min(256, cases.MOST_RANK.get(kernel, 256)))
        try:
            config = tuning.lookup(kernel, capability, itemsize, Shape(*sizes, rank))
        except LookupError:
            assert kernel == "hopper"
            continue
        assert (kernel, itemsize, config) in checked


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", ["xa", "one_kernel", "expand", "dxa_db", "da"])
def test_a_right_kernel_passes(kernel):
    dropout_p = 0.0 if kernel == "dxa_db" else 0.3
    bias = kernel in ("one_kernel", "dxa_db")
    case = replace(CASE, kernel=kernel, bias=bias, dropout_p=dropout_p, dx=kernel == "expand")
    found = problems(case)
    assert found and set(found.values()) == {""}


@pytest.mark.interpreted
def test_a_right_layer_passes():
    found = problems(LAYER)
    assert list(found) == ["y", "xa", "dx", "dweight", "da", "db", "dbias", "keep"]
    assert set(found.values()) == {""}


def broken(monkeypatch, change):
    real = cases.PRODUCTS["gemm"]
    monkeypatch.setitem(cases.PRODUCTS, "gemm", lambda *a, **k: change(real(*a, **k)))
    return problems(CASE)["y"]


def unwritten(out):
    fresh = torch.empty(out.shape)
    fresh[:-1] = out[:-1]
    return fresh


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda out: out, ""),
        (lambda out: out * 1.0001, "beyond the budget"),
        (unwritten, "beyond the budget"),
        (lambda out: out.half(), "torch.float16 (20, 19) instead of torch.float32 (20, 19)"),
        (lambda out: out[1:], "torch.float32 (19, 19) instead of torch.float32 (20, 19)"),
    ],
)
def test_a_wrong_result_is_noticed(change, problem, monkeypatch):
    assert broken(monkeypatch, change) == problem


@pytest.mark.interpreted
def test_a_kernel_that_raises_is_a_failure_with_its_reason(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("out of resource: shared memory")

    monkeypatch.setitem(cases.PRODUCTS, "gemm", fail)
    assert problems(CASE) == {"": "RuntimeError: out of resource: shared memory"}


@pytest.mark.interpreted
def test_a_gpu_out_of_order_ends_the_process(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")

    monkeypatch.setitem(cases.PRODUCTS, "gemm", fail)
    with pytest.raises(RuntimeError, match="illegal"):
        run_case(CASE)


def test_other_bits_in_a_second_run_are_noticed():
    ours = torch.tensor([1.0, 2.0])
    truth = ours.double()
    again = torch.nextafter(ours, torch.tensor(3.0))
    assert check._judge("y", ours, ours.clone(), ours, truth, None).problem == ""
    found = check._judge("y", ours, again, ours, truth, None)
    assert found.problem == "other bits when run again"


def test_one_wrong_keep_bit_is_noticed():
    keep = torch.tensor([True, False, True])
    wrong = torch.tensor([True, True, True])
    assert check._judge("keep", keep, keep, keep, keep, None).problem == ""
    found = check._judge("keep", wrong, wrong, keep, keep, None)
    assert found.problem == "1 of 3 keep bits differ"


def test_a_strategy_that_cannot_serve_says_so():
    assert "no dropout" in LAYER.__class__(**vars(LAYER) | {"forward": "aten"}).refusal
    assert LAYER.refusal == ""


NAN = float("nan")
GOOD = Result(CASE, [Output("y", 1e-7, 1e-7, 3e-7, "")])
BAD = Result(replace(CASE, kernel="da"), [Output("da", NAN, 1e-7, 3e-7, "beyond the budget")])


@pytest.fixture
def checking(monkeypatch):
    """Let the command plan the cases of some results, and find the first few of them."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    asked = {}

    def find(results, first=None, error=None):
        def checked(cases, **options):
            asked.update(options)
            yield from list(enumerate(results))[:first][::-1]  # the last case ends first
            if error is not None:
                raise error

        monkeypatch.setattr(check, "plan", lambda **options: ([r.case for r in results], []))
        monkeypatch.setattr(check, "check", checked)
        return asked

    return find


def test_the_command_tells_the_failed_cases(checking, capsys):
    asked = checking([GOOD, BAD])
    assert command.main(["check"]) == 1
    assert asked == {"jobs": None, "deadline": None}
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("da ", "gemm y "))]
    assert [line.split()[-1] for line in lines] == ["FAIL", "pass"]  # the worst first
    assert "FAIL da 16x16x16 w4 s3 fp32, m=20 n=19 k=17, rank 3, bias" in printed
    assert printed.endswith("\n1 of 2 cases pass\n")
    assert command.main(["check", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [result["passed"] for result in record["results"]] == [True, False]
    assert record["results"][1]["outputs"][0]["ours"] is None
    assert record["not_run"] == 0
    assert {"device", "torch", "triton", "lora_kernels"} <= record.keys()
    checking([GOOD])
    assert command.main(["check"]) == 0
    checking([])
    assert command.main(["check"]) == 1  # nothing checked is nothing shown


def test_what_did_not_run_is_no_pass(checking, capsys):
    other = GOOD._replace(case=replace(CASE, kernel="xa"))
    asked = checking([other, GOOD, GOOD, BAD], first=2)
    before = time.monotonic()
    assert command.main(["check", "--time-limit", "50"]) == 1
    assert before + 50 <= asked["deadline"] <= time.monotonic() + 50
    lines = capsys.readouterr().out.splitlines()
    row = {line.partition(" ")[0]: line for line in lines}
    assert "1 of 1" in row["xa"] and row["xa"].endswith(" pass")
    assert "1 of 2" in row["gemm"] and row["gemm"].endswith(" not all ran")
    assert lines[-1] == "2 of the 2 cases that ran pass, 2 did not run"
    assert command.main(["check", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["not_run"] == 2


@pytest.mark.parametrize("form", ["text", "json"])
def test_ctrl_c_prints_what_ran(form, checking, capsys):
    checking([GOOD, BAD, GOOD], first=2, error=KeyboardInterrupt)
    with pytest.raises(KeyboardInterrupt):
        command.main(["check", *(["--json"] if form == "json" else [])])
    printed = capsys.readouterr().out
    if form == "json":
        record = json.loads(printed)
        assert len(record["results"]) == 2 and record["not_run"] == 1
    else:
        assert printed.endswith("\n1 of the 2 cases that ran pass, 1 did not run\n")


def test_each_result_is_kept_as_it_comes(checking, monkeypatch, tmp_path):
    out = tmp_path / "check.jsonl"
    out.write_text('{"earlier": true}\n')
    checking([GOOD, BAD])
    given, kept = check.check, []

    def watched(cases, **options):
        for found in given(cases, **options):
            yield found
            kept.append(len(out.read_text().splitlines()))

    monkeypatch.setattr(check, "check", watched)
    assert command.main(["check", "--out", str(out)]) == 1
    assert kept == [2, 3]  # written before the next is waited for
    earlier, bad, good = map(json.loads, out.read_text().splitlines())
    assert earlier == {"earlier": True}
    assert (bad["kernel"], bad["passed"], bad["outputs"][0]["ours"]) == ("da", False, None)
    assert (good["kernel"], good["passed"]) == ("gemm y", True)
    assert {"device", "torch", "triton", "lora_kernels", "shape", "variant"} <= good.keys()


def test_a_file_that_cannot_be_written_is_told_first(checking, tmp_path, capsys):
    checking([GOOD], error=AssertionError("it ran"))
    assert command.main(["check", "--out", str(tmp_path / "no" / "such")]) == 2
    printed = capsys.readouterr()
    assert "cannot write" in printed.err and printed.out == ""


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "soon"])
def test_a_time_limit_is_a_number_of_seconds(text, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(["check", f"--time-limit={text}"])
    assert stopped.value.code == 2
    assert "expected a number of seconds above 0" in capsys.readouterr().err


def test_a_lost_process_is_a_failed_case(monkeypatch):
    asked = []

    def lost(*arguments):
        asked.extend(arguments)
        return [(1, Lost("did not end"))]

    monkeypatch.setattr(check, "spread", lost)
    ((index, result),) = check.check([LAYER, CASE], jobs=3, deadline=7.0)
    assert asked == [run_case, [LAYER, CASE], 3, [check.__name__], 7.0]
    assert index == 1 and result.case == CASE
    assert not result.passed and result.worst.problem == "did not end"


def test_the_plan_takes_what_was_asked_for(monkeypatch):
    monkeypatch.setattr(check.knobs.runtime, "interpret", True)
    everything, left_out = check.plan()
    assert left_out and len(left_out) == len(set(left_out))
    layers, also_left_out = check.plan(only=["layers"])
    assert also_left_out == left_out
    (named, none), names = check.plan(only=["xa"]), {case.name for case in everything}
    assert none == [] and {case.name for case in named} == {"xa"} < names
    assert {type(case) for case in layers} == {LayerCase}
    quick, _ = check.plan(quick=True)
    assert len(quick) < len(everything)
    assert torch.float16 not in {case.dtype for case in quick}


@pytest.mark.parametrize(
    ("processors", "gigabytes", "jobs"),
    [
        (1, None, 1),
        (4, None, 4),
        (5, None, 3),
        (64, None, 62),
        (2, 80, 2),
        (16, 80, 14),
        (64, 80, 16),
        (16, 8, 4),
        (16, 1, 1),
    ],
)
def test_as_many_processes_as_the_machine_has_room_for(processors, gigabytes, jobs, monkeypatch):
    monkeypatch.setattr(check, "processors", lambda: processors)
    monkeypatch.setattr(check.knobs.runtime, "interpret", gigabytes is None)
    if gigabytes is not None:
        gpu = SimpleNamespace(total_memory=gigabytes << 30)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    assert check.default_jobs() == jobs


@pytest.mark.slow
def test_ctrl_c_as_it_is_typed(tmp_path):
    out = tmp_path / "check.jsonl"
    ran = subprocess.Popen(
        [sys.executable, "-m", "lora_kernels", "check", "--only", "expand", "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a terminal interrupts the worker processes too
    )
    try:
        end = time.monotonic() + 120
        while not (out.exists() and out.read_text().endswith("\n")):
            assert ran.poll() is None and time.monotonic() < end
            time.sleep(0.05)
        os.killpg(ran.pid, signal.SIGINT)
        printed, errors = ran.communicate(timeout=60)
    finally:
        ran.kill()
    assert ran.returncode == 130, errors
    assert "cases that ran pass" in printed.splitlines()[-1]
    assert errors.splitlines()[-1] == "interrupted" and "Traceback" not in errors


@pytest.mark.slow
def test_the_command_as_it_is_typed():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "check", "--quick", "--only", "expand"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    first = ran.stdout.splitlines()[0]
    assert ("in Triton's interpreter" in first) == (not torch.cuda.is_available())
    assert "FAIL" not in ran.stdout
    assert ran.stdout.splitlines()[-1] in ("12 of 12 cases pass", "18 of 18 cases pass")


@pytest.mark.gpu
@pytest.mark.slow
def test_everything_on_the_gpu(capsys):
    assert command.main(["check"]) == 0, capsys.readouterr().out
