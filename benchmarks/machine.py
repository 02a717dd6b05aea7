"""What a row is stamped with, and the two ceilings of the machine at hand."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shutil
import statistics
import subprocess
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
# Assumed where the system does not tell.
CPU_CACHE_BYTES = 32 * 2**20


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Of a GPU its name; of a CPU also what decides its speed here."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    features = [f for f in ("avx512_bf16", "amx_bf16") if torch.cpu.get_capabilities().get(f)]
    threads = torch.get_num_threads()
    counts = f"{os.cpu_count()} cores, {threads} thread{'s' if threads > 1 else ''} used"
    return ", ".join((name, *features, counts))


def cache_bytes(device: torch.device) -> int:
    """The largest cache between the arithmetic and the memory, in bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    largest = 0
    for size in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = size.read_text(encoding="utf-8").strip()
        unit = {"K": 2**10, "M": 2**20}.get(text[-1:], 0)
        largest = max(largest, int(text[:-1]) * unit if unit else 0)
    return largest or CPU_CACHE_BYTES


def version(distribution: str) -> str | None:
    """Of an installed distribution, without importing it; None if it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None


def commit() -> str:
    """The short hash of the checkout, with ``+`` where files differ from it, or ``unknown``."""
    head = _output("git", "rev-parse", "--short=10", "HEAD")
    if not head:
        return "unknown"
    return head + ("+" if _output("git", "status", "--porcelain", "-uno") else "")


def stamp(device: torch.device, commit_id: str | None = None) -> dict[str, Any]:
    """Device, driver, versions, commit and date: what makes a number comparable with another."""
    driver = None
    if device.type == "cuda":
        driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        driver = driver.splitlines()[0] if driver else None
    return {
        "device": device_name(device),
        "driver": driver,
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "torch": torch.__version__,
        "triton": version("triton"),
        "peft": version("peft"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "commit": commit_id or commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def ceilings(device: torch.device) -> dict[str, Any]:
    """Bytes a second of a large copy (read + written) and FLOP/s of large products on random data.

    Returns:
        ``{"bandwidth": …, "flops": {"float32": …, "bfloat16": …}}``, each the median of several.
    """
    on_gpu = device.type == "cuda"
    source = torch.randn((2**30 if on_gpu else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    moved = 2 * source.numel() * source.element_size()
    bandwidth = moved / _median_seconds(partial(target.copy_, source), device)
    del source, target
    size = 8192 if on_gpu else 1024
    flops = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _median_seconds(partial(torch.mm, a, b, out=out), device)
        flops[str(dtype).removeprefix("torch.")] = 2 * size**3 / seconds
    return {"bandwidth": bandwidth, "flops": flops}


def _median_seconds(function: Any, device: torch.device, repeats: int = 7) -> float:
    # An idle GPU clocks down. Several are started together, so that launches do not count.
    together, warm = (10, 0.3) if device.type == "cuda" else (1, 0.0)
    samples: list[float] = []
    begin = time.perf_counter()
    while len(samples) < 2 or time.perf_counter() - begin < warm:
        samples.append(_seconds(function, device, together))
        if samples[-1] > 0.3:  # as bfloat16 on a CPU without instructions for it
            return samples[-1]
    return statistics.median(_seconds(function, device, together) for _ in range(repeats))


def _seconds(function: Any, device: torch.device, together: int) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(together):
        function()
    synchronize(device)
    return (time.perf_counter() - start) / together
