"""`python -m lora_kernels check` passes what is right and notices each thing that can be wrong."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels import __main__ as command
from lora_kernels import cases, check, tuning
from lora_kernels.cases import Case, LayerCase
from lora_kernels.check import Output, Result, run_case
from lora_kernels.tuning import Config, Shape
from lora_kernels.workers import Lost

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


def test_the_command_tells_the_failed_cases(monkeypatch, capsys):
    nan = float("nan")
    good = Result(CASE, [Output("y", 1e-7, 1e-7, 3e-7, "")])
    bad = Result(replace(CASE, kernel="da"), [Output("da", nan, 1e-7, 3e-7, "beyond the budget")])
    monkeypatch.setattr(check, "check", lambda **options: ([good, bad], []))
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    assert command.main(["check"]) == 1
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith(("da ", "gemm y "))]
    assert [line.split()[-1] for line in lines] == ["FAIL", "pass"]  # the worst first
    assert "FAIL da 16x16x16 w4 s3 fp32, m=20 n=19 k=17, rank 3, bias" in printed
    assert "1 of 2 cases pass" in printed
    assert command.main(["check", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [result["passed"] for result in record["results"]] == [True, False]
    assert record["results"][1]["outputs"][0]["ours"] is None
    assert {"device", "torch", "triton", "lora_kernels"} <= record.keys()
    monkeypatch.setattr(check, "check", lambda **options: ([good], []))
    assert command.main(["check"]) == 0
    monkeypatch.setattr(check, "check", lambda **options: ([], []))
    assert command.main(["check"]) == 1  # nothing checked is nothing shown


@pytest.mark.interpreted
def test_a_lost_process_is_a_failed_case(monkeypatch):
    monkeypatch.setattr(check, "spread", lambda *a, **k: [(0, Lost("it ended"))])
    monkeypatch.setattr(check, "kernel_cases", lambda *a, **k: [CASE])
    monkeypatch.setattr(check, "layer_cases", lambda *a, **k: [])
    results, _ = check.check()
    assert not results[0].passed and results[0].worst.problem == "it ended"


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
