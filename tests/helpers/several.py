"""Models that carry several adapters."""

from __future__ import annotations

import torch
from tiny_model import Model
from torch import nn

from lora_kernels import apply_lora, lora_parameters

# Each on modules of its own and on some that others have; alpha and rank differ.
ADAPTERS = {
    "default": {"rank": 3, "alpha": 2, "target_modules": ["q"]},
    "fr": {"rank": 2, "alpha": 6, "target_modules": ["q", "k"], "use_rslora": True},
    "tone": {"rank": 4, "target_modules": ["k", "gate"], "rank_pattern": {"gate": 1}},
}
ON = {
    "default": ["blocks.0.q", "blocks.1.q"],
    "fr": ["blocks.0.q", "blocks.0.k", "blocks.1.q", "blocks.1.k"],
    "tone": ["blocks.0.k", "blocks.1.k", "gate"],
}


def carrying(*names, model=None, seed=0, **settings):
    """A model with these adapters, of which the first is in use, and B not zero."""
    torch.manual_seed(seed)
    model = Model().double() if model is None else model
    for name in names or ADAPTERS:
        asked = {**ADAPTERS[name], **settings}
        assert apply_lora(model, name=name, verbose=False, **asked) == ON[name]
        fill(model, name)
    return model


def fill(model, name):
    for parameter in lora_parameters(model, name):
        nn.init.normal_(parameter, std=0.3)


def merged_by_hand(model, weights):
    """A plain model of the same weights, into which the branches have been added."""
    plain = Model().double()
    state = {n: t.clone() for n, t in model.state_dict().items() if "lora" not in n}
    for adapter, weight in weights.items():
        for name in ON[adapter]:
            layer = model.get_submodule(name)
            lora, config = layer.adapters()[adapter], layer.lora_configs[adapter]
            delta = lora.B.weight.detach() @ lora.A.weight.detach()
            state[f"{name}.weight"] += weight * config.scale * delta
    plain.load_state_dict(state)
    return plain
