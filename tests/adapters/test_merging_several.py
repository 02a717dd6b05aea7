"""Several adapters folded in: those in use, as a weighted sum."""

from __future__ import annotations

import pytest
import torch
from several import ADAPTERS, ON, carrying, merged_by_hand
from tiny_model import IDS, Model, assert_untouched, snapshot
from torch import nn

from lora_kernels import LoRALinear, lora_adapters, merge_lora, merged_lora, use_lora

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
CHOICES = [
    {"fr": 1.0},
    {"default": 1.0, "fr": 1.0},
    {"tone": -0.5, "default": 2.0, "fr": 0.25},
]


@pytest.mark.parametrize("weights", CHOICES, ids=str)
def test_the_weighted_sum(weights):
    model = carrying()
    use_lora(model, list(weights), weights=list(weights.values()))
    expected, by_hand = model(IDS), merged_by_hand(model, weights)
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with merged_lora(model):
        torch.testing.assert_close(model.state_dict(), {**before, **by_hand.state_dict()}, **CLOSE)
        torch.testing.assert_close(model(IDS), expected, **CLOSE)
        with pytest.raises(ValueError, match="merged_lora"):
            merge_lora(model)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    assert torch.equal(model(IDS), expected)
    merged = merge_lora(model)
    assert set(merged) == {name for adapter in weights for name in ON[adapter]}
    # All are gone, those too that were not in use.
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict(), **CLOSE)


def test_rounded_once():
    model = carrying(model=Model().to(torch.bfloat16))
    use_lora(model, list(ADAPTERS), weights=[0.3, 0.7, 1.1])
    layer = model.blocks[0].q
    exact = layer.weight.double()
    for adapter, weight in (("default", 0.3), ("fr", 0.7)):
        lora, config = layer.adapters()[adapter], layer.lora_configs[adapter]
        exact += weight * config.scale * (lora.B.weight.double() @ lora.A.weight.double())
    merge_lora(model)
    got = model.blocks[0].q.weight
    nearest = exact.to(torch.bfloat16)
    # float32's own rounding may turn a tie, no more.
    assert (got != nearest).sum() <= 1
    torch.testing.assert_close(got.double(), exact, rtol=2**-8, atol=0)


def test_none_in_use_is_not_merged():
    model = carrying()
    use_lora(model, None)
    before = snapshot(model)
    for function in (merge_lora, lambda m: merged_lora(m).__enter__()):
        with pytest.raises(ValueError, match="no adapter is in use; call use_lora"):
            function(model)
    assert_untouched(model, before)


def test_those_not_in_use_do_not_count():
    """Neither a damaged one nor a tied weight matters where nothing is folded in."""
    model = carrying()
    with torch.no_grad():
        model.gate.loras["tone"].A.weight.fill_(float("nan"))
    use_lora(model, ["default", "fr"])
    expected = merged_by_hand(model, {"default": 1.0, "fr": 1.0})(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), expected, **CLOSE)


@pytest.mark.parametrize("weight", [1.0, -1.0, 0.5])
def test_a_sum_that_overflows_is_refused(weight):
    model = carrying(model=Model().half())
    with torch.no_grad():
        for name, value in (("fr", 200.0), ("default", 100.0)):
            lora = model.blocks[1].q.adapters()[name]
            lora.A.weight.fill_(value)
            lora.B.weight.fill_(value)
    use_lora(model, ["default", "fr"], weights=[1.0, weight])
    before = snapshot(model)
    with pytest.raises(ValueError, match="'blocks.1.q': the sum would hold NaN or infinity"):
        merge_lora(model)
    assert_untouched(model, before)
    assert lora_adapters(model) == {"default": 1.0, "fr": weight, "tone": None}


def test_a_weight_alone_may_make_the_sum_overflow():
    model = carrying("default", "fr", model=Model().half())
    use_lora(model, ["default", "fr"], weights=[1.0, 1e9])
    before = snapshot(model)
    with pytest.raises(ValueError, match="'blocks.0.q': the sum would hold NaN or infinity"):
        merge_lora(model)
    assert_untouched(model, before)


def test_two_that_cancel_are_merged_though_each_would_overflow():
    model = carrying("default", "fr", model=Model().half())
    with torch.no_grad():
        for adapter, scale in (("default", 2 / 3), ("fr", 6 / 2**0.5)):
            lora = model.blocks[1].q.adapters()[adapter]
            lora.A.weight.zero_()
            lora.B.weight.zero_()
            lora.A.weight[0], lora.B.weight[:, 0] = 512.0, 512.0
            assert model.blocks[1].q.lora_configs[adapter].scale == pytest.approx(scale)
    use_lora(model, ["default", "fr"], weights=[1.0, -(2 / 3) / (6 / 2**0.5)])
    weight = model.blocks[1].q.weight.clone()
    merge_lora(model)
    torch.testing.assert_close(model.blocks[1].q.weight, weight, rtol=0, atol=0.05)
    assert type(model.gate) is nn.Linear
