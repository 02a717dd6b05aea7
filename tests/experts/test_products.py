"""torch's grouped product as the experts use it."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.experts.products import group_of_rows, outer, padded, serves, times

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)


def test_times_and_outer():
    rows, right, matrices = torch.randn(5, 8), torch.randn(5, 4), torch.randn(3, 8, 4)
    found = times(rows, matrices, OFFSETS)
    torch.testing.assert_close(found[:2], rows[:2] @ matrices[0])
    torch.testing.assert_close(found[2:], rows[2:] @ matrices[2])
    found = outer(rows, right, OFFSETS)
    torch.testing.assert_close(found[0], rows[:2].t() @ right[:2])
    torch.testing.assert_close(found[2], rows[2:].t() @ right[2:])


def test_a_group_without_rows_is_zero_whatever_the_product_left_there(monkeypatch):
    real = torch._grouped_mm

    def unwritten(left, right, offs):
        found = real(left, right, offs=offs)
        found[1] = torch.nan
        return found

    monkeypatch.setattr(torch, "_grouped_mm", unwritten)
    assert outer(torch.randn(5, 8), torch.randn(5, 4), OFFSETS)[1].count_nonzero() == 0


@pytest.mark.parametrize(
    ("dtype", "k", "n", "served"),
    [
        (torch.float32, 8, 4, True),
        (torch.float32, 6, 4, False),
        (torch.bfloat16, 8, 16, True),
        (torch.float16, 8, 4, False),
        (torch.float64, 8, 8, False),
    ],
)
def test_serves_what_begins_on_sixteen_bytes(dtype, k, n, served):
    assert serves(torch.ones(3, k, dtype=dtype), n) is served
    assert not serves(torch.ones(0, k, dtype=dtype), n)


@pytest.mark.parametrize(("dtype", "width"), [(torch.float32, 4), (torch.bfloat16, 8)])
def test_ranks_are_padded_with_zeros(dtype, width):
    factor = torch.ones(2, 3, 5, dtype=dtype)
    wide = padded(factor, 1)
    assert wide.shape == (2, width, 5) and wide.sum() == factor.sum()
    assert padded(factor.mT, 2).shape == (2, 5, width)
    assert padded(wide, 1) is wide


def test_the_group_of_each_row():
    assert group_of_rows(OFFSETS, 7).tolist() == [0, 0, 2, 2, 2, 3, 3]
