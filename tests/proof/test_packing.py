"""`python -m lora_kernels pack` and `adopt`: a pack is hit by a Triton with other keys."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch

from lora_kernels import __main__ as command
from lora_kernels.proof import check, packing, packs
from lora_kernels.proof.packing import Adopted, Made

ROOT = Path(__file__).parents[2]

# One kernel alone, and one whose pieces another one adds up: three for a GPU of one generation.
MAKE = """
import sys
from pathlib import Path
from lora_kernels.proof import check, packing
def chosen():
    cases = check.kernel_cases((9, 0), check.ON_GPU, quick=True, tf32=False)
    return [next(case for case in cases if case.name == name) for name in ("expand y", "da")]
"""
PACK = """
if __name__ == "__main__":
    print(packing.pack(Path(sys.argv[1]), (9, 0), 132, cases=chosen(), jobs=1))
"""
# As an installed Triton whose files are others makes its keys.
OTHER = """
from triton.runtime import cache
cache.triton_key = lambda: "another"
"""
ADOPT = """
import json
print(json.dumps(packing.adopt(Path(sys.argv[1]))))
"""
COUNT = """
import json
from triton import knobs
hits = []
def listener(cache_hit, metadata, **others):
    hits.append(cache_hit)
knobs.compilation.listener = listener
for case in chosen():
    packing.compile_case((case, (9, 0), 132))
print(json.dumps(hits))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Run Python where Triton compiles, with its cache in a folder; what it printed last."""
    home = tmp_path_factory.mktemp("packing")

    def run(cache, *texts, argument=home / "kernels.pack"):
        script = home / "script.py"  # a file, for the worker processes
        script.write_text("".join(texts))
        named = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        ran = subprocess.run(
            [sys.executable, str(script), str(argument)],
            capture_output=True,
            text=True,
            cwd=home,
            env=named | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)},
        )
        assert ran.returncode == 0, ran.stderr[-3000:]
        return ran.stdout.splitlines()[-1]

    run.home = home
    return run


@pytest.fixture(scope="module")
def pack(python):
    """A pack of three kernels."""
    made = python(python.home / "first", MAKE, PACK)
    assert made.startswith("Made(kernels=3, ") and made.endswith("failed=[])")
    return python.home / "kernels.pack"


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.mark.slow
def test_a_pack_is_hit_by_a_triton_with_other_keys(pack, python, tmp_path):
    assert json.loads(python(tmp_path / "copied", MAKE, OTHER, COUNT)) == [False] * 3
    adopted = Adopted(*json.loads(python(tmp_path / "adopted", MAKE, OTHER, ADOPT)))
    assert adopted == Adopted(fresh=3, present=0, target="sm_90", differs=[])
    assert json.loads(python(tmp_path / "adopted", MAKE, OTHER, COUNT)) == [True] * 3
    assert json.loads(python(tmp_path / "adopted", MAKE, COUNT)) == [False] * 3  # other keys again


@pytest.mark.slow
def test_what_a_hit_loads_is_what_was_compiled(pack, python, tmp_path):
    python(tmp_path, MAKE, OTHER, ADOPT)
    compiled, adopted = (
        {
            path.parent.name: (path.read_bytes(), json.loads(path.with_suffix(".json").read_text()))
            for path in folder.rglob("*.cubin")
        }
        for folder in (python.home / "first", tmp_path)
    )
    assert len(compiled) == len(adopted) == 3 and not compiled.keys() & adopted.keys()
    ours = sorted((code, facts.pop("hash") and facts) for code, facts in compiled.values())
    theirs = sorted((code, facts.pop("hash") and facts) for code, facts in adopted.values())
    assert ours == theirs


@pytest.mark.slow
def test_equal_kernels_make_equal_packs(pack, python):
    again = python.home / "again.pack"
    python(python.home / "first", MAKE, PACK, argument=again)
    assert again.read_bytes() == pack.read_bytes()
    described = "".join(json.dumps(kernel.metadata) for kernel in packs.read(pack)[1])
    assert sys.prefix not in described  # nobody's folders travel


@pytest.mark.slow
def test_what_the_cache_holds_is_not_replaced(pack, python, tmp_path):
    python(tmp_path, MAKE, ADOPT)
    (file, *_) = tmp_path.rglob("*.cubin")
    file.write_bytes(b"another")
    before = contents(tmp_path)
    again = Adopted(*json.loads(python(tmp_path, MAKE, ADOPT)))
    assert (again.fresh, again.present) == (0, 3)
    assert contents(tmp_path) == before


DIFFERENT = {
    "triton": (
        "import triton; triton.__version__ = packing.triton.__version__ = '9.9.9'",
        "here it is 9.9.9",
    ),
    "ptxas": ("packing.make_backend = lambda target: Odd()", "here it is V1.2.3"),
    "environment": (
        "packing.compiler.get_cache_invalidating_env_vars = lambda: {'DISABLE_PTXAS_OPT': '1'}",
        "packed with environment none, here it is DISABLE_PTXAS_OPT=1",
    ),
}
ODD = """
class Odd:
    def hash(self):
        return "release 1.2, V1.2.3"
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", DIFFERENT)
def test_other_versions_are_said_and_change_nothing(name, pack, python, tmp_path):
    change, said = DIFFERENT[name]
    found = Adopted(*json.loads(python(tmp_path, MAKE, ODD, f"{change}\n", ADOPT)))
    assert (found.fresh, found.present) == (0, 0) and len(found.differs) == 1
    assert said in found.differs[0] and "\n" not in found.differs[0]
    assert contents(tmp_path) == {}


