"""LoRA on weights that multiply by themselves, as torchao's."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from own_weight import Int8Weight, Int8WithoutGradient, quantised
from torch import nn

from lora_kernels import LoRALinear, explain, lora_linear, use_backend
from lora_kernels.dispatch import multiplies_by_itself


def pair(dtype=torch.float64, bias=True, dropout=0.0, kind=Int8Weight):
    """A LoRALinear on such a weight, and one on a plain weight of the same values."""
    torch.manual_seed(0)
    layers = [
        LoRALinear.from_linear(linear, 3, alpha=6, dropout=dropout)
        for linear in quantised(nn.Linear(8, 5, bias, dtype=dtype), kind)
    ]
    for layer in layers:
        torch.manual_seed(1)
        for factor in (layer.lora.A, layer.lora.B):
            nn.init.normal_(factor.weight)
        layer.weight.requires_grad_(False)
    return layers


def results(layer, x):
    x = x.detach().requires_grad_()
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), x.grad, layer.lora.A.weight.grad, layer.lora.B.weight.grad


@pytest.mark.parametrize("shape", [(8,), (4, 8), (2, 3, 8), (0, 8)])
@pytest.mark.parametrize("bias", [True, False])
def test_values_and_gradients(shape, bias):
    own, plain = pair(bias=bias)
    x = torch.randn(shape, dtype=torch.float64)
    torch.testing.assert_close(results(own, x), results(plain, x))
    if bias:
        torch.testing.assert_close(own.bias.grad, plain.bias.grad)


def test_gradients_in_float64():
    own, _ = pair()
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    factors = own.lora.A.weight, own.lora.B.weight

    def f(x, a, b, bias):
        return lora_linear(x, own.weight, a, b, bias, scale=2.0)

    assert torch.autograd.gradcheck(f, (x, *factors, own.bias))
    assert torch.autograd.gradgradcheck(f, (x, *factors, own.bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_stay_wide(dtype):
    own, plain = pair(dtype)
    assert own.lora.A.weight.dtype == torch.float32
    x = torch.randn(4, 8, dtype=dtype)
    for found, expected in zip(results(own, x), results(plain, x), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(
            found.float(), expected.float(), rtol=0, atol=expected.abs().max().item() * 0.02
        )


def test_under_autocast_the_product_is_as_without_lora():
    own, plain = pair(torch.float32)
    x = torch.randn(4, 8)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y, base = own(x), F.linear(x, own.weight, own.bias)
        torch.testing.assert_close(y, plain(x), rtol=0.05, atol=0.05)
    assert y.dtype == base.dtype == torch.bfloat16
    with pytest.raises(TypeError, match="must share a dtype"):
        own(x.bfloat16())


def test_dropout():
    own, plain = pair(dropout=0.5)
    x = torch.ones(1, 8, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(x), plain.eval()(x))
        base = F.linear(x, own.weight, own.bias)
        dropped = [own.train()(x) - base for _ in range(4000)]
        delta = own.delta_weight()
    # x is ones: the branch is a sum of columns of the delta, each of them twice or not at all.
    sums = 2 * delta @ torch.cartesian_prod(*[torch.arange(2.0, dtype=x.dtype)] * 8).T
    distance = torch.cdist(torch.cat(dropped), sums.T)
    assert distance.min(1).values.max() < 1e-6
    assert len(distance.argmin(1).unique()) > 250  # of 256, each as likely as the other


def test_several_adapters():
    own, plain = pair()
    x = torch.randn(4, 8, dtype=torch.float64)
    for layer in (own, plain):
        torch.manual_seed(2)
        layer.add_adapter("more", layer.lora_config)
        nn.init.normal_(layer.loras["more"].B.weight)
        layer.use_adapters({"default": 1.0, "more": -0.5})
    torch.testing.assert_close(own(x), plain(x))


def test_where_no_gradient_passes_it_is_said():
    own, _ = pair(kind=Int8WithoutGradient)
    x = torch.randn(4, 8, dtype=torch.float64)
    for bias_is_trained in (False, True):
        own.bias.requires_grad_(bias_is_trained)
        own(x).sum().backward()  # the first layer of a model, whose x needs none
        with torch.no_grad():
            own(x.requires_grad_())
        with pytest.raises(RuntimeError, match="Int8WithoutGradient passes no gradient on to x"):
            own(x.requires_grad_())
        x = x.detach()


def test_backends():
    own, _ = pair()
    assert explain(own) == "reference: the weight is a Int8Weight, which multiplies by itself"
    x = torch.randn(4, 8, dtype=torch.float64)
    y = own(x)
    with use_backend("reference"):
        assert torch.equal(own(x), y)
    with use_backend("triton"):
        assert explain(own).startswith("none: ") and "Int8Weight" in explain(own)
        with pytest.raises(RuntimeError, match="the weight is a Int8Weight"):
            own(x)


def test_a_copy_and_a_compiled_one():
    own, _ = pair(torch.float32)
    x = torch.randn(4, 8)
    assert torch.equal(copy.deepcopy(own)(x), own(x))
    assert torch.equal(own.to_linear()(x), F.linear(x, own.weight, own.bias))
    compiled = torch.compile(own, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(results(compiled, x)[0], results(own, x)[0])


class Marked(nn.Parameter):
    """A class of parameters without products of their own."""


def test_other_classes_are_served_as_ever():
    layer = LoRALinear(8, 5, rank=2)
    y = layer(torch.ones(1, 8))
    layer.weight = Marked(layer.weight.detach())
    assert torch.equal(layer(torch.ones(1, 8)), y)
    assert "multiplies" not in explain(layer)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(torch.ones(1, 8)), y)


def test_torchs_own_classes_are_served_as_ever():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
    from torch.distributed.tensor import DTensor

    for kind in (torch.Tensor, nn.Parameter, Marked, DTensor, FakeTensor):
        assert not multiplies_by_itself(kind)
    assert multiplies_by_itself(Int8Weight) and multiplies_by_itself(Int8WithoutGradient)
    with FakeTensorMode():
        layer, x = LoRALinear(8, 5, rank=2), torch.ones(2, 8)
        assert isinstance(layer.weight, FakeTensor)
        assert "multiplies" not in explain(layer) and layer(x).shape == (2, 5)
