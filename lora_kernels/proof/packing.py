"""Compiled kernels that travel: packed on any machine, put into Triton's cache on another.

Triton finds a compiled kernel by a key in which, beside the kernel's source and options, every file
of the installed Triton counts, and those differ from one Python to the next. A cache that is copied
is therefore never hit. The hashes of sources and options alone agree wherever the versions do: a
pack holds cubins under these two, and `adopt` puts each under the key that Triton makes of them
here.

A pack is compiled code, which nothing here can judge: adopt only what you packed yourself.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import compiler, make_backend
from triton.runtime import cache, driver
from triton.runtime.jit import JITFunction

from ..adapters.files import write_atomically
from ..kernels.launching import Launch
from ..kernels.tuning import Shape
from .cases import EXACT_SCALE, LayerCase, products_in
from .check import ON_GPU, AnyCase, kernel_cases, layer_cases
from .gate_cases import gate_cases
from .group_probes import group_pack_cases
from .packs import LOCAL, Packed, read, write
from .resources import launches_of
from .workers import Lost, processors, progress, spread

# Output columns and contraction of the layers whose speed is looked at first: Llama-3-8B's and
# MiniMind's, and the numbers of tokens.
LAYERS = (
    *((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)),
    *((512, 512), (128, 512), (1408, 512), (512, 1408)),
)
TOKENS = (1, 16, 64, 256, 1024, 4096, 8192, 16384)


class Made(NamedTuple):
    """What became of `pack`: kernels and bytes written, and what did not compile."""

    kernels: int
    size: int
    failed: list[str]


class Adopted(NamedTuple):
    """What became of `adopt`.

    Attributes:
        fresh, present: kernels that were put into the cache, and that had been there.
        target: the GPU that the pack is for, such as ``sm_90``.
        differs: why the other kernels, or all, are compiled here as ever.
    """

    fresh: int
    present: int
    target: str
    differs: list[str]


def pack_cases(capability: tuple[int, int]) -> list[AnyCase]:
    """What ``check`` runs on such a GPU, and the layers and groups that are looked at first."""
    options: dict[str, Any] = {"quick": False, "tf32": True}
    cases: list[AnyCase] = [*kernel_cases(capability, ON_GPU, **options)]
    layers = layer_cases(capability, ON_GPU, **options)
    pairs = dict.fromkeys((case.forward, case.dx) for case in layers)
    for (n, k), m, (forward, dx), p in product(LAYERS, TOKENS, pairs, (0.0, 0.1)):
        shape = Shape(m, n, k, 16)
        # Factors in float32, as layers have them; a scale that alpha over rank mostly is.
        options = {"dropout_p": p, "wide": True, "scale": EXACT_SCALE}
        layers.append(LayerCase(forward, dx, capability, torch.bfloat16, shape, **options))
    cases += [layer for layer in layers if not layer.refusal]
    return cases + group_pack_cases(capability, ON_GPU) + gate_cases(ON_GPU)


def pack(
    out: Path,
    capability: tuple[int, int],
    sms: int,
    *,
    cases: Sequence[Any] | None = None,
    jobs: int | None = None,
) -> Made:
    """Compile what cases launch in worker processes, and write it all to one file.

    The environment must not ask for Triton's interpreter. What Triton's cache here holds already
    is taken from there. Equal kernels give equal bytes.

    Args:
        out: the file to write, whole or not at all.
        capability, sms: the GPU's compute capability and number of multiprocessors.
        cases: `pack_cases` by default; or what else has ``operands``, ``run`` and ``tf32`` as they
            do, for what its ``run`` launches.
        jobs: processes; by default as many as there are processors.

    Raises:
        OSError: the file cannot be written.
    """
    cases = pack_cases(capability) if cases is None else cases
    tasks = [(case, capability, sms) for case in cases]
    found: dict[tuple[str, str], Packed] = {}
    failed = []
    running = spread(compile_case, tasks, jobs or processors(), preload=[__name__])
    for _, result in progress(running, len(tasks), "compiling"):
        if isinstance(result, Lost):
            failed.append(result.reason)
            continue
        compiled, errors = result
        failed += errors
        found.update({(one.source, one.options): one for one in compiled})
    kernels = [found[key] for key in sorted(found)]
    written = write(kernels, capability, versions(capability))
    write_atomically(out, lambda path: path.write_bytes(written))
    return Made(len(kernels), len(written), list(dict.fromkeys(failed)))


def compile_case(
    task: tuple[Any, tuple[int, int], int],
) -> tuple[list[Packed], list[str]]:
    """Compile what a case launches, as for a launch; only what this process had not yet done."""
    case, capability, sms = task
    driver.set_active(_Absent(capability))
    done, errors = [], []
    with products_in(case.tf32):
        launches = launches_of(case, case.operands(torch.device("meta")), sms)
    for launch in launches:
        try:
            done += _compiled(launch)
        except Exception as error:
            errors.append(f"{launch.kernel.__name__}: {type(error).__name__}: {error}"[:500])
    return done, errors


class _Absent:
    """Stands for the driver of a GPU that is not here: what Triton asks before it compiles."""

    def __init__(self, capability: tuple[int, int]):
        self.arch = capability[0] * 10 + capability[1]

    def get_current_device(self) -> int:
        return self.arch  # Triton remembers a kernel by its device, and takes it for one GPU

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


_sent: set[str] = set()


def _compiled(launch: Launch) -> list[Packed]:
    with _key_parts() as parts:
        kernel = launch.kernel.warmup(**launch.arguments, grid=(1,), **launch.options)
    if kernel.hash in _sent:
        return []
    if kernel.hash not in parts:
        raise RuntimeError(f"Triton {triton.__version__} makes its keys in a way unknown here")
    _sent.add(kernel.hash)
    source, options = parts[kernel.hash]
    stem = kernel.src.name[:150]
    files = cache.get_cache_manager(kernel.hash).get_group(f"{stem}.json") or {}
    metadata = json.loads(Path(files[f"{stem}.json"]).read_text(encoding="utf-8"))
    metadata = {name: fact for name, fact in metadata.items() if name not in LOCAL}
    code = launch.kernel.cache_key
    return [Packed(_name(launch.kernel), code, source, options, kernel.asm["cubin"], metadata)]


@contextmanager
def _key_parts() -> Iterator[dict[str, tuple[str, str]]]:
    """The hashes of source and options of each key that Triton makes inside the ``with``."""
    real, parts = compiler.get_cache_key, dict[str, tuple[str, str]]()

    def noted(src: Any, backend: Any, backend_options: Any, env_vars: Any) -> str:
        key = real(src, backend, backend_options, env_vars=env_vars)
        parts[hashlib.sha256(key.encode()).hexdigest()] = src.hash(), backend_options.hash()
        return key

    compiler.get_cache_key = noted
    try:
        yield parts
    finally:
        compiler.get_cache_key = real


def _name(kernel: JITFunction) -> str:
    return f"{kernel.fn.__module__}.{kernel.fn.__name__}"


def versions(capability: tuple[int, int]) -> dict[str, str]:
    """What has to agree for a kernel packed there to be Triton's own here, beside its source."""
    backend = make_backend(_Absent(capability).get_current_target())
    environment = sorted(compiler.get_cache_invalidating_env_vars().items())
    return {
        "triton": triton.__version__,
        "ptxas": backend.hash(),
        "environment": ", ".join(f"{name}={value}" for name, value in environment),
    }


