"""One policy for closeness: an error budget against a float64 truth.

Our distance from the truth may be at most ``MULTIPLE`` times the distance that plain torch shows
in the same dtype, plus one rounding of the largest value.
"""

from __future__ import annotations

import torch

MULTIPLE = 2.0
ROUNDING = {
    torch.float64: 2.0**-52,
    torch.float32: 2.0**-23,
    torch.float16: 2.0**-10,
    torch.bfloat16: 2.0**-7,
}


def assert_close(ours, plain, truth, what=""):
    """Fail if ``ours`` is farther from ``truth`` than the budget that ``plain`` sets."""
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, not {truth.shape}"
    assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype}, not {plain.dtype}"
    assert truth.dtype == torch.float64
    if not truth.numel():
        return
    our_error = (ours.double() - truth).abs().max().item()
    plain_error = (plain.double() - truth).abs().max().item()
    budget = MULTIPLE * plain_error + ROUNDING[ours.dtype] * truth.abs().max().item()
    # `not <=` so that a NaN fails.
    if not our_error <= budget:
        raise AssertionError(
            f"{what}: off by {our_error:.3e} from the float64 truth, plain torch by "
            f"{plain_error:.3e}, budget {budget:.3e}"
        )
