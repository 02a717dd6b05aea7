"""The sum of products for Hopper, against float64."""

from __future__ import annotations

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES
from products import sum_of_products

from lora_kernels.kernels.dropout import pack_bits
from lora_kernels.kernels.sum_hopper import sum_hopper
from lora_kernels.kernels.tuning import Config

# Contractions that 8 divides, but for the tile.
MEMBERS = {
    "q, k, v": ((136, 16, True), (72, 16, False), (72, 16, True)),
    "four": ((8, 8, False), (72, 24, False), (40, 8, True), (16, 8, True)),
    "alone": ((24, 3, True),),
    "two of long ranks": ((64, 48, False), (24, 70, True)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("per_sm", [1, 2])
def test_every_member_is_added(per_sm, dropout_p, members, dtype, device, poisoned):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    group = kernel_groups.make(members, dtype, device, m=130, k=72)
    u = torch.randn(130, sum(group.ranks)).to(device, dtype)
    v = torch.randn(sum(group.ranks), 72, device=device)
    keep = torch.rand(130, 72, device=device) >= dropout_p if dropout_p else None
    options = {"keep_bits": None if keep is None else pack_bits(keep), "dropout_p": dropout_p}
    config = Config(64, 64, 64, group=2, per_sm=per_sm)
    out = sum_hopper(group.dys, group.weights, u, v, **options, config=config)
    v = v.to(dtype)
    wide = group.to(torch.float64)
    plain = sum_of_products(group.dys, group.weights, u, v, keep, dropout_p)
    truth = sum_of_products(wide.dys, wide.weights, u.double(), v.double(), keep, dropout_p)
    assert_close(out, plain, truth)
    assert out.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_columns_of_wider_rows_and_weights_the_other_way_round(device, poisoned):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    wide = torch.randn(33, 64, device=device).half()
    ps = [wide[:, 8:24], wide[:, 24:64]]
    qs = [torch.randn(40, 64, device=device).half()[:, :n].t() for n in (16, 40)]
    u, v = torch.randn(33, 5, device=device).half(), torch.randn(5, 40, device=device).half()
    config = Config(64, 64, 64, group=2)
    out = sum_hopper(ps, qs, u, v, config=config)
    same = sum_hopper(
        [p.contiguous() for p in ps], [q.contiguous() for q in qs], u, v, config=config
    )
    assert torch.equal(out, same)
