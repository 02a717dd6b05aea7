"""The products of members that share p, against float64 within plain torch's own error."""

from __future__ import annotations

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES
from kernel_groups import MEMBERS
from products import member_products

from lora_kernels.kernels.group_gemm import group_gemm
from lora_kernels.kernels.tuning import Config

CONFIG = Config(32, 32, 32, group=2)


def check(group, u, **options):
    product = options.pop("product", True)
    operands = group.weights, u, group.lora_bs, group.biases, group.scales
    outs = group_gemm(group.x if product else None, *operands, **options)
    narrow, wide = group.to(u.dtype), group.to(u.dtype).to(torch.float64)
    plain, truth = member_products(narrow, u, product), member_products(wide, u.double(), product)
    for i, (out, one, other) in enumerate(zip(outs, plain, truth, strict=True)):
        assert_close(out, one, other, f"out {i}")
    return outs


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("product", [False, True], ids=["expand", "product"])
def test_every_member(product, packed, members, dtype, device, poisoned):
    group = kernel_groups.make(members, dtype, device, m=70, factors=torch.float32)
    u = torch.randn(70, sum(group.ranks)).to(device, dtype)
    outs = check(group, u, product=product, packed=packed, config=CONFIG)
    if packed:
        assert outs[-1].stride() == (sum(n for n, *_ in members), 1)
        assert outs[0].untyped_storage().data_ptr() == outs[-1].untyped_storage().data_ptr()
    else:
        assert all(out.is_contiguous() for out in outs)


@pytest.mark.parametrize("device", DEVICES)
def test_strides_and_dtypes_that_differ(device, poisoned):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.float16, device, m=33, k=40)
    u = torch.randn(33, 60, device=device).half()[:, 4:52]
    x = group.x.t().contiguous().t()
    weights = [
        torch.cat([w, w.new_zeros(80 - len(w), 40)]).t().contiguous()[:, : len(w)].t()
        for w in group.weights
    ]
    lora_bs = [group.lora_bs[0].float(), group.lora_bs[1].t().contiguous().t(), group.lora_bs[2]]
    biases = [None, None, group.biases[2].repeat_interleave(2)[::2]]
    changed = group._replace(x=x, weights=weights, lora_bs=lora_bs, biases=biases)
    check(changed, u, config=CONFIG)


@pytest.mark.interpreted
def test_nothing_of_another_member_is_written(poisoned):
    """Tiles past a member's last column hold nothing that is stored, even where they are packed."""
    group = kernel_groups.make(((33, 4, True), (31, 4, False)), torch.float32, "cpu")
    u = torch.randn(37, 8)
    apart = group_gemm(group.x, group.weights, u, *group[3:6], config=CONFIG)
    packed = group_gemm(group.x, group.weights, u, *group[3:6], packed=True, config=CONFIG)
    assert all(torch.equal(*pair) for pair in zip(apart, packed, strict=True))
