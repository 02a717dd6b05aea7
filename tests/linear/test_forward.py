"""The forward launchers and strategies against the reference in float64."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES, SHAPES, Case, make, seed_of

from lora_kernels.kernels import tuning
from lora_kernels.kernels.dropout import keep_mask, pack_bits
from lora_kernels.kernels.tuning import Config
from lora_kernels.linear import forward as kernels
from lora_kernels.linear import reference


def truth_and_plain(t, scale, keep, dropout_p, bias=True):
    dtype = t.x.dtype
    tensors = [t.x, t.weight, t.lora_a.to(dtype), t.lora_b.to(dtype), t.bias if bias else None]
    wide = [None if one is None else one.double() for one in tensors]
    return (
        reference.forward(*wide, scale, keep, dropout_p),
        reference.forward(*tensors, scale, keep, dropout_p),
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [s for s in SHAPES if s.r <= 64], ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_one_kernel(case, dtype, dropout_p, device, poisoned):
    t = make(case, dtype, device, factors=torch.float32)
    seed = seed_of(5, device) if dropout_p else None
    keep = keep_mask(seed, case.m, case.k, dropout_p) if dropout_p else None
    truth, plain = truth_and_plain(t, 0.7, keep, dropout_p)
    y, xa, bits = kernels.one_kernel(
        *t[:5], 0.7, seed, dropout_p, config=Config(32, 32, 32, group=2)
    )
    assert_close(y, plain[0], truth[0], "y")
    assert_close(xa, plain[1], truth[1], "xa")
    assert (bits is None) if keep is None else torch.equal(_clean(bits, case.k), pack_bits(keep))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("name", tuning.STRATEGIES["forward"])
def test_every_strategy(name, bias, dropout_p, device, poisoned):
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    if name == "hopper" and capability[0] != 9:
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    if name == "aten" and dropout_p:
        pytest.skip("this strategy takes no dropout, see test_tuning")
    t = make(Case(70, 40, 136, 16), torch.bfloat16, device, factors=torch.float32)
    seed = seed_of(5, device) if dropout_p else None
    keep = keep_mask(seed, 70, 136, dropout_p) if dropout_p else None
    truth, plain = truth_and_plain(t, 0.7, keep, dropout_p, bias)
    arguments = (*t[:4], t.bias if bias else None, 0.7, seed, dropout_p, capability)
    with tuning.use_strategy(forward=name):
        y, xa, bits = kernels.forward(*arguments)
        again = kernels.forward(*arguments)
    assert_close(y, plain[0], truth[0], "y")
    assert_close(xa, plain[1], truth[1], "xa")
    assert torch.equal(y, again[0]) and torch.equal(xa, again[1])
    assert (bits is None) if keep is None else torch.equal(bits, pack_bits(keep))


@pytest.mark.parametrize("device", DEVICES)
def test_strided_inputs(device, poisoned):
    case = Case(33, 24, 40, 5)
    t = make(case, torch.float32, device)
    strided = [torch.stack((one, one + 1), -1)[..., 0] for one in t]
    assert all(one.stride(-1) == 2 for one in strided)
    for name in ("one_kernel", "fused", "beta1"):
        with tuning.use_strategy(forward=name):
            y, xa, _ = kernels.forward(*strided[:5], 0.7, None, 0.0, (9, 0))
            same, same_xa, _ = kernels.forward(*t[:5], 0.7, None, 0.0, (9, 0))
        assert torch.equal(y, same) and torch.equal(xa, same_xa)


def _clean(bits, columns):
    """The bytes with the lanes past the last column cleared; nobody reads those."""
    if columns % 8:
        bits = bits.clone()
        bits[:, -1] &= (1 << columns % 8) - 1
    return bits
