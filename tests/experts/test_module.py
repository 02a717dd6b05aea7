"""The adapters of one parameter of experts, and how tokens come to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import lora_grouped_linear
from lora_kernels.config import LayerConfig
from lora_kernels.experts.module import LoRAParameter
from lora_kernels.experts.routing import gathered, route, spread
from lora_kernels.kernels.dropout import draw_keep_mask

OFFSETS = torch.tensor([2, 2, 5], dtype=torch.int32)


class Experts(nn.Module):
    def __init__(self, shape, biased=True):
        super().__init__()
        self.up = nn.Parameter(torch.randn(shape))
        if biased:
            self.up_bias = nn.Parameter(torch.randn(3, 6))


def adapted(transposed=False, config=None, **settings):
    owner = Experts((3, 4, 6) if transposed else (3, 6, 4))
    config = config or LayerConfig(2, 3.0)
    owner.lora_of_up = LoRAParameter(owner, "up", config, transposed=transposed, **settings)
    nn.init.normal_(owner.lora_of_up.lora.B.weight)
    return owner


@pytest.mark.parametrize("transposed", [False, True])
def test_it_is_the_function(transposed):
    owner = adapted(transposed)
    layer = owner.lora_of_up
    x = torch.randn(5, 4)
    weight = owner.up.mT if transposed else owner.up
    a, b = layer.lora.A.weight, layer.lora.B.weight
    expected = lora_grouped_linear(x, weight, a, b, OFFSETS, owner.up_bias, scale=1.5)
    assert torch.equal(layer(x, OFFSETS), expected)
    merged = weight + (layer.delta_weight().mT if transposed else layer.delta_weight())
    assert layer.delta_weight().shape == owner.up.shape
    by_hand = torch.cat([x[:2] @ merged[0].t(), x[2:] @ merged[2].t()])
    by_hand += owner.up_bias[[0, 0, 2, 2, 2]]
    torch.testing.assert_close(expected, by_hand)


def test_it_begins_as_other_adapters_do_and_holds_the_factors_alone():
    owner = adapted()
    layer = LoRAParameter(owner, "up", LayerConfig(2))
    assert [name for name, _ in layer.named_parameters()] == ["lora.A.weight", "lora.B.weight"]
    assert layer.lora.B.weight.count_nonzero() == 0
    assert 0.005 < layer.lora.A.weight.std() < 0.05
    nn.init.ones_(layer.lora.B.weight)
    layer.lora.B.reset_parameters()
    assert layer.lora.B.weight.count_nonzero() == 0
    assert "up, rank=2" in repr(layer)


def test_copies_go_with_their_owner():
    owner = adapted()
    for copied in (copy.deepcopy(owner), pickle.loads(pickle.dumps(owner))):
        assert copied.lora_of_up.weight is copied.up
        assert copied.up is not owner.up


def test_adapters_in_use_add_up_each_with_its_dropout():
    owner = adapted(config=LayerConfig(2, 3.0, dropout=0.5))
    layer = owner.lora_of_up
    for name, dropout in (("same", 0.5), ("other", 0.25)):
        layer.add_adapter(name, LayerConfig(3, 2.0, dropout=dropout))
        nn.init.normal_(layer.loras[name].B.weight)
    layer.use_adapters({"default": 1.0, "same": -0.5, "other": 2.0})
    owner.train()
    x = torch.randn(5, 4)
    torch.manual_seed(3)
    found = layer(x, OFFSETS)
    torch.manual_seed(3)
    masks = {p: draw_keep_mask(x, p) / (1 - p) for p in (0.5, 0.25)}
    rows = [0, 0, 2, 2, 2]
    expected = torch.einsum("mk,mnk->mn", x, owner.up[rows]) + owner.up_bias[rows]
    for name, (a, b, scale) in layer.pairs().items():
        dropped = x * masks[layer.lora_configs[name].dropout]
        delta = (b @ a)[rows] * scale
        expected = expected + torch.einsum("mk,mnk->mn", dropped, delta)
    torch.testing.assert_close(found, expected)


def test_without_one_in_use_it_is_the_base():
    owner = adapted()
    owner.lora_of_up.use_adapters({})
    x, rows = torch.randn(5, 4), [0, 0, 2, 2, 2]
    expected = torch.einsum("mk,mnk->mn", x, owner.up[rows]) + owner.up_bias[rows]
    torch.testing.assert_close(owner.lora_of_up(x, OFFSETS), expected)
    assert owner.lora_of_up.delta_weight().count_nonzero() == 0


def test_tokens_go_to_their_experts_and_back():
    tokens = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(4, 2, dtype=torch.float64, requires_grad=True)
    chosen = torch.tensor([[2, 0], [0, 2], [3, 2], [2, 3]])  # 3 is an expert of another process

    def mixture(tokens, weights):
        routing = route(chosen, 3)
        assert routing.offsets.tolist() == [2, 2, 6] and routing.offsets.dtype == torch.int32
        scale = torch.tensor([1.0, 5.0, 10.0])[[0, 0, 2, 2, 2, 2]]
        rows = spread(tokens, routing)
        rows = torch.cat([rows[:6] * scale[:, None], rows[6:] * 0])
        return gathered(rows, weights, routing)

    factor = torch.tensor([1.0, 5.0, 10.0, 0.0])[chosen]
    by_hand = (tokens[:, None] * (weights * factor)[..., None]).sum(1)
    torch.testing.assert_close(mixture(tokens, weights), by_hand)
    assert torch.autograd.gradcheck(mixture, (tokens, weights))
    assert torch.autograd.gradgradcheck(mixture, (tokens, weights))
