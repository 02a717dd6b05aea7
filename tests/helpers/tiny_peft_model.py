"""Whole PEFT models, as they are and accelerated."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_peft import TARGETS, TOKENS, base, fill, logits

from lora_kernels import accelerate_peft

peft = pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear  # noqa: E402

# `inject_adapter_in_model` is what transformers' own `add_adapter` calls.
WAYS = {"llama": "get_peft_model", "qwen2": "inject", "minimind": "get_peft_model"}


def config(name="llama", **settings):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS[name], **settings})


def fill_lora(model):
    fill(p for n, p in model.named_parameters() if ".lora_" in n)
    return model


def pair(name="llama", dtype=torch.float32, **settings):
    """The same PEFT model twice, the second accelerated."""
    model = base(name, dtype=dtype)
    if WAYS[name] == "inject":
        model = peft.inject_adapter_in_model(config(name, **settings), model)
    else:
        model = peft.get_peft_model(model, config(name, **settings))
    fill_lora(model).eval()
    ours = copy.deepcopy(model)
    report = accelerate_peft(ours)
    assert len(report.taken) == 6 and not report.left and not report.handing_over
    return model, ours


def layers(model):
    return [m for m in model.modules() if isinstance(m, Linear)]


def kinds(model):
    return {type(layer) for layer in layers(model)}


def same(ours, stock):
    torch.testing.assert_close(logits(ours), logits(stock), rtol=0, atol=1e-6)


def gradients(model):
    model.zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