@pytest.mark.slow
def test_a_kernel_with_another_source_is_left_out(pack, python, tmp_path):
    change = "from lora_kernels.kernels import gemm\ngemm.pointer_gemm_kernel.hash = 'f' * 64\n"
    found = Adopted(*json.loads(python(tmp_path, MAKE, change, ADOPT)))
    assert (found.fresh, found.present) == (2, 0)
    (difference,) = found.differs
    assert difference.startswith("lora_kernels.kernels.gemm.pointer_gemm_kernel has another source")
    assert not list(tmp_path.rglob("pointer_gemm_kernel*"))


@pytest.mark.slow
def test_a_damaged_pack_changes_nothing(pack, python, tmp_path):
    whole = pack.read_bytes()
    damaged = tmp_path / "damaged.pack"
    damaged.write_bytes(whole[:-200])
    cache = tmp_path / "cache"
    environment = os.environ | {"TRITON_CACHE_DIR": str(cache)}
    ran = subprocess.run(
        [sys.executable, "-m", "lora_kernels", "adopt", str(damaged)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert ran.returncode == 2 and ran.stdout == ""
    (line,) = ran.stderr.splitlines()
    assert line.startswith(f"nothing adopted: {damaged} is ")
    assert not cache.exists()


@pytest.mark.slow
def test_the_commands_as_they_are_typed(pack, python, tmp_path):
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    for said, status in (("3 kernels for sm_90 adopted, 0 were", 0), ("0 kernels", 0)):
        ran = subprocess.run(
            [sys.executable, "-m", "lora_kernels", "adopt", str(pack)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert ran.returncode == status, ran.stderr
        assert said in ran.stdout


ORDER = """
import json
from lora_kernels.proof import packing, resources
from lora_kernels.proof.packing import JITFunction
def functions():
    return {id(value): value for name, module in sys.modules.items()
            if name.startswith("lora_kernels.") for value in vars(module).values()
            if isinstance(value, JITFunction)}.values()
together = packing._code_here()
found = {}
for kernel in functions():
    for function in functions():
        function.hash, function.used_global_vals = None, {}
    found[packing._name(kernel)] = kernel.cache_key
print(json.dumps([name for name in together if found[name] != together[name]]))
"""


@pytest.mark.slow
def test_a_kernel_has_one_key_whichever_kernel_a_process_takes_first(python, tmp_path):
    """Before 3.8, Triton's hash of a kernel has only those constants that its helpers read of
    which it has met the helper before; a kernel would be packed under one key and sought under
    another."""
    assert json.loads(python(tmp_path, MAKE, ORDER)) == []


def test_a_pack_has_what_check_runs_and_the_layers_of_the_first_figures():
    found = packing.pack_cases((9, 0))
    options = {"quick": False, "tf32": True}
    assert set(check.kernel_cases((9, 0), check.ON_GPU, **options)) <= set(found)
    layers = check.layer_cases((9, 0), check.ON_GPU, **options)
    assert {layer for layer in layers if not layer.refusal} <= set(found)
    measured = {
        (case.forward, case.dropout_p > 0)
        for case in found
        if case.shape == (8192, 1024, 4096, 16) and case.dtype == torch.bfloat16
    }
    dropped = {(name, True) for name in ("one_kernel", "fused", "hopper", "beta1")}
    assert measured == dropped | {(name, False) for name, _ in dropped} | {("aten", False)}
    assert not any(
        case.kernel == "hopper" for case in packing.pack_cases((8, 0)) if hasattr(case, "kernel")
    )


@pytest.fixture
def interpreting(monkeypatch):
    """The commands take this out of the environment, for the tests to be put back."""
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))


@pytest.mark.parametrize(
    ("made", "status", "said"),
    [
        (Made(554, 5_300_000, []), 0, "554 kernels for sm_80 packed into"),
        (Made(553, 5_300_000, ["xa_kernel: no"]), 1, "FAIL xa_kernel: no\n553 kernels"),
        (Made(500, 5, [f"kernel {i}" for i in range(25)]), 1, "... and 5 more\n500"),
        (Made(0, 300, []), 1, "0 kernels"),
    ],
)
def test_the_command_says_what_it_packed(
    made, status, said, monkeypatch, capsys, tmp_path, interpreting
):
    asked = []
    monkeypatch.setattr(packing, "pack", lambda *a, **k: asked.append((a, k)) or made)
    out = tmp_path / "kernels.pack"
    assert command.main(["pack", "--target", "sm_80", str(out), "--jobs", "3"]) == status
    assert asked == [((out, (8, 0), 108), {"jobs": 3})]
    assert said in capsys.readouterr().out
    for wrong in (tmp_path, tmp_path / "absent" / "kernels.pack"):
        assert command.main(["pack", "--target", "sm_80", str(wrong)]) == 2
        assert f"{wrong} is not a file that can be written" in capsys.readouterr().err
    assert len(asked) == 1


def test_the_command_says_what_it_adopted(monkeypatch, capsys, tmp_path, interpreting):
    assert command.main(["adopt", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    found = Adopted(2, 1, "sm_90", ["lora_kernels.kernels.gemm.x has another source here"])
    monkeypatch.setattr(packing, "adopt", lambda path: found)
    assert command.main(["adopt", "x.pack"]) == 0
    printed = capsys.readouterr()
    assert printed.out == "2 kernels for sm_90 adopted, 1 were there already\n"
    assert "has another source here: compiled here as ever" in printed.err
    found = Adopted(0, 0, "sm_90", ["packed with triton 3.6.0, here it is 3.9.0"])
    assert command.main(["adopt", "x.pack"]) == 1

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing, "adopt", full)
    assert command.main(["adopt", "x.pack"]) == 2
    assert "No space left" in capsys.readouterr().err
