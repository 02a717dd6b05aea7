"""da and db by the kernel of a thin matrix transposed times a wide one."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES, SHAPES, Case, make, seed_of

from lora_kernels.kernels import thin as kernels
from lora_kernels.kernels.dropout import keep_mask, pack_bits
from lora_kernels.kernels.tuning import Config

# Rank 8 and 24 are whole groups of 8 that 16 does not divide.
RANKS = [Case(40, 24, 48, 8), Case(40, 24, 48, 24)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES + RANKS, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_da(case, dtype, dropout_p, device, poisoned):
    t = make(case, dtype, device)
    dxa = torch.randn(case.m, case.r).to(device, dtype)
    keep = keep_mask(seed_of(5, device), case.m, case.k, dropout_p) if dropout_p else None
    bits = None if keep is None else pack_bits(keep)
    ours = kernels.compute_da(dxa, t.x, bits, dropout_p, config=Config(32, 0, 32))
    plain, truth = (
        dxa.to(d).t() @ (t.x.to(d) if keep is None else t.x.to(d) * keep / (1 - dropout_p))
        for d in (dtype, torch.float64)
    )
    assert_close(ours, plain, truth, "da")
    wide = kernels.compute_da(
        dxa, t.x, bits, dropout_p, dtype=torch.float32, config=Config(32, 0, 32)
    )
    assert wide.dtype == torch.float32 and torch.equal(wide.to(dtype), ours)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES + RANKS, ids=str)
def test_db(case, dtype, device, poisoned):
    t = make(case, dtype, device)
    xa = torch.randn(case.m, case.r).to(device, dtype)
    ours = kernels.compute_db(t.dy, xa, 0.7, dtype, config=Config(32, 0, 32))
    plain, truth = (0.7 * (t.dy.to(d).t() @ xa.to(d)) for d in (dtype, torch.float64))
    assert_close(ours, plain, truth, "db")
    assert ours.is_contiguous()


@pytest.mark.interpreted
def test_offsets_beyond_31_bits():
    wide = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    values = torch.randn(3, 64).half()
    wide.copy_(values)
    thin, config = torch.randn(3, 4).half(), Config(16, 0, 16)
    for mask in (None, torch.full((3, 8), 0b10110101, dtype=torch.uint8)):
        ours = kernels.compute_da(thin, wide, mask, 0.5, config=config)
        assert torch.equal(ours, kernels.compute_da(thin, values, mask, 0.5, config=config))
