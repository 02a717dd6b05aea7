"""What a kernel takes of a GPU, found by compiling for it on any machine.

Triton's wheel carries ptxas and cuobjdump, so no GPU and no CUDA toolkit is needed.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from .tiles import Launch

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


class Resources(NamedTuple):
    """Of one compiled kernel, per block or per thread.

    Attributes:
        registers: per thread.
        spilled: bytes of spill stores and loads per thread.
        shared: bytes of shared memory per block.
        tensor_cores: tensor-core instructions in the machine code, by name.
    """

    registers: int
    spilled: int
    shared: int
    tensor_cores: dict[str, int]


def compile_launch(launch: Launch, capability: tuple[int, int]) -> Resources:
    """Compile a recorded launch for a compute capability and read what it takes.

    Raises:
        Exception: whatever Triton raises where it cannot compile, out of resources included.
    """
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if launch.kernel.params[index].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        else:
            _describe(index, name, value, signature, constants, attributes)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=launch.options)
    registers, spilled = _assemble(compiled.asm["ptx"])
    return Resources(
        registers, spilled, compiled.metadata.shared, _tensor_cores(compiled.asm["cubin"])
    )


def _describe(
    index: int,
    name: str,
    value: Any,
    signature: dict[str, Any],
    constants: dict[str, Any],
    attributes: dict[tuple[int], list[list[Any]]],
) -> None:
    """One argument as Triton's launcher specialises it."""
    if value is None or (isinstance(value, int) and value == 1):
        signature[name], constants[name] = "constexpr", value
    elif isinstance(value, Tensor):
        signature[name] = "*" + _TYPES[value.dtype]
        attributes[(index,)] = [["tt.divisibility", 16]]
    elif isinstance(value, TensorDescriptor):
        block = ", ".join(map(str, value.block_shape))
        signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
    elif isinstance(value, int):
        signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if value % 16 == 0:
            attributes[(index,)] = [["tt.divisibility", 16]]
    elif isinstance(value, tl.dtype):
        signature[name], constants[name] = "constexpr", value
    else:
        signature[name] = "fp32"


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers and spilled bytes, as ptxas reports them."""
    found = re.search(r"\.target (sm_\w+)", ptx)
    assert found is not None
    ptxas = knobs.nvidia.ptxas.path if found[1] < "sm_100" else _newest_ptxas()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, "-v", f"--gpu-name={found[1]}", str(source), "-o", f"{folder}/out"]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert registers is not None, report
    return int(registers[1]), sum(map(int, spills))


def _newest_ptxas() -> str:
    newest = getattr(knobs.nvidia, "ptxas_blackwell", knobs.nvidia.ptxas)
    return newest.path


def _tensor_cores(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
        sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    counts: dict[str, int] = {}
    for name in re.findall(r"\b([HQI]GMMA|[HI]MMA|UTC[HQ]?MMA|UTMALDG|UTMASTG)\b", sass):
        counts[name] = counts.get(name, 0) + 1
    return counts
