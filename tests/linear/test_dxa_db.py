"""The pass over dy against plain products in float64."""

from __future__ import annotations

import itertools

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES, SHAPES, Case, make

from lora_kernels.kernels.tuning import Config
from lora_kernels.linear.dxa_db import compute_dxa_db

SCALE = 0.7


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
def test_dxa_db_dbias(case, dtype, device, poisoned):
    t = make(case, dtype, device)
    xa = torch.randn(case.m, case.r).to(device, dtype)
    ours = compute_dxa_db(t.dy, t.lora_b, xa, SCALE, need_dbias=True, config=Config(32, 32, 0))
    plain, truth = (
        (
            SCALE * (t.dy.to(d) @ t.lora_b.to(d)),
            SCALE * (t.dy.to(d).t() @ xa.to(d)),
            t.dy.to(d).sum(0),
        )
        for d in (dtype, torch.float64)
    )
    for name, *three in zip(("dxa", "db", "dbias"), ours, plain, truth, strict=True):
        assert_close(*three, name)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_dxa_db_gives_what_is_needed_and_no_more(needs):
    if torch.cuda.is_available():
        pytest.skip("what is computed does not depend on the device")
    t = make(Case(33, 17, 8, 3), torch.float32, "cpu")
    xa = torch.randn(33, 3)
    wanted = dict(zip(("need_dxa", "need_db", "need_dbias"), needs, strict=True))
    some = compute_dxa_db(t.dy, t.lora_b, xa, SCALE, **wanted, config=Config(16, 16, 0))
    whole = compute_dxa_db(t.dy, t.lora_b, xa, SCALE, need_dbias=True, config=Config(16, 16, 0))
    for needed, one, other in zip(needs, some, whole, strict=True):
        assert torch.equal(one, other) if needed else one is None


@pytest.mark.interpreted
def test_offsets_beyond_31_bits():
    wide = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    values = torch.randn(3, 64).half()
    wide.copy_(values)
    dxa, lora_b, config = torch.randn(3, 4).half(), torch.randn(64, 4).half(), Config(16, 16, 0)
    ours = compute_dxa_db(wide, lora_b, dxa, 1.0, need_dbias=True, config=config)
    same = compute_dxa_db(values, lora_b, dxa, 1.0, need_dbias=True, config=config)
    assert all(torch.equal(a, b) for a, b in zip(ours, same, strict=True))
