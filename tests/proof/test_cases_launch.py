"""The cases through Triton's launcher on a stub of the driver, and the stub itself."""

from __future__ import annotations

import functools
import json

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import stub_process
from stub_process import HELPERS

from benchmarks import stub_driver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(stub_driver.missing()), reason=stub_driver.missing()),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run Python in a process of its own, where Triton compiles; what it printed as JSON."""
    return functools.partial(stub_process.run_python, tmp_path_factory.mktemp("triton"))


SCRIPT = str(HELPERS / "launching.py")
KINDS = """
import json, launching
every, some = ([case.__dict__ | {"layer": not hasattr(case, "kernel"), "name": case.name,
                                 "dtype": case.dtype_name} for case in cases]
               for cases in (launching.every_case("sm_90"), launching.some_cases("sm_90")))
def kinds(cases):
    return sorted({(case["name"], case["dtype"], case["dropout_p"] > 0 if case["layer"] else None)
                   for case in cases if not case["layer"] or case["dtype"] == "bf16"}, key=str)
print(json.dumps([kinds(every), kinds(some), len(some)]))
"""


def test_some_are_of_every_kind(run):
    _, (every, some, count) = run("-c", KINDS)
    assert some == every and count < 200
    assert {"gemm y", "gemm dx", "hopper y", "hopper dx", "da"} <= {name for name, *_ in some}
    assert {"group_y", "group_dx_hopper", "group beta1 + beta1"} <= {name for name, *_ in some}


def test_every_kind_of_kernel_launches(run):
    status, found = run(SCRIPT)
    assert found["failed"] == [] and status == 0
    assert found["launches"] >= 2 * found["cases"] > 100


def test_planted_faults_are_noticed(run):
    _, said = run(SCRIPT, "--planted")
    assert said.pop("") == said.pop("again") == ""
    overlap, box, size, descriptor = (said.pop(name) for name in list(said))
    assert "a stride of 1008 bytes overlaps 512 elements 2 bytes apart" in overlap
    assert "dimension 1 of the box is 257" in box
    assert size.startswith("TypeError") and "str" in size
    assert "p_desc.load" in descriptor
    assert not said


GOOD = {
    "capability": (9, 0),
    "type": 9,  # bfloat16
    "rank": 2,
    "address": 4096,
    "size": (512, 1024),
    "stride": (1024,),
    "box": (64, 256),
    "step": (1, 1),
    "interleave": 0,
    "swizzle": 3,  # 128 bytes
    "fill": 0,
}
REFUSED = {
    "address": (4100, "not aligned to 16 bytes"),
    "size": ((512, 0), "dimension 1 has 0 elements"),
    "stride": ((1032,), "no multiple of 16"),
    "box": ((64, 257), "beyond 1 to 256"),
    "step": ((1, 9), "element stride of 9"),
    "swizzle": (2, "128 bytes across, swizzled by 64"),
    "rank": (6, "6 dimensions"),
    "type": (99, "does not know type 99"),
    "capability": ((8, 0), "need compute capability 9.0"),
}
MORE_REFUSED = [
    ({"stride": (1008,)}, "overlaps 512 elements"),
    ({"stride": (1 << 40,)}, "below 2^40"),
    ({"size": (512, (1 << 32) + 1)}, "4294967297 elements"),
    ({"box": (4, 4), "swizzle": 0}, "8 bytes across, no multiple of 16"),
    ({"box": (0, 4)}, "dimension 0 of the box is 0"),
    ({"type": 0, "fill": 1, "stride": (1024,), "box": (64, 4)}, "tensor of integers"),
    ({"address": 0}, "not aligned"),
]
TAKEN = [{}, {"size": (512, 1 << 32)}, {"stride": ((1 << 40) - 16,)}, {"box": (8, 1)}]
CALLS = """
import ctypes, json, pathlib, sys, tempfile
from benchmarks import stub_driver
with tempfile.TemporaryDirectory() as folder:
    stub = ctypes.CDLL(str(stub_driver.build(pathlib.Path(folder))))
room = ctypes.create_string_buffer(256)
map_at = (ctypes.addressof(room) + 63) // 64 * 64
u64, u32 = ctypes.c_uint64, ctypes.c_uint32
def encode(capability, type, rank, address, size, stride, box, step, interleave, swizzle, fill):
    stub.stub_be(*capability, 132, 232448)
    status = stub.cuTensorMapEncodeTiled(
        ctypes.c_void_p(map_at), type, rank, ctypes.c_void_p(address), (u64 * 5)(*size),
        (u64 * 5)(*stride), (u32 * 5)(*box), (u32 * 5)(*step), interleave, swizzle, 2, fill)
    text = ctypes.c_char_p()
    stub.cuGetErrorString(status, ctypes.byref(text))
    return text.value.decode() if status else ""
print(json.dumps([encode(**call) for call in json.loads(sys.argv[1])]))
"""


def test_the_stub_refuses_what_cuda_refuses_of_a_tensor_map(run):
    calls = [({name: value}, said) for name, (value, said) in REFUSED.items()] + MORE_REFUSED
    _, found = run("-c", CALLS, json.dumps([GOOD | changed for changed, _ in calls]))
    for answer, (changed, said) in zip(found, calls, strict=True):
        assert said in answer, (changed, answer)
    _, found = run("-c", CALLS, json.dumps([GOOD | changed for changed in TAKEN]))
    assert found == [""] * len(TAKEN)


LAUNCHES = """
import json, launching, pathlib, tempfile, torch
from benchmarks import stub_driver
from lora_kernels.kernels import tuning
from lora_kernels.proof.cases import Case
from lora_kernels.proof.resources import launches_of
folder = tempfile.TemporaryDirectory()  # kept to the end: Triton links launchers with the stub
launching.driver_for("sm_90", str(stub_driver.build(pathlib.Path(folder.name))))
shape = tuning.Shape(1024, 768, 512, 16)
case = Case("gemm", tuning.lookup("gemm", (9, 0), 2, shape), torch.bfloat16, shape)
(launch,) = launches_of(case, case.operands(torch.device("meta")), 132)
arguments = {name: torch.empty(value.shape, dtype=value.dtype) if torch.is_tensor(value) else value
             for name, value in launch.arguments.items()}
compiled = launch.kernel[(1,)](**arguments, **launch.options)
metadata = compiled.packed_metadata
def said(grid, shared=None, **changed):
    compiled.packed_metadata = metadata if shared is None else (*metadata[:2], shared)
    try:
        given = arguments | changed
        compiled[grid](*(given[name] for name in launch.kernel.arg_names))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(json.dumps([
    said((1, 1, 1)), said((1, 65536, 1)), said((1, 1, 1), shared=1 << 20),
    said((1, 1, 1), M=1024.0), said((1, 1, 1), p_ptr=3.0)]))
"""


def test_a_launch_straight_from_the_compiled_kernel_is_held_to_the_limits_too(run):
    _, (right, grid, shared, size, pointer) = run("-c", LAUNCHES)
    assert right is None
    assert "a grid of 1 x 65536 x 1" in grid
    assert "1048576 bytes of shared memory, the kernel may have 232448" in shared
    assert size.startswith("TypeError") and pointer.startswith("TypeError")
