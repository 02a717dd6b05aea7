"""What each kernel takes of a GPU, found by compiling for it on any machine.

Triton's wheel carries ptxas and cuobjdump, so no GPU and no CUDA toolkit is needed. `sweep` goes
through every kernel and configuration that `tuning`'s table gives for a GPU.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource
from triton.tools.tensor_descriptor import TensorDescriptor

from ..kernels import tuning
from ..kernels.launching import Launch, recording
from ..kernels.tuning import Config, Shape
from .cases import EXACT_SCALE, NARROW, PRODUCTS, Case, Tensors, products_in, ranks_of, served
from .gate_cases import GateCase, gate_sweep_cases
from .group_cases import MANY, ONE, GroupCase
from .group_probes import HOPPER, group_sweep_cases
from .workers import Lost, processors, progress, spread

AnyKernel = Case | GroupCase | GateCase

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
        spilled: bytes that the instructions for spilling store and load per thread.
        shared: bytes of shared memory per block.
        tensor_cores: tensor-core instructions, by name (``mma``, ``wgmma``, ``tcgen05``).
    """

    registers: int
    spilled: int
    shared: int
    tensor_cores: dict[str, int]


def launches_of(case: AnyKernel, operands: Tensors, sms: int) -> list[Launch]:
    """What a case launches on ``operands``, which may be on ``meta``, recorded and not run."""
    with recording(sms) as launches:
        case.run(operands)
    return launches


def _compile(source: ASTSource, options: dict[str, Any], capability: tuple[int, int]) -> Resources:
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=options)
    registers, spilled = _registers_and_spills(compiled.asm["cubin"])
    return Resources(
        registers, spilled, compiled.metadata.shared, _tensor_cores(compiled.asm["ptx"])
    )


def source_of(launch: Launch) -> ASTSource:
    """The kernel with its arguments as Triton's launcher specialises them."""
    signature: dict[str, Any] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for index, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments[name]
        if launch.kernel.params[index].is_constexpr:
            signature[name], constants[name] = "constexpr", value
        else:
            plain = launch.kernel.params[index].do_not_specialize
            _describe(index, name, value, plain, signature, constants, attributes)
    return ASTSource(launch.kernel, signature, constants, attributes)


def _describe(
    index: int,
    name: str,
    value: Any,
    plain: bool,
    signature: dict[str, Any],
    constants: dict[str, Any],
    attributes: dict[tuple[int], list[list[Any]]],
) -> None:
    """One argument as Triton's launcher specialises it, or, if ``plain``, leaves it."""
    if value is None or (isinstance(value, int) and value == 1 and not plain):
        signature[name], constants[name] = "constexpr", value
    elif isinstance(value, Tensor):
        signature[name] = "*" + _TYPES[value.dtype]
        attributes[(index,)] = [["tt.divisibility", 16]]
    elif isinstance(value, TensorDescriptor):
        block = ", ".join(map(str, value.block_shape))
        signature[name] = f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"
    elif isinstance(value, int):
        signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        if value % 16 == 0 and not plain:
            attributes[(index,)] = [["tt.divisibility", 16]]
    elif isinstance(value, tl.dtype):
        signature[name], constants[name] = "constexpr", value
    else:
        signature[name] = "fp32"


# Bytes that one instruction moves, by the suffix that says so; 4 without any.
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of the instructions that spill, read from the machine code itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _dump("--dump-resource-usage", file.name)
        found = re.search(r"\bREG:(\d+) STACK:(\d+)", usage)
        assert found is not None, usage[:1000]
        # Spills go to the stack, and listing the instructions is slow.
        code = _dump("--dump-sass", file.name) if int(found[2]) else ""
    spilled = 0
    for suffixes in re.findall(r"\b(?:STL|LDL)((?:\.\w+)*)", code):
        spilled += next((_WIDTHS[s] for s in suffixes.split(".") if s in _WIDTHS), 4)
    return int(found[1]), spilled


