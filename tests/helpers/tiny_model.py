"""A small model of plain torch modules, and what tests ask of it before and after."""

from __future__ import annotations

import torch
from torch import nn

from lora_kernels import apply_lora, lora_parameters

# Of the files that hold an adapter by themselves.
SUFFIXES = [".pth", ".pt", ".safetensors"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 4)
        self.out_proj = nn.Linear(4, 8)

    def forward(self, x):
        return x + self.out_proj(self.k(self.q(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.gate = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.gate(x))


IDS = torch.arange(10)[None]


def trained(model, **kwargs):
    """LoRA on ``model`` with a B that is not zero."""
    apply_lora(model, verbose=False, **kwargs)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def snapshot(model):
    return {id(m): type(m) for m in model.modules()}, {
        name: p.clone() for name, p in model.state_dict().items()
    }


def assert_untouched(model, before):
    modules, state = snapshot(model)
    assert modules == before[0] and state.keys() == before[1].keys()
    assert all(torch.equal(state[name], before[1][name]) for name in state)
