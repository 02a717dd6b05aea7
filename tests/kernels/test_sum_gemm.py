"""The sum of products with its rank part, against float64 within plain torch's own error."""

from __future__ import annotations

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES
from kernel_groups import MEMBERS
from products import sum_of_products

from lora_kernels.kernels.dropout import pack_bits
from lora_kernels.kernels.sum_gemm import sum_gemm
from lora_kernels.kernels.tuning import Config

CONFIG = Config(32, 32, 32, group=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("k", [33, 64])
def test_every_member_is_added(k, dropout_p, members, dtype, device, poisoned):
    group = kernel_groups.make(members, dtype, device, k=k)
    u = torch.randn(37, sum(group.ranks)).to(device, dtype)
    v = torch.randn(sum(group.ranks), k, device=device)
    keep = torch.rand(37, k, device=device) >= dropout_p if dropout_p else None
    bits = None if keep is None else pack_bits(keep)
    operands = group.dys, group.weights, u, v
    out = sum_gemm(*operands, keep_bits=bits, dropout_p=dropout_p, config=CONFIG)
    v = v.to(dtype)
    wide = group.to(torch.float64)
    plain = sum_of_products(group.dys, group.weights, u, v, keep, dropout_p)
    truth = sum_of_products(wide.dys, wide.weights, u.double(), v.double(), keep, dropout_p)
    assert_close(out, plain, truth)
    assert out.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
def test_rows_of_wider_ones_and_weights_the_other_way_round(device, poisoned):
    wide = torch.randn(33, 60, device=device)
    ps = [wide[:, 3:20], wide[:1, 20:60].expand(33, 40)]
    qs = [torch.randn(40, 64, device=device)[:, :n].t() for n in (17, 40)]
    u, v = torch.randn(33, 5, device=device), torch.randn(40, 5, device=device).t()
    out = sum_gemm(ps, qs, u, v, config=CONFIG)
    plain = sum_of_products(ps, qs, u, v, None, 0.0)
    double = [[t.double() for t in kind] for kind in (ps, qs)]
    assert_close(out, plain, sum_of_products(*double, u.double(), v.double(), None, 0.0))
