"""LoRA put into a model, switched off and taken out."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_model import IDS, Model, assert_untouched, snapshot, trained
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    apply_lora,
    disable_lora,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
)


class Subclass(nn.Linear):
    pass


def with_attention(model):
    model.attention = nn.MultiheadAttention(8, 2)
    return model


def with_subclass(model):
    model.gate = Subclass(8, 8)
    return model


def with_lora(model):
    apply_lora(model, target_modules=["k"], verbose=False)
    return model


def with_encoder(model):
    model.encoder = nn.TransformerEncoderLayer(8, 2, 8)
    return model


REFUSED = {
    "an encoder layer's own linear": (TypeError, "TransformerEncoderLayer", with_encoder, {
        "target_modules": ["linear1"]
    }),
    "a word for an ending": (ValueError, r"'gat'.*pass a list.*did you mean \['gate'\]",
        lambda m: m, {"target_modules": "gat"}),
    "a pattern for nothing": (ValueError, "rank_pattern has 'wx', which matches no", lambda m: m, {
        "rank_pattern": {"wx": 2}
    }),
    "no match": (ValueError, "the target 'wq'", lambda m: m, {"target_modules": ["q", "wq"]}),
    "no match of an expression": (ValueError, "matches", lambda m: m, {"target_modules": "wq.*"}),
    "nothing square": (ValueError, "square", lambda m: m.blocks[0].k, {}),
    "all excluded": (ValueError, "leaves none", lambda m: m, {"exclude_modules": ["q", "gate"]}),
    "second application": (ValueError, "carries LoRA already", with_lora, {}),
    "tied weight": (ValueError, "shares its weight with 'embed'", lambda m: m, {
        "target_modules": ["q", "lm_head"]
    }),
    "not a linear": (TypeError, "'embed' is a Embedding", lambda m: m, {
        "target_modules": ["q", "embed"]
    }),
    "a subclass": (TypeError, "'gate' is a Subclass", with_subclass, {"target_modules": ["gate"]}),
    "attention's own linear": (TypeError, "NonDynamically", with_attention, {
        "target_modules": ["attention.out_proj"]
    }),
    "rank 0": (ValueError, "rank must be at least 1", lambda m: m, {"rank": 0}),
    "config and arguments": (ValueError, "config and its single", lambda m: m, {
        "rank": 2, "config": LoRAConfig()
    }),
    "a dictionary for config": (TypeError, "must be a LoRAConfig", lambda m: m, {"config": {}}),
    "the model itself": (ValueError, "from_linear", lambda m: m.gate, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_left_as_it_was(case):
    error, message, change, arguments = REFUSED[case]
    model = change(Model())
    before = snapshot(model)
    with pytest.raises(error, match=message):
        apply_lora(model, **arguments)
    assert_untouched(model, before)


def test_a_shared_module_is_replaced_everywhere():
    model = Model()
    model.alias = model.gate
    names = apply_lora(model, target_modules=["gate"], verbose=False)
    assert names == ["gate"] and model.alias is model.gate and isinstance(model.gate, LoRALinear)


def test_only_lora_is_trainable():
    model = trained(Model())
    mark_only_lora_as_trainable(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if "lora" in name}
    assert len(lora_parameters(model)) == 6
    base = [p for name, p in model.named_parameters() if "lora" not in name]
    before = [p.clone() for p in base]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(IDS).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(base, before, strict=True))


def test_disable_runs_the_base_and_nests():
    model = Model()
    base = model(IDS)
    trained(model)
    adapted = model(IDS)
    assert not torch.allclose(base, adapted)
    with disable_lora(model):
        assert torch.equal(model(IDS), base)
        with disable_lora(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), adapted)
    with pytest.raises(KeyError), disable_lora(model):
        raise KeyError
    assert torch.equal(model(IDS), adapted)


def test_remove_restores_the_model():
    model = Model()
    before = snapshot(model)[1]
    base = model(IDS)
    trained(model)
    assert remove_lora(model) == ["blocks.0.q", "blocks.1.q", "gate"]
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert model.state_dict().keys() == before.keys() and torch.equal(model(IDS), base)
    apply_lora(model, verbose=False)  # and it can be adapted again


def test_a_bare_layer_is_not_merged_or_removed_by_half():
    layer = LoRALinear(8, 8, rank=2)
    nn.init.ones_(layer.lora.B.weight)
    x = torch.randn(3, 8)
    y = layer(x)
    for function in (merge_lora, remove_lora):
        with pytest.raises(ValueError, match="cannot be replaced from inside"):
            function(layer)
    with merged_lora(layer):
        torch.testing.assert_close(layer(x), y)
    assert torch.equal(layer(x), y)


def test_names_that_differ_by_a_wrappers_word_stay_two_layers():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "module": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    assert apply_lora(model, verbose=False) == ["fc", "module.fc"]
    assert len(lora_parameters(model)) == 4
    with pytest.raises(ValueError, match="'fc' is there twice"):
        lora_state_dict(model)
    assert merge_lora(model) == ["fc", "module.fc"]


def test_copies_taken_inside_a_block_are_active_or_refused():
    model = trained(Model())
    adapted = model(IDS)
    with disable_lora(model):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), adapted)
    with merged_lora(model), pytest.raises(RuntimeError, match="inside merged_lora"):
        copy.deepcopy(model)


@pytest.mark.parametrize(
    "function", [merge_lora, remove_lora, lora_parameters, lora_state_dict,
                 mark_only_lora_as_trainable]
)  # fmt: skip
def test_a_model_without_lora_is_said(function):
    with pytest.raises(ValueError, match="no LoRALinear; call apply_lora"):
        function(Model())
