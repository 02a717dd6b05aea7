"""No number without a right answer: a contender's output and gradients against a float64 truth.

The budget is that of `lora_kernels.proof`: twice the distance from the truth that plain PyTorch
shows in the same dtype, plus one rounding of the largest value. Plain PyTorch is the statement as
three calls, as `addmm`, and with the big product added last: for a single token their sums run in
quite different orders, and each is as right as the others.

With dropout each contender draws its own mask. It is recovered from what the contender does: with
``W = 0`` and positive dy, A and B, dx is zero exactly where an element was dropped. The same draw
(torch's generator, seeded anew) is then held against the truth for that very mask, forward and
backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lora_kernels.proof import ROUNDING, distance

from .contenders import SCALE, Inputs, Step, Unavailable, make_inputs
from .shapes import Problem

SEED = 1234
# Standard deviations by which the share of kept elements may miss its expectation.
SIGMAS = 6.0


class GateError(AssertionError):
    """A contender computes something else; the message says which tensor is off and by how much."""


class Values(NamedTuple):
    """y and the gradients; None where there is none."""

    y: Tensor
    dx: Tensor
    da: Tensor | None
    db: Tensor | None


class Gate:
    """Judges the contenders of one problem, whose base products in float64 are made once.

    Args:
        problem: at its own sizes and dtype.
        device: where.
    """

    def __init__(self, problem: Problem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.inputs = make_inputs(problem, device, seed=SEED)
        x, weight, dy = (t.detach() for t in (self.inputs.x, self.inputs.weight, self.inputs.dy))
        self.base_y = x.double() @ weight.double().t()
        self.base_dx = dy.double() @ weight.double()
        self.plain_y, self.plain_dx = x @ weight.t(), dy @ weight

    def check(self, step: Step) -> None:
        """Run a contender on this problem's sizes and compare.

        Raises:
            GateError: it is off.
            Unavailable: it was forced onto a strategy that does not take this problem.
        """
        try:
            self._compare(step)
        except RuntimeError as error:
            if "was asked for" in str(error):
                raise Unavailable(str(error)) from error
            raise

    def _compare(self, step: Step) -> None:
        if not step.has_lora:
            truth = Values(self.base_y, self.base_dx, None, None)
            plain = [Values(self.plain_y, self.plain_dx, None, None)]
        else:
            keep = self._keep(step) if self.problem.dropout else None
            truth, plain = self._truth(keep), self._plain(keep)
        ours = self._run(step, self.inputs)
        for name in Values._fields:
            expected = getattr(truth, name)
            if expected is not None:
                references = [getattr(values, name) for values in plain]
                compare(f"{step.name}: {name}", getattr(ours, name), references, expected)

    def _run(self, step: Step, inputs: Inputs) -> Values:
        torch.manual_seed(SEED)
        step.bind(inputs)
        with step.chosen():
            y = step.forward()
            gradients = torch.autograd.grad(y, step.leaves(), inputs.dy)
        da, db = gradients[1:] if step.has_lora else (None, None)
        return Values(y.detach(), gradients[0], da, db)

    def _keep(self, step: Step) -> Tensor:
        positive = Inputs(*(t.detach().abs() for t in self.inputs))
        positive = positive._replace(weight=torch.zeros_like(positive.weight))
        # As the buffers that are timed, or compiled contenders would be compiled once more.
        constant = (id(positive.weight), id(positive.dy))
        positive = Inputs(*(t.requires_grad_(id(t) not in constant) for t in positive))
        keep = self._run(step, positive).dx != 0
        share, expected = keep.double().mean().item(), 1.0 - self.problem.dropout
        allowed = SIGMAS * math.sqrt(expected * (1.0 - expected) / keep.numel())
        if abs(share - expected) > allowed:
            raise GateError(
                f"{step.name}: keeps {share:.4f} of the elements where {expected:g} were asked for"
            )
        return keep

    def _truth(self, keep: Tensor | None) -> Values:
        x, dy = self.inputs.x.detach().double(), self.inputs.dy.double()
        a, b = self.inputs.lora_a.detach().double(), self.inputs.lora_b.detach().double()
        return self._formula(x, dy, a, b, keep, self.base_y, self.base_dx)

    def _plain(self, keep: Tensor | None) -> list[Values]:
        x, dy, weight, a, b = (
            t.detach()
            for t in (
                self.inputs.x,
                self.inputs.dy,
                self.inputs.weight,
                self.inputs.lora_a,
                self.inputs.lora_b,
            )
        )
        dropped = self._mask(x, keep)
        xa, dxa = dropped @ a.t(), (dy @ b).mul_(SCALE)
        branch, back = (xa * SCALE) @ b.t(), self._mask(dxa @ a, keep)
        da, db = dxa.t() @ dropped, (dy.t() @ xa).mul_(SCALE)
        return [
            self._formula(x, dy, a, b, keep, self.plain_y, self.plain_dx),
            Values(torch.addmm(self.plain_y, xa, b.t(), alpha=SCALE), self.plain_dx + back, da, db),
            Values(branch.addmm_(x, weight.t()), back.addmm_(dy, weight), da, db),
        ]

    def _formula(
        self,
        x: Tensor,
        dy: Tensor,
        a: Tensor,
        b: Tensor,
        keep: Tensor | None,
        base_y: Tensor,
        base_dx: Tensor,
    ) -> Values:
        dropped = self._mask(x, keep)
        xa = dropped @ a.t()
        dxa = (SCALE * dy) @ b
        return Values(
            y=base_y + SCALE * (xa @ b.t()),
            dx=base_dx + self._mask(dxa @ a, keep),
            da=dxa.t() @ dropped,
            db=(SCALE * dy).t() @ xa,
        )

    def _mask(self, tensor: Tensor, keep: Tensor | None) -> Tensor:
        if keep is None:
            return tensor
        return tensor * keep / (1.0 - self.problem.dropout)


def compare(what: str, got: Tensor, plain: Sequence[Tensor], truth: Tensor) -> None:
    """Raise GateError where ``got`` is farther from ``truth`` than the worst ``plain`` allows.

    A contender may give a gradient in a wider dtype than plain torch, and is held to no more.
    """
    dtype = plain[0].dtype
    if got.shape != truth.shape:
        raise GateError(f"{what} has shape {tuple(got.shape)} instead of {tuple(truth.shape)}")
    if torch.promote_types(got.dtype, dtype) != got.dtype:
        raise GateError(f"{what} is {got.dtype}, narrower than {dtype}")
    found = max(
        (distance(got, each.to(got.dtype), truth, ROUNDING[dtype]) for each in plain),
        key=lambda one: one.budget,
    )
    if not found.within:
        raise GateError(
            f"{what} is off by {found.ours:.3e} from the float64 truth, plain torch by "
            f"{found.plain:.3e}; the budget is {found.budget:.3e}"
        )
