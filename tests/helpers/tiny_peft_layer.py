"""One PEFT layer, as it is and accelerated."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import accelerate_peft

peft = pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear  # noqa: E402

from lora_kernels.adapters import peft_layer  # noqa: E402

K, N = 24, 20


class Model(nn.Module):
    def __init__(self, linear):
        super().__init__()
        self.linear = linear

    def forward(self, x):
        return self.linear(x)


def pair(dtype=torch.float32, base=nn.Linear, **settings):
    """The same PEFT layer twice, PEFT's own and ours."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": ["linear"], **settings}
    cast = settings.pop("autocast_adapter_dtype", True)
    model = Model(base(K, N, bias=settings.pop("base_bias", True))).to(dtype)
    config = peft.LoraConfig(**settings)
    model = peft.get_peft_model(model, config, autocast_adapter_dtype=cast)
    model.add_adapter("second", config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    ours = copy.deepcopy(model)
    assert accelerate_peft(ours).taken or base is not nn.Linear
    layers = model.base_model.model.linear, ours.base_model.model.linear
    layers[1].__class__ = peft_layer.FastLinear  # also where accelerate_peft would not
    assert type(layers[0]) is Linear
    return layers


def results(layer, x, **kwargs):
    """y, dx and the gradients of all parameters that require one."""
    x = x.detach().requires_grad_()
    y = layer(x, **kwargs)
    trained = {n: p for n, p in layer.named_parameters() if p.requires_grad}
    dy = torch.linspace(-1, 1, y.numel()).reshape(y.shape).to(y.dtype)
    grads = torch.autograd.grad(y, [x, *trained.values()], dy, allow_unused=True)
    return dict(zip(["y", "dx", *trained], [y, *grads], strict=True))


def count_served(monkeypatch):
    """A list that grows by the keywords of each call that goes to `lora_linear`."""
    calls = []
    real = peft_layer.lora_linear

    def counting(*args, **kwargs):
        calls.append(kwargs)
        return real(*args, **kwargs)

    monkeypatch.setattr(peft_layer, "lora_linear", counting)
    return calls
