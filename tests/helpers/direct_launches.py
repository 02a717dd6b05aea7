"""Whether a prepared kernel launches what Triton would: both, on a stub of the CUDA driver.

Each strategy of a layer runs through Triton's own launch and then directly, with every allocation
in the same place; grid, function and arguments are compared as Triton's launcher receives them.
Prints what differs, as JSON.
"""

from __future__ import annotations

import functools
import json
import pathlib
import tempfile
from typing import Any

import launching
import torch
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher

from benchmarks import stub_driver
from lora_kernels.kernels import launching as way
from lora_kernels.proof.cases import LayerCase

TARGET = "sm_90"
log: list[Any] = []
_launch = CudaLauncher.__call__


@functools.wraps(_launch)  # its signature is looked at
def noted(self: Any, *arguments: Any) -> Any:
    # Of five, stream and function are the last; metadata and three hooks come before the kernel's.
    log.append((arguments[:5], [_plain(one) for one in arguments[9:]]))
    return _launch(self, *arguments)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    if isinstance(value, way.TensorDescriptor):
        described = value.shape, value.strides, value.block_shape, value.padding
        return value.base.data_ptr(), value.base.dtype, *map(str, described)
    return value


class SamePlaces:
    """``torch.empty`` that gives the same memory in each run."""

    def __init__(self) -> None:
        self.real, self.made, self.turn = torch.empty, [], 0

    def __call__(self, *shape: Any, **options: Any) -> torch.Tensor:
        if self.turn == len(self.made):
            self.made.append(self.real(*shape, **options))
        self.turn += 1
        return self.made[self.turn - 1]


def launched(case: LayerCase, operands: dict[str, torch.Tensor], places: SamePlaces) -> list[Any]:
    log.clear()
    places.turn = 0
    case.run(operands)
    return list(log)


def compare(case: LayerCase, shift: str = "") -> list[str]:
    """What differs between the two ways, ``shift`` being an operand moved off 16 bytes."""
    operands = {
        name: torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
        for name, like in case.operands(torch.device("meta")).items()
    }
    operands.pop("keep", None)
    places = SamePlaces()
    torch.empty = places
    try:
        launched(case, operands, places)  # compiles, and keeps what it compiled
        if shift:
            whole = operands[shift]
            room = places.real(whole.numel() + 1, dtype=whole.dtype)
            operands[shift] = room[1:].view(whole.shape)
            launched(case, operands, places)
        knobs.runtime.launch_enter_hook.add(_watch)
        ordinary = launched(case, operands, places)
        knobs.runtime.launch_enter_hook.remove(_watch)
        counts.append(count_ordinary(lambda: direct.extend(launched(case, operands, places))))
    finally:
        torch.empty = places.real
    found = [f"{len(ordinary)} launches, {len(direct)} directly"] * (len(ordinary) != len(direct))
    for index, (one, other) in enumerate(zip(ordinary, direct, strict=False)):
        if one != other:
            found.append(f"launch {index}: {one} by Triton, {other} directly")
    direct.clear()
    return [f"{case.name} {case.variant} {shift}: {text}" for text in found]


def _watch(metadata: Any) -> None:
    pass


direct: list[Any] = []
counts: list[int] = []


def count_ordinary(run: Any) -> int:
    """How many launches of a run went Triton's own way."""
    before, real = [], way.Prepared._launch

    def counted(self: Any, tensors: Any) -> None:
        before.append(self)
        real(self, tensors)

    way.Prepared._launch = counted  # type: ignore[method-assign]
    try:
        run()
    finally:
        way.Prepared._launch = real  # type: ignore[method-assign]
    return len(before)


def main() -> None:
    """Compare every strategy, and one with operands moved off 16 bytes.

    ``ordinary`` counts launches that should have been direct and were not, ``shifted`` those that
    went Triton's way because of an operand's address.
    """
    CudaLauncher.__call__ = noted
    with tempfile.TemporaryDirectory() as folder:
        launching.driver_for(TARGET, str(stub_driver.build(pathlib.Path(folder))))
        layers = [case for case in launching.some_cases(TARGET) if isinstance(case, LayerCase)]
        found = [text for case in layers for text in compare(case)]
        facts: dict[str, Any] = {"layers": len(layers), "ordinary": sum(counts), "shifted": {}}
        fused = next(case for case in layers if case.forward == "fused" and not case.dropout_p)
        for name in ("x", "weight", "a", "b", "dy"):
            counts.clear()
            found += compare(fused, name)
            facts["shifted"][name] = sum(counts)
        print(json.dumps(facts | {"found": found}))


if __name__ == "__main__":
    main()
