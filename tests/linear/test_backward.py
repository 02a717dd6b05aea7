"""The backward launchers and strategies against the reference in float64."""

from __future__ import annotations

import itertools

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, Case, make, seed_of

from lora_kernels.kernels import plans, tuning
from lora_kernels.kernels.dropout import keep_mask, pack_bits
from lora_kernels.kernels.tuning import Config
from lora_kernels.linear import backward as kernels
from lora_kernels.linear import reference
from lora_kernels.linear.reference import Grads, Needs

SCALE = 0.7
ALL = Needs(True, True, True, True, True)


def grads_of(t, xa, keep, dropout_p, needs=ALL, dtype=None):
    """The reference's gradients, in ``dtype`` throughout."""
    dtype = dtype or t.x.dtype
    tensors = [one.to(dtype) for one in (t.dy, *t[:4], xa)]
    return reference.backward(*tensors, SCALE, keep, dropout_p, needs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("case", [Case(70, 40, 136, 16), Case(40, 32, 48, 160)], ids=str)
@pytest.mark.parametrize("name", tuning.STRATEGIES["dx"])
def test_every_strategy(name, case, dropout_p, device, poisoned):
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    if name == "hopper" and capability[0] != 9:
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    if name == "aten" and dropout_p:
        pytest.skip("this strategy takes no dropout, see test_tuning")
    t = make(case, torch.bfloat16, device, factors=torch.float32)
    xa = torch.randn(case.m, case.r).to(device, torch.bfloat16)
    keep = keep_mask(seed_of(5, device), case.m, case.k, dropout_p) if dropout_p else None
    bits = None if keep is None else pack_bits(keep)
    arguments = (t.dy, *t[:4], xa, SCALE, bits, dropout_p, ALL, capability)
    with tuning.use_strategy(dx=name):
        ours, again = kernels.backward(*arguments), kernels.backward(*arguments)
    rounded = t._replace(lora_a=t.lora_a.bfloat16(), lora_b=t.lora_b.bfloat16())
    plain = grads_of(rounded, xa, keep, dropout_p)
    truth = grads_of(rounded, xa, keep, dropout_p, dtype=torch.float64)
    for field, a, b, c, d in zip(Grads._fields, ours, plain, truth, again, strict=True):
        assert a.dtype == (torch.float32 if field in ("da", "db") else torch.bfloat16), field
        assert_close(a.to(torch.bfloat16), b, c, field)
        assert torch.equal(a, d), field


@pytest.mark.interpreted
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
@pytest.mark.parametrize("rank", [4, 130])
def test_every_subset_of_needs(rank, needs, poisoned):
    t = make(Case(20, 18, 24, rank), torch.float32, "cpu")
    xa = torch.randn(20, rank)
    arguments = (t.dy, *t[:4], xa, SCALE, None, 0.0)
    with tuning.use_strategy(dx="fused"):
        some = kernels.backward(*arguments, Needs(*needs), (9, 0))
        whole = kernels.backward(*arguments, ALL, (9, 0))
    for field, needed, one, other in zip(Grads._fields, needs, some, whole, strict=True):
        assert (one is not None) == needed, field
        if needed:  # dbias may come from another pass, which adds in another order
            torch.testing.assert_close(
                one,
                other,
                rtol=1e-5 if field == "dbias" else 0,
                atol=1e-5 if field == "dbias" else 0,
            )


@pytest.mark.parametrize("device", DEVICES)
def test_any_strides_of_dy(device, poisoned):
    t = make(Case(33, 24, 40, 5), torch.float32, device)
    xa = torch.randn(33, 5, device=device)
    for dy in (
        torch.randn(24, 33, device=device).t(),
        torch.randn((), device=device).expand(33, 24),
        torch.randn(33, 48, device=device)[:, ::2],
    ):
        for name in ("fused", "beta1"):
            with tuning.use_strategy(dx=name):
                arguments = (*t[:4], xa, SCALE, None, 0.0, ALL, (9, 0))
                ours = kernels.backward(dy, *arguments)
                same = kernels.backward(dy.contiguous(), *arguments)
            for a, b in zip(ours, same, strict=True):
                torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [False, True])
def test_db_taken_apart_is_db(bias, device, monkeypatch, poisoned):
    t = make(Case(70, 40, 24, 16), torch.bfloat16, device, factors=torch.float32)
    xa = torch.randn(70, 16).to(device, torch.bfloat16)
    needs = Needs(True, False, True, True, bias)
    arguments = (t.dy, *t[:4], xa, SCALE, None, 0.0, needs, (8, 0))
    with tuning.use_strategy(dx="fused"):
        together = kernels.backward(*arguments)
        monkeypatch.setattr(kernels, "slabs_outweigh", lambda *_: True)
        plans.clear()
        apart = kernels.backward(*arguments)
    for field, one, other in zip(Grads._fields, apart, together, strict=True):
        if field == "db":  # the same products, added in another order
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
        else:
            assert (one is None and other is None) or torch.equal(one, other), field


def test_db_is_taken_apart_where_its_slabs_would_outweigh_dy():
    def apart(m, n, r, block_m):
        return kernels.slabs_outweigh(m, n, r, Config(block_m, 64, 0))

    assert not apart(8192, 4096, 16, 256)
    assert not apart(8192, 14336, 64, 256)  # as much as dy once more, and one launch less
    assert apart(8192, 14336, 64, 128) and apart(131072, 14336, 128, 256)
    assert not apart(256, 4096, 64, 32)  # small enough for the cache