def _dump(option: str, path: str) -> str:
    command = [knobs.nvidia.cuobjdump.path, option, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _tensor_cores(ptx: str) -> dict[str, int]:
    """Matrix products by the instruction: mma up to Ada, wgmma on Hopper, tcgen05 on Blackwell."""
    counts: dict[str, int] = {}
    for line in re.findall(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b", ptx):
        name = line.split(".")[0]
        counts[name] = counts.get(name, 0) + 1
    return counts


GEMMS = ("gemm", "hopper", "expand", "one_kernel", *MANY, *ONE, "group_one_kernel")
# In a pass that waits for memory a spilled register or two costs nothing that can be measured.
SPILL_WARNING = 64


class Entry(NamedTuple):
    """One compiled kernel, or one that did not compile.

    Attributes:
        kernel: such as ``gemm dx``; see `Case.name`.
        block: the configuration in short.
        dtype, variant: see `Case`.
        resources: None where it did not compile.
        problem: why this fails the sweep, empty where it does not.
        warning: what is worth a look but fails nothing.
    """

    kernel: str
    block: str
    dtype: str
    variant: str
    resources: Resources | None
    problem: str
    warning: str


class _Compiled(NamedTuple):
    kernel: str
    key: str  # equal for equal compilations
    resources: Resources | None
    error: str


def sweep_cases(capability: tuple[int, int]) -> list[Case]:
    """What `sweep` compiles: every configuration that the table gives, in every dtype.

    The tiles of the rank are 16, 32 and 64 wide, and larger ranks are walked in tiles of 64. In
    bfloat16 each width is compiled with all that the kernel can take along (bias, dropout, wide A
    and B), and the narrowest also plain; float16, which differs in the types of its instructions
    alone, and float32, in IEEE and in TF32, are compiled with all there is at the widest.

    Sizes and strides are multiples of 16, as a layer's mostly are. Where they are not, loads of
    single elements take the place of wide ones, and some of the products spill a little: `check`
    proves them right, and nothing here asks them to be fast.
    """
    cases: list[Case] = []
    for kernel in tuning.KERNELS:
        for dtype, tf32 in [*((narrow, False) for narrow in NARROW), *_FLOAT32]:
            ranks: dict[Config, list[Shape]] = {}
            for rank in ranks_of(kernel, capability):
                for config, shape in served(kernel, capability, dtype.itemsize, rank):
                    ranks.setdefault(config, []).append(shape)
            for config, shapes in ranks.items():
                every = [Case(kernel, config, dtype, shape, tf32=tf32) for shape in shapes]
                if dtype == torch.bfloat16:
                    exact = kernel == "hopper"  # no other looks at it
                    cases.append(replace(every[0], scale=EXACT_SCALE) if exact else every[0])
                for case in every if dtype == torch.bfloat16 else every[-1:]:
                    cases += _loaded(case)
    return cases


_FLOAT32 = ((torch.float32, False), (torch.float32, True))


def _loaded(case: Case) -> list[Case]:
    """The case with all that its kernel can take along."""
    wide = case.dtype != torch.float32
    if case.kernel in PRODUCTS:
        y = replace(case, bias=True, wide=wide)
        cases = [y, replace(case, dx=True, dropout_p=0.1, wide=wide)]
        # Hopper's product takes the rank part first or last, as the scale allows.
        return [*cases, replace(y, scale=EXACT_SCALE)] if case.kernel == "hopper" else cases
    bias = case.kernel in ("one_kernel", "dxa_db")
    dropout_p = 0.0 if case.kernel == "dxa_db" else 0.1
    return [replace(case, bias=bias, dropout_p=dropout_p, wide=wide)]


def sweep(
    capability: tuple[int, int],
    sms: int,
    *,
    only: Sequence[str] = (),
    jobs: int | None = None,
) -> list[Entry]:
    """Compile everything for a GPU in worker processes; an entry for each distinct compilation.

    The environment must not ask for Triton's interpreter.

    Args:
        capability, sms: the GPU's compute capability and number of multiprocessors.
        only: names of kernels, empty for all.
        jobs: processes; by default as many as there are processors.
    """
    every: list[AnyKernel] = [*sweep_cases(capability), *group_sweep_cases(capability)]
    every += gate_sweep_cases()
    cases = [case for case in every if not only or case.kernel in only]
    tasks = [(case, capability, sms) for case in cases]
    found: list[list[_Compiled]] = [[] for _ in cases]
    running = spread(compile_case, tasks, jobs or processors(), preload=[__name__])
    for index, result in progress(running, len(cases), "compiling"):
        if isinstance(result, Lost):
            result = [_Compiled(cases[index].kernel, f"lost {index}", None, result.reason)]
        found[index] = result
    entries: dict[str, Entry] = {}
    for case, compiled in zip(cases, found, strict=True):
        for one in compiled:
            if one.key not in entries:
                entries[one.key] = _entry(case, one, capability)
    return list(entries.values())


def versions(capability: tuple[int, int]) -> dict[str, str]:
    """What compiles for a GPU: Triton and the assembler that it takes."""
    ptxas = get_ptxas(capability[0] * 10 + capability[1])
    return {"triton": triton.__version__, "ptxas": ptxas.version}


def _entry(case: AnyKernel, one: _Compiled, capability: tuple[int, int]) -> Entry:
    of_case = one.kernel != "sum_partials"
    problem, warning = one.error, ""
    if one.resources is not None:
        kernel = case.kernel if of_case else one.kernel
        problem, warning = judge(kernel, case.config, one.resources, capability)
    where = (case.name, case.block) if of_case else (one.kernel, "")
    return Entry(*where, case.dtype_name, case.variant, one.resources, problem, warning)


def judge(
    kernel: str, config: Config, resources: Resources, capability: tuple[int, int]
) -> tuple[str, str]:
    """What is wrong with a compiled kernel, and what is worth a look; both may be empty."""
    problems, warning, limit = [], "", tuning.shared_memory(capability)
    if resources.shared > limit:
        problems.append(
            f"needs {resources.shared} bytes of shared memory, a block may have {limit}"
        )
    elif config.per_sm > 1 and (held := _per_sm(config, resources, limit)) < config.per_sm:
        problems.append(f"{config.per_sm} shall run on a multiprocessor, which holds {held}")
    if resources.spilled and (kernel in GEMMS or resources.spilled > SPILL_WARNING):
        problems.append(f"spills {resources.spilled} bytes")
    elif resources.spilled:
        warning = f"spills {resources.spilled} bytes"
    if (
        kernel in ("hopper", *HOPPER)
        and capability[0] == 9
        and "wgmma" not in resources.tensor_cores
    ):
        problems.append("does not use Hopper's own tensor-core instruction, wgmma")
    return "; ".join(problems), warning


def _per_sm(config: Config, resources: Resources, limit: int) -> int:
    """How many programs a multiprocessor holds, by registers and by shared memory.

    Source: CUDA C++ Programming Guide, compute capabilities 8.0 to 12.0: 65,536 registers, given
    out in eights a thread; 1 KiB more shared memory than one block may take, and 1 KiB of it kept
    by the system for each block.
    """
    registers = -(-resources.registers // 8) * 8 * config.warps * 32
    return min(65536 // registers, (limit + 1024) // (resources.shared + 1024))


def compile_case(task: tuple[AnyKernel, tuple[int, int], int]) -> list[_Compiled]:
    """Record what a case launches on the meta device, and compile it."""
    case, capability, sms = task
    with products_in(case.tf32):
        launches = launches_of(case, case.operands(torch.device("meta")), sms)
    return [_compile_once(launch, capability) for launch in launches]


_compiled_here: dict[str, _Compiled] = {}


def _compile_once(launch: Launch, capability: tuple[int, int]) -> _Compiled:
    source, name = source_of(launch), launch.kernel.__name__.removesuffix("_kernel")
    name = name.removeprefix("pointer_")
    key = f"{source.hash()} {sorted(launch.options.items())}"
    if key not in _compiled_here:
        try:
            found = _Compiled(name, key, _compile(source, launch.options, capability), "")
        except Exception as error:
            found = _Compiled(name, key, None, f"{type(error).__name__}: {error}")
        _compiled_here[key] = found
    return _compiled_here[key]
