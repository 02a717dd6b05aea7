"""What a call costs the host: forward and backward of one layer, in µs, by strategy.

``python -m benchmarks.host`` times the launching on a GPU; where there is none, Triton launches
through a stub of the CUDA driver, on which kernels take no time. It shows where small layers and
short batches are bound by Python instead of by the GPU. The sizes hardly matter to the host.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels import lora_linear, use_backend, use_strategy
from lora_kernels.proof import Case

from . import stub_driver

# Tall, so that the sums over rows are split: seven launches by `fused` and by `hopper`.
ROWS, WIDTH, RANK = 8192, 64, 16
# On the CPU torch's own products are real ones, and these take it no time.
TINY = 2, 8, 4
STRATEGIES = (("hopper", "hopper"), ("fused", "fused"), ("one_kernel", "fused"), ("aten", "aten"))
# Fewer launches than a stream holds before the host has to wait for the GPU.
CALLS, ROUNDS = 20, 50
HOPPER = (9, 0), 132, 227 * 1024  # capability, multiprocessors, shared memory of a block


def operands(rows: int, width: int, rank: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """x, W, A, B and dy of a square layer."""
    shapes = (rows, width), (width, width), (rank, width), (width, rank), (rows, width)
    made = [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes]
    return [t.requires_grad_(i in (0, 2, 3)) for i, t in enumerate(made)]


def ours(x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor, p: float = 0.0) -> None:
    """One LoRA linear, forward and backward."""
    y = lora_linear(x, w, a, b, scale=2.0, dropout_p=p, training=True)
    torch.autograd.grad(y, (x, a, b), dy)


def three_calls(x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> None:
    """The same by three of torch's."""
    torch.autograd.grad(F.linear(x, w) + 2.0 * F.linear(F.linear(x, a), b), (x, a, b), dy)


def frozen(x: Tensor, w: Tensor, a: Tensor, b: Tensor, dy: Tensor) -> None:
    """The linear without LoRA."""
    torch.autograd.grad(F.linear(x, w), x, dy)


def microseconds(call: Callable[[], None], rounds: int | None = None) -> float:
    """Of the host, a call; the least of some rounds, since other processes only add to it."""
    # Without a GPU all is done in this thread, whose own time others do not disturb.
    gpu = torch.cuda.is_available()
    clock = time.perf_counter if gpu else time.thread_time
    for _ in range(3):
        call()
    taken = []
    for _ in range(rounds or ROUNDS):
        if gpu:
            torch.cuda.synchronize()
        begin = clock()
        for _ in range(CALLS):
            call()
        taken.append((clock() - begin) / CALLS * 1e6)
    return min(taken)


def measurements(rounds: int | None = None) -> Iterator[tuple[str, Callable[[], float]]]:
    """Names, and what measures µs a call, on the GPU or on the stub, which must be active."""
    gpu = torch.cuda.is_available()
    device = "cuda" if gpu else "cpu"
    tall = operands(ROWS, WIDTH, RANK, torch.bfloat16, device)
    torchs = tall if gpu else operands(*TINY, torch.float32, device)
    yield "frozen linear", lambda: microseconds(lambda: frozen(*torchs), rounds)
    yield "three calls", lambda: microseconds(lambda: three_calls(*torchs), rounds)

    def by(forward: str, dx: str, p: float, given: list[Any]) -> float:
        with use_backend("triton"), use_strategy(forward, dx):
            return microseconds(lambda: ours(*given, p), rounds)

    for forward, dx in STRATEGIES:
        if gpu and forward == "hopper" and torch.cuda.get_device_capability()[0] != 9:
            continue
        given: list[Any] = torchs if forward == "aten" else tall
        yield f"{forward} + {dx}", partial(by, forward, dx, 0.0, given)
        if forward != "aten":
            yield f"{forward} + {dx}, dropout", partial(by, forward, dx, 0.1, given)


def measure() -> dict[str, float]:
    """µs a call by name; see `measurements`."""
    return {name: run() for name, run in measurements()}


def use_stub(folder: str) -> None:
    """Let Triton launch CPU tensors through the stub; for the rest of this process."""
    from triton import knobs

    assert Case  # with it all kernels have been decorated, to be compiled
    stub_driver.activate(stub_driver.build(Path(folder)), *HOPPER)
    knobs.runtime.interpret = True  # so that tensors on the CPU are taken


def main(arguments: list[str] | None = None) -> int:
    """Print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="one object instead of a table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set, and the interpreter launches nothing; unset it")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if not torch.cuda.is_available():
            if lacking := stub_driver.missing():
                parser.error(f"there is no GPU, and {lacking}")
            use_stub(folder)
        found = measure()
    if options.json:
        print(json.dumps(found))
        return 0
    where = "this GPU's host" if torch.cuda.is_available() else "a stub of the CUDA driver"
    print(f"Forward and backward, µs of the host a call, on {where}")
    for name, cost in found.items():
        print(f"{name:28} {cost:7.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
