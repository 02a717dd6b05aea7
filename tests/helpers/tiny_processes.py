"""A few processes that talk to each other by gloo, as torchrun would start them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

# Imported once, by the server that the processes are forked from.
_PRELOADED = [
    "torch.distributed.fsdp",
    "torch.distributed.device_mesh",
    "transformers.modeling_utils",
    "transformers.generation",
    "minimind.training.jobs",
]


class Ended(NamedTuple):
    """What became of a process."""

    code: int
    result: Any
    out: str
    err: str


def in_processes(function, *arguments, size=2, timeout=120, check=True):
    """Run ``function(*arguments)`` in ``size`` processes and tell what became of each, by rank.

    The function must be at the top of a module. A process that is not done after ``timeout``
    seconds is a failure, and so is one that fails, unless ``check`` is false.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    # Held here, as torchrun's agent does, so that no free port need be guessed.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processes = [
            context.Process(
                target=_run, args=(function, arguments, rank, size, store.port, name, os.getcwd())
            )
            for rank in range(size)
        ]
        for process in processes:
            process.start()
        deadline = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
        hung = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        ended = [_ended(folder, rank, p.exitcode) for rank, p in enumerate(processes)]
    report = "\n".join(f"--- {rank}: exit code {e.code}\n{e.err}" for rank, e in enumerate(ended))
    assert not hung, f"{hung} were not done after {timeout} s\n{report}"
    assert not check or all(e.code == 0 for e in ended), report
    return ended


def results(*arguments, **options):
    """What the function of `in_processes` returned, by rank."""
    return [ended.result for ended in in_processes(*arguments, **options)]


def _ended(folder, rank, code):
    texts = [(folder / f"{rank}.{stream}") for stream in ("out", "err")]
    out, err = (path.read_text("utf-8") if path.exists() else "" for path in texts)
    answer = folder / f"{rank}.pickle"
    return Ended(code, pickle.loads(answer.read_bytes()) if answer.exists() else None, out, err)


def _run(function, arguments, rank, size, port, folder, directory):
    os.chdir(directory)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    for number, stream in ((1, "out"), (2, "err")):
        file = os.open(Path(folder) / f"{rank}.{stream}", os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    answer = function(*arguments)
    (Path(folder) / f"{rank}.pickle").write_bytes(pickle.dumps(answer))
