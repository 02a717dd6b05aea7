"""One pass over each dy for every member's dxa, db and dbias, against float64."""

from __future__ import annotations

import itertools

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES
from kernel_groups import MEMBERS

from lora_kernels.group import dxa_db
from lora_kernels.group.dxa_db import compute_group_dxa_db
from lora_kernels.kernels.tuning import Config

# Small enough to be split over rows and over columns both.
CONFIG = Config(16, 16)


def columns(group):
    return [span.start for span in group.spans()]


def statement(group, xa):
    dxas, dbs, dbiases = [], [], []
    for dy, lora_b, scale, span in zip(
        group.dys, group.lora_bs, group.scales, group.spans(), strict=True
    ):
        dbiases.append(dy.sum(0))
        dbs.append(None if lora_b is None else scale * (dy.t() @ xa[:, span]))
        if lora_b is not None:
            dxas.append(scale * (dy @ lora_b))
    return torch.cat(dxas, 1), dbs, dbiases


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
def test_every_member(members, dtype, device, poisoned):
    group = kernel_groups.make(members, dtype, device, m=70, factors=torch.float32)
    xa = torch.randn(70, sum(group.ranks)).to(device, dtype)
    operands = group.dys, group.lora_bs, xa, columns(group), group.scales
    found = compute_group_dxa_db(*operands, need_dbias=True, config=CONFIG)
    again = compute_group_dxa_db(*operands, need_dbias=True, config=CONFIG)
    narrow = group.to(dtype)
    plain, truth = statement(narrow, xa), statement(narrow.to(torch.float64), xa.double())
    assert all(db is None or db.dtype == torch.float32 for db in found.dbs)
    kernel_groups.close_all(found._fields, found, plain, truth)
    for one, other in zip(
        (found.dxa, *found.dbs, *found.dbiases),
        (again.dxa, *again.dbs, *again.dbiases),
        strict=True,
    ):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.interpreted
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3))[1:], ids=str)
def test_every_subset(needs, poisoned):
    group = kernel_groups.make(MEMBERS["one without LoRA"], torch.float32, "cpu")
    xa = torch.randn(37, sum(group.ranks))
    need_dxa, need_db, need_dbias = needs
    options = {"need_dxa": need_dxa, "need_db": need_db, "need_dbias": need_dbias}
    operands = group.lora_bs, xa if need_db else None, columns(group), group.scales
    found = compute_group_dxa_db(group.dys, *operands, **options, config=CONFIG)
    _, *expected = statement(group, xa)
    assert (found.dxa is not None) == need_dxa
    for ours, theirs, needed in zip(found[1:], expected, needs[1:], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert (one is not None) == (needed and other is not None)
            if one is not None:
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_slices_of_wider_rows(device, poisoned):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.float32, device, m=33)
    wide = torch.randn(33, 140, device=device)
    dys = [wide[:, 5:77], wide[:1, 77:101].expand(33, 24), wide[:, 101:125]]
    xa = torch.randn(33, 60, device=device)
    operands = group.lora_bs, xa, [0, 20, 44], group.scales
    found = compute_group_dxa_db(dys, *operands, config=CONFIG)
    same = compute_group_dxa_db([dy.contiguous() for dy in dys], *operands, config=CONFIG)
    assert torch.equal(found.dxa, same.dxa)
    assert all(torch.equal(*pair) for pair in zip(found.dbs, same.dbs, strict=True))
    for i, at in enumerate((0, 20, 44)):
        own = xa[:, at : at + 16].double()
        truth = group.scales[i] * (dys[i].double().t() @ own)
        assert_close(found.dbs[i], group.scales[i] * (dys[i].t() @ own.float()), truth)


@pytest.mark.parametrize(
    ("tiles", "blocks", "sms", "expected"),
    [
        (32, [64, 16, 16], 132, (4, 16)),  # 4 + 1 + 1 shares of 32 tiles, where 264 have room
        (64, [224, 224], 132, (2, 112)),
        (1, [3], 132, (3, 1)),  # no shorter than a block
        (1000, [64, 1], 132, (1, 64)),  # the rows alone fill the GPU
    ],
)
def test_shares_fill_the_gpu_about_twice(tiles, blocks, sms, expected):
    split, steps = dxa_db._shares(tiles, blocks, sms)
    assert (split, steps) == expected
    assert split * steps >= max(blocks)
