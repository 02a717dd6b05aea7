"""`accelerate_peft(group=…)`: PEFT's layers computed together, and given back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from grouped import IDS, groups, nodes
from tiny_families import FAMILIES, both

from lora_kernels import accelerate_peft, explain
from lora_kernels.group import siblings as room

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.fixture(autouse=True)
def few_rows_too(monkeypatch):
    monkeypatch.setattr(room, "_LEAST_ROWS_ON_CPU", 0)


def step(model):
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS)
    out.loss.backward()
    return out.logits, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_results_in_fewer_calls(name):
    _, model = both(name)
    logits, grads = step(model)
    report = accelerate_peft(model, group=True)
    ours, found = step(model)
    assert nodes(ours) > 0 and found.keys() == grads.keys()
    torch.testing.assert_close(ours, logits)
    for key in grads:
        torch.testing.assert_close(found[key], grads[key], rtol=1e-4, atol=1e-6)
    assert report.together and f"computed together: {report.together}" in str(report)
    assert report.together in explain(model)


def test_it_is_reversible_and_can_be_left_out():
    _, model = both("llama")
    accelerate_peft(model, group=True)
    assert groups(model)
    accelerate_peft(model, group=False)
    assert not groups(model) and nodes(model(input_ids=IDS).logits) == 0
    accelerate_peft(model)  # as was said before
    assert nodes(model(input_ids=IDS).logits) == 0
    accelerate_peft(model, undo=True)
    accelerate_peft(model)
    assert nodes(model(input_ids=IDS).logits) == 4  # the default on a CPU
    accelerate_peft(model, undo=True)
    assert not any("_lora" in key for m in model.modules() for key in m.__dict__)
    with pytest.raises(TypeError, match="group must be"):
        accelerate_peft(model, group=1)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies(copied):
    _, model = both("llama")
    accelerate_peft(model, group=True)
    logits = model(input_ids=IDS).logits
    other = copied(model)
    assert len(groups(other)) == 4
    for module in model.modules():
        if hasattr(module, "base_layer"):
            torch.nn.init.zeros_(module.base_layer.weight)
    ours = other(input_ids=IDS).logits
    assert nodes(ours) == 4
    torch.testing.assert_close(ours, logits)


def test_what_peft_serves_is_not_grouped():
    _, model = both("llama")
    accelerate_peft(model, group=True)
    logits = model(input_ids=IDS).logits
    with model.disable_adapter():
        assert nodes(model(input_ids=IDS).logits) == 0
    model.add_adapter("other", peft.LoraConfig(r=2, target_modules=["q_proj"]))
    model.base_model.set_adapter(["default", "other"])
    assert nodes(model(input_ids=IDS).logits) == 2  # gate and up alone have one
    model.base_model.set_adapter("default")
    torch.testing.assert_close(model(input_ids=IDS).logits, logits)
    model.merge_adapter()
    assert nodes(model(input_ids=IDS).logits) == 0
    model.unmerge_adapter()
    torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-4)
