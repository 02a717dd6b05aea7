"""The feed-forward of each era computed as a whole, with LoRA on its three linears."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_minimind import (
    assert_same_gradients,
    gradients,
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)

from lora_kernels import apply_lora, lora_parameters, mark_only_lora_as_trainable
from lora_kernels.adapters.feed_forwards import feed_forwards, fuse_feed_forwards
from minimind.model.eras import ERAS


def adapted(**settings):
    model = tiny(**settings)
    apply_lora(model, 4, target_modules="all-linear", verbose=False)
    mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("era", ERAS)
def test_found_and_the_same(era, use_moe):
    model = adapted(era=era, use_moe=use_moe)
    whole = copy.deepcopy(model)
    names = fuse_feed_forwards(whole)
    kinds = [type(whole.get_submodule(name)).__name__ for name in names]
    assert kinds == ["FeedForward"] * len(kinds) and names == feed_forwards(model)
    assert len(names) == sum(type(m).__name__ == "FeedForward" for m in model.modules()) > 1
    for each in (model, whole):
        each(input_ids=ids(2, 9)).logits.square().mean().backward()
    largest = max(p.grad.abs().max().item() for p in lora_parameters(model) if p.grad is not None)
    assert_same_gradients(gradients(whole), gradients(model), rtol=1e-4, atol=1e-6 * largest)
