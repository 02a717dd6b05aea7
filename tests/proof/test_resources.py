"""`python -m lora_kernels resources`: kernels compiled for GPUs that are not here."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest

pytest.importorskip("triton")

from lora_kernels import __main__ as command
from lora_kernels.kernels import tuning
from lora_kernels.kernels.tiles import block_of
from lora_kernels.kernels.tuning import Config, Shape
from lora_kernels.proof import cases, commands, resources
from lora_kernels.proof.commands import TARGETS
from lora_kernels.proof.resources import Entry, Resources, judge

PLAIN = Config(64, 64, 64)
FINE = Resources(registers=100, spilled=0, shared=90_000, tensor_cores={"wgmma": 5})


def compiled(*arguments):
    """What the command prints, with Triton asked to interpret, as in these tests."""
    command = [sys.executable, "-m", "lora_kernels", "resources", *arguments, "--json"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.returncode in (0, 1), ran.stderr
    return ran.returncode, json.loads(ran.stdout)


@pytest.mark.slow
def test_expand_for_ampere():
    status, found = compiled("--target", "sm_86", "--only", "expand")
    assert status == 0 and found["target"] == "sm_86" and found["shared_limit"] == 99 * 1024
    kinds = {(entry["kernel"], entry["dtype"]) for entry in found["kernels"]}
    assert kinds == {
        (f"expand {role}", dtype)
        for role in ("y", "dx")
        for dtype in ("bf16", "fp16", "fp32", "tf32")
    }
    for entry in found["kernels"]:
        taken = entry["resources"]
        assert not entry["problem"]
        assert 16 <= taken["registers"] <= 255 and 0 < taken["shared"] <= 99 * 1024
        # Float32 in full precision is the only one without tensor cores.
        assert set(taken["tensor_cores"]) == (set() if entry["dtype"] == "fp32" else {"mma"})


@pytest.mark.slow
def test_every_hopper_product_uses_wgmma_and_fits():
    status, found = compiled("--target", "sm_90", "--only", "hopper")
    assert status == 0
    assert {entry["kernel"] for entry in found["kernels"]} == {"hopper y", "hopper dx"}
    for entry in found["kernels"]:
        assert entry["resources"]["tensor_cores"]["wgmma"] >= 2, entry
        assert entry["resources"]["spilled"] == 0
        assert entry["resources"]["shared"] <= found["shared_limit"] == 227 * 1024


SPILLING = """
import json, torch
from lora_kernels.kernels.tuning import Config, Shape
from lora_kernels.proof.cases import Case
from lora_kernels.proof.resources import compile_case
shape = Shape(512, 4096, 4096, 16)
found = [
    compile_case((Case("gemm", config, torch.bfloat16, shape), (8, 0), 108))[0].resources
    for config in (Config(32, 64, 32, 4, 1), Config(128, 256, 32, 2, 1))
]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_what_outgrows_the_registers_spills():
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    ran = subprocess.run(
        [sys.executable, "-c", SPILLING], capture_output=True, text=True, env=environment
    )
    assert ran.returncode == 0, ran.stderr
    small, large = (Resources(*found) for found in json.loads(ran.stdout))
    assert small.spilled == 0 and small.registers < 255
    # A loop's 512 accumulators a thread do not go into 255 registers: half of them at least go out
    # and in.
    assert large.spilled >= 256 * 4 * 2


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_that_a_call_can_get_is_compiled(target):
    capability, _ = TARGETS[target]
    swept = {
        (case.kernel, case.dtype, case.config, block_of(case.shape.r))
        for case in resources.sweep_cases(capability)
    }
    draw = random.Random(0)
    for _ in range(1000):
        sizes = [int(2 ** draw.uniform(0, 15)) for _ in range(3)]
        kernel, dtype = draw.choice(tuning.KERNELS), draw.choice(list(cases.DTYPE_NAMES))
        rank = draw.randint(1, min(256, cases.MOST_RANK.get(kernel, 256)))
        try:
            config = tuning.lookup(kernel, capability, dtype.itemsize, Shape(*sizes, rank))
        except LookupError:
            assert kernel == "hopper"
            continue
        tile = block_of(rank)
        if dtype != cases.NARROW[0]:  # the others are compiled at the widest tile alone
            tile = max(b for k, d, c, b in swept if (k, d, c) == (kernel, dtype, config))
        assert (kernel, dtype, config, tile) in swept


