"""The products of members that share p for Hopper, against float64."""

from __future__ import annotations

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES
from products import member_products

from lora_kernels.kernels.group_hopper import group_hopper
from lora_kernels.kernels.launching import recording
from lora_kernels.kernels.tuning import Config

CONFIG = Config(64, 64, 64, group=2)
# Outputs that 8 divides; see `kernel_groups`.
MEMBERS = {
    "q, k, v": ((136, 16, True), (72, 16, False), (72, 16, True)),
    "one without LoRA": ((40, None, True), (64, 5, True), (8, 48, False)),
    "four": ((8, 8, False), (72, 24, False), (40, 48, True), (16, 8, True)),
    "alone": ((24, 3, True),),
    "two": ((72, 32, False), (72, 1, False)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("scales", [(0.7, 1.0, -0.5, 2.0), (-2.0, 0.5, 1.0, 4.0)], ids=str)
@pytest.mark.parametrize("per_sm", [1, 2])
def test_every_member(per_sm, scales, members, dtype, device, poisoned):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    group = kernel_groups.make(members, dtype, device, m=130, factors=torch.float32)
    group = group._replace(scales=scales[: len(members)])
    u = torch.randn(130, sum(group.ranks)).to(device, dtype)
    config = Config(64, 64, 64, group=2, per_sm=per_sm)
    operands = group.weights, u, group.lora_bs, group.biases, group.scales
    outs = group_hopper(group.x, *operands, config=config)
    narrow = group.to(dtype)
    plain = member_products(narrow, u)
    truth = member_products(narrow.to(torch.float64), u.double())
    for i, three in enumerate(zip(outs, plain, truth, strict=True)):
        assert_close(*three, f"out {i}")


@pytest.mark.parametrize("device", DEVICES)
def test_weights_the_other_way_round(device, poisoned):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.float16, device)
    wide = torch.randn(56, 160, device=device).half()
    weights = [wide[:, : len(weight)].t() for weight in group.weights]
    u = torch.randn(37, 48, device=device).half()
    operands = u, group.lora_bs, group.biases, group.scales
    outs = group_hopper(group.x, weights, *operands, config=CONFIG)
    same = group_hopper(group.x, [w.contiguous() for w in weights], *operands, config=CONFIG)
    assert all(torch.equal(*pair) for pair in zip(outs, same, strict=True))


@pytest.mark.parametrize(
    ("changed", "last"),
    [
        ({}, True),
        ({"scales": (0.5, 0.7)}, False),
        ({"rank": 32}, True),
        ({"rank": 33}, False),
        ({"per_sm": 2}, False),
    ],
    ids=str,
)
def test_the_rank_part_comes_last_where_that_changes_nothing(changed, last):
    given = {"scales": (0.5, 2.0), "rank": 16, "per_sm": 1} | changed
    members = ((64, given["rank"], True), (32, 16, False))
    group = kernel_groups.make(members, torch.bfloat16, "meta")
    group = group._replace(scales=given["scales"])
    u = torch.empty(37, sum(group.ranks), dtype=torch.bfloat16, device="meta")
    operands = group.weights, u, group.lora_bs, group.biases, group.scales
    with recording() as launches:
        group_hopper(group.x, *operands, config=Config(64, 64, 64, per_sm=given["per_sm"]))
    assert launches[0].arguments["RANK_LAST"] is last