def adopt(path: Path) -> Adopted:
    """Put the kernels of a pack into Triton's cache, where calls find them in place of compiling.

    Nothing of what the cache holds is replaced. Kernels whose source here is another, and all of
    them where `versions` differ, are left out: they compile as ever. The environment must not ask
    for Triton's interpreter.

    Raises:
        PackError: see `read`; nothing is written then.
        OSError: the pack cannot be read, or the cache not be written.
    """
    manifest, kernels = read(path)
    major, minor = manifest["capability"]
    target, here = f"sm_{major}{minor}", versions((major, minor))
    differs = [
        f"packed with {name} {_short(manifest[name])}, here it is {_short(here[name])}"
        for name in here
        if manifest[name] != here[name]
    ]
    if differs:
        return Adopted(0, 0, target, differs)
    code = _code_here()
    others = sorted({one.kernel for one in kernels if code.get(one.kernel) != one.code})
    differs = [f"{name} has another source here, or is not there" for name in others]
    fresh = present = 0
    for one in kernels:
        if one.kernel not in others:
            put = _put(one, (major, minor))
            fresh, present = fresh + put, present + (not put)
    return Adopted(fresh, present, target, differs)


def _short(text: str) -> str:
    """A version in one line, of ptxas the one that tells."""
    release = re.search(r"V\d[\w.]*", text)
    return release[0] if release else " ".join(text.split())[-200:] or "none"


def _code_here() -> dict[str, str]:
    """Triton's hash of the source of every kernel of this package, by name."""
    package = __name__.partition(".")[0]
    return {
        _name(kernel): kernel.cache_key
        for name, module in list(sys.modules.items())
        if name.startswith(f"{package}.")
        for kernel in vars(module).values()
        if isinstance(kernel, JITFunction) and kernel.fn.__module__ == name
    }


class _Hashed:
    """Stands for what Triton would take a hash of."""

    def __init__(self, text: str):
        self.text = text

    def hash(self) -> str:
        return self.text


def _put(one: Packed, capability: tuple[int, int]) -> bool:
    """Write a kernel under its key here; False if there is something already."""
    backend = make_backend(_Absent(capability).get_current_target())
    environment = compiler.get_cache_invalidating_env_vars()
    key = cache.get_cache_key(
        _Hashed(one.source), backend, _Hashed(one.options), env_vars=environment
    )
    digest = hashlib.sha256(key.encode()).hexdigest()
    manager, described = cache.get_cache_manager(digest), f"{one.stem}.json"
    if manager.get_group(described) is not None:
        return False
    libraries = backend.parse_options({"enable_fp_fusion": True}).extern_libs  # unset, 3.9 warns
    own = {"hash": digest, "extern_libs": libraries}
    code = f"{one.stem}.cubin"
    paths = {
        code: manager.put(one.cubin, code),
        described: manager.put(json.dumps({**own, **one.metadata}), described, binary=False),
    }
    manager.put_group(described, paths)  # last: without it there is nothing for Triton
    return True
