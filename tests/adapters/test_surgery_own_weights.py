"""LoRA on a model whose weights multiply by themselves, as torchao's quantised ones."""

from __future__ import annotations

import copy

import pytest
import torch
from own_weight import Int8Weight, quantised
from tiny_model import IDS, Model

from lora_kernels import (
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
    save_lora,
)


def pair():
    """A quantised model, and a plain one of the same values."""
    torch.manual_seed(0)
    model = Model().requires_grad_(False)
    plain = copy.deepcopy(model)
    for one, other in zip((*model.blocks, model), (*plain.blocks, plain), strict=True):
        for name in ("q", "k", "gate"):
            if hasattr(one, name):
                setattr(other, name, quantised(getattr(one, name))[1].requires_grad_(False))
    return model, plain


def trained_alike(*models):
    for model in models:
        torch.manual_seed(1)
        apply_lora(model, 2, alpha=4, target_modules=["q", "k", "gate"], verbose=False)
        mark_only_lora_as_trainable(model)
        with torch.no_grad():
            for parameter in lora_parameters(model):
                parameter.normal_(std=0.3)
        optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.01)
        for _ in range(5):
            model(IDS).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_it_trains_as_the_plain_one(tmp_path):
    model, plain = pair()
    base = model(IDS)
    assert isinstance(model.gate.weight, Int8Weight)
    trained_alike(model, plain)
    torch.testing.assert_close(lora_state_dict(model), lora_state_dict(plain))
    y = model(IDS)
    torch.testing.assert_close(y, plain(IDS))
    with disable_lora(model):
        assert torch.equal(model(IDS), base)
    save_lora(model, tmp_path / "a.safetensors")
    assert len(remove_lora(model)) == 5
    assert torch.equal(model(IDS), base)
    load_lora(model, tmp_path / "a.safetensors")
    assert torch.equal(model(IDS), y)


@pytest.mark.parametrize("act", [merge_lora, lambda m: merged_lora(m).__enter__()])
def test_it_is_not_merged(act):
    model, _ = pair()
    trained_alike(model)
    y, gate = model(IDS), model.gate
    with pytest.raises(ValueError, match=r"'blocks.0.q': its weight is a Int8Weight, quantised"):
        act(model)
    assert model.gate is gate and torch.equal(model(IDS), y)
