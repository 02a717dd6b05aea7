"""The adapter folded in, for good and for a while."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_model import IDS, Model, assert_untouched, snapshot, trained
from torch import nn

from lora_kernels import LoRALinear, apply_lora, disable_lora, merge_lora, merged_lora, remove_lora


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_equals_the_adapted_model(dtype):
    model = trained(Model().to(dtype), target_modules=["q", "k"], rank=3, alpha=2)
    adapted = model(IDS)
    deltas = {n: m.delta_weight() for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    weights = {n: model.get_submodule(n).weight.clone() for n in deltas}
    assert merge_lora(model) == list(deltas)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in deltas)
    for name, delta in deltas.items():
        # Rounded once: the sum in the wide dtype, then the weight's.
        once = (weights[name].to(delta.dtype) + delta).to(dtype)
        assert torch.equal(model.get_parameter(f"{name}.weight"), once)
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(model(IDS), adapted, **tolerance)
    with pytest.raises(ValueError, match="no LoRALinear"):
        merge_lora(model)


def test_merged_for_a_while_restores_the_very_bits():
    model = trained(Model().to(torch.bfloat16))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapted = model(IDS)
    permanent = copy.deepcopy(model)
    merge_lora(permanent)
    with merged_lora(model):
        assert torch.equal(model(IDS), permanent(IDS))
        assert not torch.equal(model.gate.weight, before["gate.weight"])
    with pytest.raises(KeyError), merged_lora(model):
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(IDS), adapted)


def test_merging_narrower_factors_keeps_every_bit_of_the_weight():
    model = Model().double()
    trained(model)
    weight = model.gate.weight.detach().clone()
    model.gate.lora.float()
    with torch.no_grad():
        model.gate.lora.B.weight.zero_()
    merge_lora(model)
    assert torch.equal(model.gate.weight, weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "lora.A.weight", "lora.B.weight"])
def test_a_merge_refuses_what_is_not_finite(bad, where):
    model = trained(Model())
    with torch.no_grad():
        model.gate.get_parameter(where)[0, 0] = bad
    with pytest.raises(ValueError, match="'gate': the sum would hold NaN or infinity"):
        merge_lora(model)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_merge_takes_what_a_bound_alone_would_refuse(scale):
    """Large factors whose products cancel, and small ones times a large scale."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False).half())
    apply_lora(model, rank=2, alpha=2 * scale, target_modules=["0"], verbose=False)
    with torch.no_grad():
        model[0].lora.A.weight.copy_(torch.tensor([[300.0, 1.0], [300.0, 1.0]]))
        model[0].lora.B.weight.copy_(torch.tensor([[300.0, -300.0], [0.0, 0.5]]))
        expected = model[0].delta_weight() + model[0].weight
    merge_lora(model)
    assert torch.equal(model[0].weight, expected.half()) and model[0].weight.isfinite().all()


def test_a_merge_that_fails_leaves_every_layer_as_it_was():
    model = trained(Model().half())
    with torch.no_grad():  # the last of three: its sum overflows, A and B themselves do not
        model.gate.lora.A.weight.fill_(300.0)
        model.gate.lora.B.weight.fill_(300.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'gate': the sum would hold NaN or infinity"):
        merge_lora(model)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="'gate'"), merged_lora(model):
        pass
    assert_untouched(model, before)
    assert "merged" not in repr(model)


@pytest.mark.parametrize("inner", [merge_lora, remove_lora, disable_lora])
def test_nothing_else_inside_merged(inner):
    model = trained(Model())
    adapted = model(IDS)
    with merged_lora(model), pytest.raises(ValueError, match="merged_lora"):
        result = inner(model)
        with result:
            pass
    assert torch.equal(model(IDS), adapted)


def test_no_merge_inside_disable():
    model = trained(Model())
    with disable_lora(model), pytest.raises(ValueError, match="disabled"):
        merge_lora(model)


def test_merge_refuses_damaged_factors_and_tied_weights():
    model = trained(Model())
    with torch.no_grad():
        model.gate.lora.A.weight[0, 0] = float("nan")
    before = snapshot(model)[1]
    with pytest.raises(ValueError, match="'gate'.*NaN"):
        merge_lora(model)
    after = snapshot(model)[1]
    assert all(torch.equal(after[n], before[n]) for n in after if n != "gate.lora.A.weight")
    model = trained(Model())
    model.gate.weight = nn.Parameter(torch.ones(1, 8).expand(8, 8))
    with pytest.raises(ValueError, match="'gate': its weight is an expanded view"):
        merge_lora(model)
    model = trained(Model())
    model.blocks[1].q.weight = model.gate.weight
    with pytest.raises(ValueError, match="tied"):
        merge_lora(model)


def test_nested_the_last_one_out_brings_the_bits_back():
    model = trained(Model())
    before, adapted = snapshot(model), model(IDS)
    with merged_lora(model.blocks[0]):
        part = model.blocks[0].q.weight.clone()
        with merged_lora(model):
            merged = model.gate.weight.clone()
            with merged_lora(model):
                pass
            assert torch.equal(model.gate.weight, merged) and not torch.equal(
                merged, before[1]["gate.weight"]
            )
        assert torch.equal(model.gate.weight, before[1]["gate.weight"])
        assert torch.equal(model.blocks[0].q.weight, part)
    assert_untouched(model, before)
    assert torch.equal(model(IDS), adapted)


def test_a_weight_that_two_models_share_is_not_merged_twice():
    one = trained(Model())
    other = copy.deepcopy(one)
    other.gate.weight = one.gate.weight
    before = snapshot(one)
    with merged_lora(one):
        inside = one.gate.weight.clone()
        for merge in (merge_lora, lambda model: merged_lora(model).__enter__()):
            with pytest.raises(ValueError, match="'gate': its weight is merged for another model"):
                merge(other)
            assert torch.equal(one.gate.weight, inside)
    assert_untouched(one, before)
    with merged_lora(other):
        pass
    assert_untouched(one, before)
