"""What the interpreter runs, written down, is compiled as a launch on a GPU would be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import needs_triton  # noqa: F401 - skips this file without it
import pytest

ROOT = Path(__file__).parents[2]
CASES = """
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
import pack_tests, torch
from lora_kernels.proof import check
def chosen():
    cases = check.kernel_cases((9, 0), check.INTERPRETED, quick=True, tf32=False)
    found = [next(case for case in cases if case.name == name and case.shape.m < 200)
             for name in ("gemm dx", "hopper y", "xa", "da")]
    tall = replace(found[-1], shape=found[-1].shape._replace(m=2048, k=1024))  # split on 132
    return [*found, tall]
"""
RECORD = """
import pickle
config = SimpleNamespace()
pack_tests.pytest_configure(config)
pack_tests.pytest_collection_finish(
    SimpleNamespace(config=SimpleNamespace(getoption=lambda name: 132)))
for case in chosen():
    case.run(case.operands(torch.device("cpu")))
Path(sys.argv[1]).write_bytes(pickle.dumps(sorted(config.launches_recorded, key=repr)))
"""
COMPILE = """
import pickle
from lora_kernels.proof import packing
def kernels(cases):
    done = [packing.compile_case((case, (9, 0), 132)) for case in cases]
    assert not any(errors for _, errors in done), done
    return [one.stem for compiled, _ in done for one in compiled]
recorded = kernels(pickle.loads(Path(sys.argv[1]).read_bytes()))
print(*sorted(set(recorded)))
again = kernels(chosen())
assert again == [], again
"""


@pytest.mark.slow
def test_launches_of_tests_have_the_keys_of_launches(tmp_path):
    for text, interpret in ((RECORD, "1"), (COMPILE, "0")):
        environment = os.environ | {
            "TRITON_INTERPRET": interpret,
            "TRITON_CACHE_DIR": str(tmp_path / "cache"),
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "helpers")]),
        }
        ran = subprocess.run(
            [sys.executable, "-c", CASES + text, str(tmp_path / "launches")],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
    kernels = {"pointer_gemm_kernel", "hopper_gemm_kernel", "thin_kernel", "xa_kernel"}
    assert set(ran.stdout.split()) == kernels | {"sum_partials_kernel"}
