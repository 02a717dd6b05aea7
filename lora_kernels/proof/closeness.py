"""One policy for closeness: an error budget against a float64 truth.

Our distance from the truth may be at most `MULTIPLE` times the distance that plain torch shows in
the same dtype, plus one rounding of the largest value.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

MULTIPLE = 2.0
ROUNDING = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}
TF32_ROUNDING = 2.0**-10


class Distance(NamedTuple):
    """Largest absolute distances from the truth: ours, plain torch's, and what ours may be."""

    ours: float
    plain: float
    budget: float

    @property
    def within(self) -> bool:
        """Whether ours keeps to the budget; a NaN does not, and an infinite budget allows none."""
        return self.ours <= self.budget < math.inf


def distance(ours: Tensor, plain: Tensor, truth: Tensor, rounding: float | None = None) -> Distance:
    """How far ``ours`` and ``plain`` are from ``truth``, three tensors of one shape.

    Args:
        ours, plain: of one dtype.
        truth: float64.
        rounding: of one product relative to the largest value; that of ours' dtype by default.
    """
    assert ours.shape == plain.shape == truth.shape, (ours.shape, plain.shape, truth.shape)
    assert ours.dtype == plain.dtype, (ours.dtype, plain.dtype)
    assert truth.dtype == torch.float64
    if not truth.numel():
        return Distance(0.0, 0.0, 0.0)
    our_error = (ours.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    unit = ROUNDING[ours.dtype] if rounding is None else rounding
    budget = MULTIPLE * plain_error + unit * truth.abs().max().item()
    return Distance(our_error, plain_error, budget)
