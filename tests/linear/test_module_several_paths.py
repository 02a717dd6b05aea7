"""Several adapters of a layer on every path: kernels in the interpreter and on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close
from kernel_cases import DTYPES, PATHS
from torch import nn

from lora_kernels import LoRALinear, use_backend
from lora_kernels.config import LayerConfig
from lora_kernels.linear import module as module_file

K, N = 40, 24


def layer_of(dtype, device, dropouts=(0.0, 0.0, 0.0), lora_dtype=None):
    linear = nn.Linear(K, N).to(device, dtype)
    wide = {"lora_dtype": lora_dtype}
    layer = LoRALinear.from_linear(linear, 4, alpha=6, dropout=dropouts[0], **wide)
    layer.add_adapter("fr", LayerConfig(18, 9.0, dropouts[1], True), **wide)
    layer.add_adapter("tone", LayerConfig(3, dropout=dropouts[2]), **wide)
    for lora in layer.adapters().values():
        for part in (lora.A, lora.B):
            nn.init.normal_(part.weight, std=0.3)
    return layer


def summed(layer, x, weights):
    """The definition, branch by branch."""
    y = nn.functional.linear(x, layer.weight, layer.bias)
    for name, weight in weights.items():
        lora_a, lora_b = (part.weight.to(x.dtype) for part in layer.adapters()[name].children())
        y = y + weight * layer.lora_configs[name].scale * (x @ lora_a.t() @ lora_b.t())
    return y


def results(y, x, layer):
    parameters = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    grads = torch.autograd.grad(y, [x, *parameters.values()], dy, allow_unused=True)
    names = ("y", "dx", *parameters)
    return {n: t for n, t in zip(names, (y, *grads), strict=True) if t is not None}


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("names", [["default", "fr"], ["tone", "fr", "default"], ["fr"]])
def test_within_the_budget(names, device, backend, dtype, wide):
    layer = layer_of(dtype, device, lora_dtype=torch.float32 if wide else dtype)
    weights = dict(zip(names, (0.5, -1.5, 1.0), strict=False))
    layer.use_adapters(weights)
    x = torch.randn(2, 9, K, device=device, dtype=dtype, requires_grad=True)
    with use_backend(backend):
        got = results(layer(x), x, layer)
    expected = results(summed(layer, x, weights), x, layer)
    exact = copy.deepcopy(layer).double()
    double = x.detach().double().requires_grad_()
    truth = results(summed(exact, double, weights), double, exact)
    assert got.keys() == expected.keys() and len(got) == 4 + 2 * len(names)
    for name, value in got.items():
        assert_close(value, expected[name], truth[name], name)


@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_those_of_one_dropout_are_one_call_of_the_asked_backend(monkeypatch, device, backend):
    calls = []
    real = module_file.lora_linear
    monkeypatch.setattr(
        module_file, "lora_linear", lambda *a, **k: calls.append(a[2].shape) or real(*a, **k)
    )
    layer = layer_of(torch.float32, device, (0.2, 0.2, 0.2))
    layer.use_adapters({"default": 1.0, "fr": 1.0, "tone": 2.0})
    x = torch.randn(9, K, device=device)
    with use_backend(backend):
        torch.manual_seed(1)
        first = layer(x)
        torch.manual_seed(1)
        again = layer(x)
        other = layer(x)
    assert calls == [(25, K)] * 3
    assert torch.equal(first, again) and not torch.equal(first, other)
