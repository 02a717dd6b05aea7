"""Forward of a group in one kernel, against the reference in float64."""

from __future__ import annotations

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES, DTYPES, seed_of
from kernel_groups import MEMBERS

from lora_kernels.group import reference
from lora_kernels.group.one_kernel import group_one_kernel
from lora_kernels.group.packing import stacked
from lora_kernels.kernels.dropout import keep_mask, unpack_bits
from lora_kernels.kernels.tuning import Config


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("members", [m for name, m in MEMBERS.items() if name != "long ranks"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_every_member(dropout_p, members, dtype, device, poisoned):
    group = kernel_groups.make(members, dtype, device, m=70, factors=torch.float32)
    seed = seed_of(5, device) if dropout_p else None
    keep = keep_mask(seed, 70, 56, dropout_p) if dropout_p else None
    lora_a = stacked([a for a in group.lora_as if a is not None])
    options = {"config": Config(32, 32, 32, group=2)}
    operands = group.x, group.weights, lora_a, group.lora_bs, group.biases, group.scales
    *ours, bits = group_one_kernel(*operands, seed, dropout_p, **options)
    narrow = group.to(dtype)
    wide = narrow.to(torch.float64)
    plain = reference.forward(narrow.x, *narrow.kinds, group.scales, keep, dropout_p)
    truth = reference.forward(wide.x, *wide.kinds, group.scales, keep, dropout_p)
    kernel_groups.close_all(("y", "xa"), ours, plain, truth)
    assert (bits is None) if keep is None else torch.equal(unpack_bits(bits, 56), keep)
