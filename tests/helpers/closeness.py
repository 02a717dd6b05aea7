"""`lora_kernels.proof.closeness` as an assertion."""

from __future__ import annotations

import torch

from lora_kernels.proof.closeness import ROUNDING, distance


def assert_close(ours, plain, truth, what="", products=1):
    """Fail if ``ours`` is farther from ``truth`` than the budget that ``plain`` sets.

    Of ``products`` taken one after the other each is rounded once.
    """
    assert ours.shape == truth.shape, f"{what}: shape {tuple(ours.shape)}, not {truth.shape}"
    assert ours.dtype == plain.dtype, f"{what}: dtype {ours.dtype}, not {plain.dtype}"
    assert truth.dtype == torch.float64
    found = distance(ours, plain, truth, products * ROUNDING[ours.dtype])
    if not found.within:
        raise AssertionError(
            f"{what}: off by {found.ours:.3e} from the float64 truth, plain torch by "
            f"{found.plain:.3e}, budget {found.budget:.3e}"
        )