@pytest.mark.parametrize("kernel", ["gemm", "hopper", "expand", "one_kernel"])
def test_a_product_may_not_spill(kernel):
    assert judge(kernel, PLAIN, FINE, (9, 0)) == ("", "")
    assert judge(kernel, PLAIN, FINE._replace(spilled=4), (9, 0)) == ("spills 4 bytes", "")


@pytest.mark.parametrize("kernel", ["xa", "dxa_db", "da", "sum_partials"])
def test_a_pass_may_spill_a_little(kernel):
    assert judge(kernel, PLAIN, FINE._replace(spilled=64), (9, 0)) == ("", "spills 64 bytes")
    assert judge(kernel, PLAIN, FINE._replace(spilled=72), (9, 0)) == ("spills 72 bytes", "")


def test_shared_memory_has_a_limit():
    limit = 163 * 1024
    assert judge("da", PLAIN, FINE._replace(shared=limit), (8, 0)) == ("", "")
    problem, _ = judge("da", PLAIN, FINE._replace(shared=limit + 1), (8, 0))
    assert problem == "needs 166913 bytes of shared memory, a block may have 166912"


def test_hopper_without_its_instruction_fails():
    ampere = FINE._replace(tensor_cores={"mma": 40})
    assert "wgmma" in judge("hopper", PLAIN, ampere, (9, 0))[0]
    assert judge("gemm", PLAIN, ampere, (9, 0)) == ("", "")


def test_programs_that_share_a_multiprocessor_have_to_fit():
    two = Config(128, 128, 64, warps=4, per_sm=2)
    half = (227 + 1) * 1024 // 2 - 1024
    assert judge("hopper", two, FINE._replace(shared=half), (9, 0)) == ("", "")
    for crowded in (FINE._replace(shared=half + 1), FINE._replace(registers=257)):
        problem = judge("hopper", two, crowded, (9, 0))[0]
        assert problem == "2 shall run on a multiprocessor, which holds 1"


def test_the_command_tells_what_failed(monkeypatch, capsys):
    good = Entry("gemm y", "64x64x64 w4 s3", "bf16", "rank 16", FINE, "", "")
    bad = good._replace(kernel="da", resources=None, problem="CompilationError: no")
    warned = good._replace(kernel="xa", warning="spills 8 bytes")
    found = [good, bad, warned]
    monkeypatch.setattr(resources, "sweep", lambda *a, **k: found)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    assert command.main(["resources", "--target", "sm_90"]) == 1
    printed = capsys.readouterr().out
    assert "FAIL da 64x64x64 w4 s3 bf16, rank 16: CompilationError: no" in printed
    assert "warning xa 64x64x64 w4 s3 bf16, rank 16: spills 8 bytes" in printed
    assert "sm_90: 2 of 3 compiled kernels are fine" in printed
    assert command.main(["resources", "--target", "sm_90", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [entry["problem"] for entry in record["kernels"]] == ["", "CompilationError: no", ""]
    assert record["kernels"][0]["resources"]["tensor_cores"] == {"wgmma": 5}
    found.remove(bad)
    assert command.main(["resources", "--target", "sm_90"]) == 0
    found.clear()
    assert command.main(["resources", "--target", "sm_90"]) == 1  # nothing compiled


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["resources"], "--target"),
        (["resources", "--target", "sm_70"], "sm_80"),
        (["resources", "--target", "sm_80", "--only", "layers"], "one_kernel"),
        (["check", "--jobs", "0"], "from 1 on"),
        (["check", "--only", "gem"], "no 'gem'; there are xa, one_kernel, gemm, hopper"),
        (["check", "--only", "gemm,", "hoper,xa,y"], "no 'hoper', 'y'; there are xa"),
        (["check", "--only", ","], "no ','; there are xa"),
    ],
)
def test_mistakes_are_told_with_what_is_known(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["gemm,xa", "layers"], ["gemm", "xa", "layers"], ["gemm,xa,layers"]]
)
def test_kernels_are_named_with_commas_or_spaces(words):
    options = command.build_parser().parse_args(["check", "--only", *words])
    assert options.only == ["gemm", "xa", "layers"]
    assert command.build_parser().parse_args(["check"]).only == []


def test_without_triton_the_command_says_so(monkeypatch, capsys):
    def absent(name, package):
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(commands.importlib, "import_module", absent)
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    assert command.main(["resources", "--target", "sm_90"]) == 1
    assert "pip install triton" in capsys.readouterr().err
