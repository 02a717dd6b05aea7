"""Neighbours in memory are seen as one matrix, and nothing else is."""

from __future__ import annotations

import torch

from lora_kernels.group.packing import packed, stacked


def parts():
    return list(torch.randn(9, 5).split([4, 3, 2]))


def test_neighbours_are_a_view():
    each = parts()
    whole = packed(each)
    assert torch.equal(whole, torch.cat(each))
    assert whole.data_ptr() == each[0].data_ptr()
    assert packed(each[:1]).shape == (4, 5)


def test_what_is_no_row_of_neighbours():
    each = parts()
    assert packed([each[1], each[0]]) is None
    assert packed([each[0], each[2]]) is None
    assert packed([each[0], each[0]]) is None
    assert packed([each[0], each[1].clone()]) is None
    assert packed([each[0], each[1].double()]) is None
    assert packed([each[0].t()]) is None
    wide = torch.randn(9, 6)[:, :5]
    assert packed([wide[:4], wide[4:]]) is None
    flat = torch.randn(30)
    assert packed([flat[:20].view(4, 5), flat[20:].view(2, 5)]) is not None
    assert packed([flat[:20].view(4, 5), flat[20:].view(5, 2)]) is None


def test_stacked_in_the_widest_dtype_or_the_one_asked_for():
    each = [torch.randn(2, 3), torch.randn(1, 3).bfloat16()]
    assert stacked(each).dtype == torch.float32
    assert stacked(each, torch.float16).dtype == torch.float16
    assert torch.equal(stacked(each)[2:], each[1].float())
    assert stacked(each[1:]).dtype == torch.bfloat16
