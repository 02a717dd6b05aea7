"""Triton on a CUDA driver that is none: ``cuda_stub.c`` built, loaded, and made the active one.

All of it is process-global and cannot be undone, so it belongs into processes of its own, in which
TRITON_INTERPRET is not set.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

SOURCE = Path(__file__).with_name("cuda_stub.c")


def missing() -> str:
    """What this machine lacks to build the stub and Triton's launcher, empty if nothing."""
    if sys.platform != "linux":
        return "the stub of a CUDA driver is built on Linux"
    if compiler() is None:
        return "there is no C compiler (cc, gcc, clang, or what CC names)"
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        return "Python.h is missing, with which Triton builds its launcher"
    return ""


def compiler() -> str | None:
    """The C compiler here, None if there is none."""
    named = [os.environ["CC"]] if os.environ.get("CC") else []
    return next(filter(None, map(shutil.which, [*named, "cc", "gcc", "clang"])), None)


def build(folder: Path) -> Path:
    """Compile the stub as ``folder/libcuda.so.1``.

    Raises:
        RuntimeError: the compiler failed; with what it printed.
    """
    import triton

    headers = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    command = [str(compiler()), "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{headers}"]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(library), str(SOURCE)]
    ran = subprocess.run(command, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{ran.stderr}")
    return library


def activate(
    library: Path, capability: tuple[int, int], sms: int, shared: int
) -> tuple[ctypes.CDLL, object]:
    """Make Triton launch through the stub, which poses as a GPU; tensors stay on the CPU.

    Args:
        library: of `build`.
        capability, sms, shared: the GPU's compute capability, multiprocessors, and bytes of shared
            memory that a block may ask for.

    Returns:
        The stub, whose ``stub_launches()`` counts, and Triton's driver.
    """
    # Its name is the driver's: what asks for libcuda.so.1 from now on gets this one.
    stub = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    stub.stub_launches.restype = ctypes.c_ulonglong
    stub.stub_be(*capability, sms, shared)
    from triton import knobs
    from triton.backends.nvidia.driver import CudaDriver
    from triton.runtime import driver

    knobs.nvidia.libcuda_path = str(library.parent)
    active = CudaDriver()
    active.get_current_device = lambda: 0
    active.get_current_stream = lambda device: 0
    active.get_device_capability = lambda device: capability
    driver.set_active(active)
    for name, module in list(sys.modules.items()):
        if name.startswith("lora_kernels.") and hasattr(module, "num_sms"):
            module.num_sms = lambda x: sms  # of a tensor on the CPU it would be a small number
    return stub, active
