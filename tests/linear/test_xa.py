"""``xa`` and the mask drawn with it, against the reference in float64."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES, SHAPES, make, seed_of

from lora_kernels.kernels.dropout import keep_mask, pack_bits
from lora_kernels.kernels.tuning import Config
from lora_kernels.linear import reference
from lora_kernels.linear.xa import compute_xa


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_xa(case, dtype, dropout_p, device, poisoned):
    t = make(case, dtype, device, factors=torch.float32)
    seed = seed_of(5, device) if dropout_p else None
    keep = keep_mask(seed, case.m, case.k, dropout_p) if dropout_p else None
    tensors = t.x, t.weight, t.lora_a.to(dtype), t.lora_b
    plain, truth = (
        reference.forward(*(one.to(d) for one in tensors), None, 1.0, keep, dropout_p)[1]
        for d in (dtype, torch.float64)
    )
    xa, bits = compute_xa(t.x, t.lora_a, seed, dropout_p, config=Config(16, 0, 32))
    assert_close(xa, plain, truth, "xa")
    assert (bits is None) if keep is None else torch.equal(_clean(bits, case.k), pack_bits(keep))


@pytest.mark.interpreted
def test_offsets_beyond_31_bits():
    wide = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    values = torch.randn(3, 64).half()
    wide.copy_(values)
    lora_a, config = torch.randn(4, 64).half(), Config(16, 0, 32)
    ours = compute_xa(wide, lora_a, seed_of(1, "cpu"), 0.5, config=config)
    same = compute_xa(values, lora_a, seed_of(1, "cpu"), 0.5, config=config)
    assert torch.equal(ours[0], same[0]) and torch.equal(ours[1], same[1])


def _clean(bits, columns):
    """The bytes with the lanes past the last column cleared; nobody reads those."""
    if columns % 8:
        bits = bits.clone()
        bits[:, -1] &= (1 << columns % 8) - 1
    return bits
