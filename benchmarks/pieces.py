"""What a LoRA linear is made of, each part by itself: products and passes over one big operand."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lora_kernels.kernels import Shape, lookup
from lora_kernels.proof import Case, Tensors

from . import measure
from .contenders import SCALE, Inputs, Unavailable
from .shapes import DTYPES, Problem

PACKED = 8  # keep bits in a byte
FACTOR = 4  # bytes of a factor's element


class Piece(NamedTuple):
    """One part of the work, to be timed.

    Attributes:
        name: such as ``y by hopper``; the first is torch's own product.
        flops: of a matrix product the base product's alone, so that all compare; else 0.
        bytes: of a pass over memory, each operand once; else 0.
        prepared: makes the call for operands, or raises Unavailable.
        block: its row of the table, empty for torch's own.
        role: ``forward`` or ``dx`` for the products of a role.
    """

    name: str
    flops: float
    bytes: float
    prepared: Callable[[], Callable[[Tensors], Any]]
    block: str = ""
    role: str = ""


class PieceCall(measure.Call):
    """A piece, every time on the next set of operands."""

    def __init__(self, work: Callable[[Tensors], Any], ring: Sequence[Tensors]) -> None:
        self.work, self.ring, self.turn = work, ring, 0

    def prepare(self) -> None:
        self.turn = (self.turn + 1) % len(self.ring)

    def run(self) -> Any:
        return self.work(self.ring[self.turn])


def operands(inputs: Inputs, dropout_p: float) -> Tensors:
    """What the pieces read, the factors in float32 as layers hold them; a mask with dropout."""
    x, weight, a, b, dy = (
        t.detach() for t in (inputs.x, inputs.weight, inputs.wide_a, inputs.wide_b, inputs.dy)
    )
    made = {"x": x, "weight": weight, "a": a, "b": b, "dy": dy}
    made |= {"xa": x @ a.to(x.dtype).t(), "dxa": dy @ b.to(dy.dtype)}
    if dropout_p:
        columns = math.ceil(x.shape[1] / PACKED)
        made["bits"] = torch.randint(256, (x.shape[0], columns), dtype=torch.uint8, device=x.device)
        made["seed"] = torch.randint(2**62, (1,), device=x.device)
    return made


def _forward(t: Tensors) -> Tensors:
    return {"p": t["x"], "q": t["weight"].t(), "u": t["xa"], "v": t["b"].t()}


def _dx(t: Tensors) -> Tensors:
    found = {"p": t["dy"], "q": t["weight"], "u": t["dxa"], "v": t["a"]}
    return found | ({"bits": t["bits"]} if "bits" in t else {})


def _da(t: Tensors) -> Tensors:
    return {**t, "xa": t["dxa"]}


def pieces(problem: Problem, capability: tuple[int, int]) -> Iterator[Piece]:
    """The parts of a problem; with dropout, those alone that it changes."""
    m, k, n, r, p = problem.m, problem.k, problem.n, problem.rank, problem.dropout
    dtype = DTYPES[problem.dtype]
    size, flops = dtype.itemsize, 2.0 * m * k * n
    mask = m * math.ceil(k / PACKED) if p else 0
    forward, dx = Shape(m, n, k, r), Shape(m, k, n, r)

    def piece(
        name: str,
        kernel: str,
        shape: Shape,
        view: Callable[[Tensors], Tensors],
        *,
        moved: float = 0.0,
        role: str = "",
        then: Callable[[Tensors, Tensors], Any] | None = None,
    ) -> Piece:
        try:
            config = lookup(kernel, capability, size, shape)
        except LookupError as error:
            return Piece(name, flops, 0.0, partial(_refuse, str(error)), role=role)
        case = Case(
            kernel, config, dtype, shape, dx=role == "dx" or "dx" in name, dropout_p=p, scale=SCALE
        )

        def work(t: Tensors) -> Any:
            made = case.launch(view(t))
            return made if then is None else then(made, t)

        return Piece(
            name, 0.0 if moved else flops, moved, lambda: work, f"{kernel} {case.block}", role
        )

    def plain(name: str, work: Callable[[Tensors], Any], role: str) -> Piece:
        return Piece(name, flops, 0.0, lambda: work, role=role)

    if not p:
        yield plain("y by torch", lambda t: F.linear(t["x"], t["weight"]), "forward")
        yield plain("dx by torch", lambda t: t["dy"] @ t["weight"], "dx")
        yield piece("y by hopper", "hopper", forward, _forward, role="forward")
        yield piece("y by fused", "gemm", forward, _forward, role="forward")
        yield piece(
            "y by beta1",
            "expand",
            forward,
            _forward,
            role="forward",
            then=lambda made, t: made["y"].addmm_(t["x"], t["weight"].t()),
        )
    if r <= 64:
        yield piece("y and xa by one_kernel", "one_kernel", forward, dict, role="forward")
    yield piece("dx by hopper", "hopper", dx, _dx, role="dx")
    yield piece("dx by fused", "gemm", dx, _dx, role="dx")
    yield piece(
        "dx by beta1",
        "expand",
        dx,
        _dx,
        role="dx",
        then=lambda made, t: made["dx"].addmm_(t["dy"], t["weight"]),
    )
    yield piece("xa", "xa", forward, dict, moved=size * (m * k + m * r) + FACTOR * r * k + mask)
    if not p:
        yield piece(
            "expand y", "expand", forward, _forward, moved=size * (m * n + m * r) + FACTOR * r * n
        )
        both = size * (m * n + 2 * m * r) + 2 * FACTOR * n * r
        yield piece("dxa_db", "dxa_db", forward, dict, moved=both)
    yield piece(
        "expand dx", "expand", dx, _dx, moved=size * (m * k + m * r) + FACTOR * r * k + mask
    )
    yield piece("da", "da", forward, _da, moved=size * (m * k + m * r) + FACTOR * r * k + mask)


def _refuse(reason: str) -> Callable[[Tensors], Tensor]:
    raise Unavailable(reason)
