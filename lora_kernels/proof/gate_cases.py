"""Calls of the kernels of gated activations, as `cases` has those of the products."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..kernels import gated
from ..kernels.activations import ACTIVATIONS, GATE_KERNELS, activate, slope_times
from ..kernels.tuning import Config, Shape
from .cases import DTYPE_NAMES, NARROW, Draw, Tensors


@dataclass(frozen=True)
class GateCase:
    """One call of one launcher; ``kernel`` is of `activations.GATE_KERNELS`.

    Attributes:
        shape: rows and columns, no contraction and no rank.
        sliced: gate and up are column slices of one matrix.
        need_h: backward makes h anew.
    """

    kernel: str
    activation: str
    dtype: torch.dtype
    shape: Shape
    sliced: bool = False
    need_h: bool = True

    # What other cases may have.
    dropout_p, bias, wide, tf32 = 0.0, False, False, False
    config = Config(warps=gated.WARPS, stages=1)

    @property
    def name(self) -> str:
        """The kernel and its activation, for each is a kernel of its own."""
        return f"{self.kernel} {self.activation}"

    @property
    def block(self) -> str:
        """Elements of a program, and its warps."""
        return f"{gated.BLOCK} w{gated.WARPS}"

    @property
    def dtype_name(self) -> str:
        """Such as ``bf16``."""
        return DTYPE_NAMES[self.dtype]

    @property
    def variant(self) -> str:
        """What else was asked for, in a few words."""
        words = {"sliced": self.sliced, "without h": not self.need_h}
        return ", ".join(word for word, on in words.items() if on) or "plain"

    def operands(self, device: torch.device) -> Tensors:
        """As `Case.operands`; gate and up side by side as ``both``."""
        draw, (m, n) = Draw(device), self.shape[:2]
        both = draw(2, m, n, dtype=self.dtype)
        both = both.transpose(0, 1).reshape(m, 2 * n) if self.sliced else both
        return {"both": both * 2.0, "dh": draw(m, n, dtype=self.dtype)}

    def run(self, t: Tensors) -> Tensors:
        """Call the launcher."""
        gate, up = self._apart(t)
        if self.kernel == "gate_forward":
            return {"h": gated.gate_forward(gate, up, self.activation)}
        # It writes over dh, which is read again.
        dh = t["dh"].clone()
        h, dgate, dup = gated.gate_backward(dh, gate, up, self.activation, self.need_h)
        return {"dgate": dgate, "dup": dup} | ({} if h is None else {"h": h})

    def state(self, t: Tensors) -> Tensors:
        """The same in plain torch, in the operands' dtype."""
        gate, up = self._apart(t)
        act = activate(gate, self.activation)
        h = {"h": act * up} if self.need_h or self.kernel == "gate_forward" else {}
        if self.kernel == "gate_forward":
            return h
        dgate = slope_times(t["dh"] * up, gate, self.activation)
        return {"dgate": dgate, "dup": t["dh"] * act, **h}

    def _apart(self, t: Tensors) -> tuple[Tensor, Tensor]:
        if not self.sliced:
            return t["both"][0], t["both"][1]
        gate, up = t["both"].chunk(2, 1)
        return gate, up


def gate_cases(sizes: Any, *, quick: bool = False) -> list[GateCase]:
    """Every kernel and activation in every dtype, round and in one piece, odd and sliced.

    ``sizes`` are `check.Sizes`.
    """
    dtypes = [dtype for dtype in NARROW if not (quick and dtype == torch.float16)]
    found = []
    for kernel, activation, dtype, name in product(
        GATE_KERNELS, ACTIVATIONS, (*dtypes, torch.float32), ("round", "odd")
    ):
        m, n, _ = getattr(sizes, name)
        shape, odd = Shape(m, n, 0, 0), name == "odd"
        case = GateCase(kernel, activation, dtype, shape, sliced=odd)
        found.append(case)
        if kernel == "gate_backward" and not quick:
            found.append(GateCase(kernel, activation, dtype, shape, sliced=odd, need_h=False))
    return found


def gate_sweep_cases() -> list[GateCase]:
    """What `resources.sweep` compiles: every kernel and activation in every dtype."""
    return [
        GateCase(kernel, activation, dtype, Shape(1024, 4096, 0, 0), need_h=need_h)
        for kernel, activation, dtype in product(
            GATE_KERNELS, ACTIVATIONS, (*NARROW, torch.float32)
        )
        for need_h in ((True, False) if kernel == "gate_backward" else (True,))
    ]
