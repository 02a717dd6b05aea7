"""A weight of a class of its own, as torchao's quantised weights are."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

aten = torch.ops.aten


class Int8Weight(torch.Tensor):
    """Whole numbers of eight bits and a scale a row; it answers ``F.linear`` and little else."""

    @staticmethod
    def __new__(cls, numbers, scales):
        return torch.Tensor._make_wrapper_subclass(
            cls, numbers.shape, dtype=scales.dtype, device=numbers.device
        )

    def __init__(self, numbers, scales):
        self.numbers, self.scales = numbers, scales

    def __tensor_flatten__(self):
        return ["numbers", "scales"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["numbers"], inner["scales"])

    def __repr__(self, **_):
        return f"{type(self).__name__}({list(self.shape)})"

    def wide(self):
        return self.numbers.to(self.scales.dtype) * self.scales

    def product(self, x, bias):
        return F.linear(x, self.wide(), bias)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            return weight.product(x, bias)
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (aten.detach.default, aten.clone.default, aten.alias.default):
            weight = args[0]
            return cls(*(function(t) for t in (weight.numbers, weight.scales)))
        raise NotImplementedError(f"{cls.__name__} does not know {function}")


class Int8WithoutGradient(Int8Weight):
    """Rounds x as well, so that no gradient passes."""

    def product(self, x, bias):
        y = F.linear(x.detach().round(decimals=2), self.wide())
        return y if bias is None else y + bias


def quantised(linear, kind=Int8Weight):
    """The linear with such a weight, and a plain one of the same values."""
    scales = linear.weight.detach().abs().amax(1, keepdim=True) / 127
    numbers = (linear.weight.detach() / scales).round().to(torch.int8)
    plain = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None)
    plain = plain.to(linear.weight.dtype)
    plain.load_state_dict(linear.state_dict())
    plain.weight.data = numbers.to(scales.dtype) * scales
    linear.weight = nn.Parameter(kind(numbers, scales), requires_grad=False)
    return linear, plain
