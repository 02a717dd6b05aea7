"""Which uses of a weight in a forward's source count, and under which tests."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lora_kernels.adapters.bypass import bypassed_linears


class Two(nn.Module):
    """``a`` is called by every forward below and ``b`` is what they differ in."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.slices, self.mode, self.config = 1, "plain", None


def helper(module, x):
    return F.linear(x, module.weight)


def asks(module, x):
    return x.to(module.weight.dtype) if module.weight.device.type == "cpu" else x


def decorated(function):
    @functools.wraps(function)
    def wrapper(*args):
        return function(*args)

    return wrapper


class Handed(Two):
    def forward(self, x):
        return F.linear(self.a(x), self.b.weight, self.b.bias)


class Keyword(Two):
    def forward(self, x):
        return torch.addmm(x, self.a(x), mat2=self.b.weight)


class Multiplied(Two):
    @decorated
    def forward(self, x):
        return (self.b.weight @ self.a(x).T).T


class Named(Two):
    def forward(self, x):
        layer, x = self.b, self.a(x)
        weight = layer.weight
        return x * weight.sum() if x.ndim else x


class Data(Two):
    def forward(self, x):
        self.b.weight.data.clamp_(-1, 1)
        return self.b(self.a(x))


class ByMethod(Two):
    def forward(self, x):
        return self.finish(self.a(x), layer=self.b)

    def finish(self, x, layer):
        return F.linear(x, layer.weight.t().T)


class ByProperty(Two):
    @property
    def transposed(self):
        return self.b.weight.T

    def forward(self, x):
        return self.a(x) @ self.transposed


class ByHelper(Two):
    def forward(self, x):
        return helper(self.b, self.a(x))


class ByGetattr(Two):
    def forward(self, x):
        return F.linear(self.a(x), getattr(self.b, "weight"))  # noqa: B009


class BySuper(Handed):
    def forward(self, x):
        return super().forward(x)


class ByStatic(Two):
    @staticmethod
    def product(x, layer):
        return x @ layer.weight

    def forward(self, x):
        return self.product(self.a(x), self.b)


class InClosure(Two):
    def forward(self, x):
        def run(y):
            return y @ self.b.weight

        return run(self.a(x))


class InContainer(Two):
    def forward(self, x):
        return self.a(x) @ torch.stack([self.b.weight, self.b.weight])[0]


class Returned(Two):
    def forward(self, x):
        return self.a(x), self.b.weight


class OneWay(Two):
    def forward(self, x, mask=None):
        layer = self.a if mask is None else self.b
        return self.b(x) if x.sum() > 0 else x @ layer.weight


class Training(Two):
    def forward(self, x):
        if self.training:
            return self.a(x) @ self.b.weight
        return self.b(self.a(x))


class WithCache(Two):
    def forward(self, x, cache=None):
        if cache is not None:
            return self.a(x) @ self.b.weight
        return self.b(self.a(x))


class Set(Two):
    def __init__(self):
        super().__init__()
        self.mode = "fused"

    def forward(self, x):
        if self.mode == "plain":
            return self.b(self.a(x))
        return self.a(x) @ self.b.weight


class NotAtFirst(Two):
    def forward(self, x):
        first = True
        for _ in range(2):
            x = self.b(self.a(x)) if first else x @ self.b.weight
            first = False
        return x


READ = [
    *(Handed, Keyword, Multiplied, Named, Data, ByMethod, ByProperty, ByHelper, ByGetattr, BySuper),
    *(ByStatic, InClosure, InContainer, Returned, Training, WithCache, Set, NotAtFirst),
]


@pytest.mark.parametrize("kind", READ)
def test_a_weight_that_is_used_is_noticed(kind):
    found = bypassed_linears(kind())
    assert list(found) == ["b"]
    assert found["b"].partition(".")[0] in (kind.__name__, "Handed", "helper")


def test_either_of_two_is_noticed_by_the_arguments_default():
    assert list(bypassed_linears(OneWay())) == ["a", "b"]


class Asked(Two):
    def forward(self, x):
        weight = self.b.weight
        if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype and weight.dim() == 2:
            x = x.to(self.b.weight.dtype).to(weight)
        assert self.b.weight is not None and hasattr(self.b.weight, "shape")
        assert self.b.weight.data.is_floating_point()
        y = x.new_zeros(self.b.weight.shape[0]) + torch.zeros_like(self.b.weight)
        return self.b(self.a(asks(self.b, x))) + y.sum() + x.new_ones(self.b.weight.size(0)).sum()


class Bias(Two):
    def forward(self, x):
        return self.b(self.a(x)) - self.b.bias


class Initial(Two):
    def reset(self):
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.b(self.a(x))


class Sliced(Two):
    def forward(self, x):
        if self.slices > 1 and self.mode == "plain":
            parts = self.b.weight.split(2)
            return torch.cat([F.linear(self.a(x), part) for part in parts], dim=-1)
        return self.b(self.a(x))


class Early(Two):
    def forward(self, x, query=None):
        if query is None or not self.slices:
            return self.b(self.a(x))
        return query @ self.b.weight


class Configured(Two):
    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"fused": False})()

    def forward(self, x):
        return self.a(x) @ self.b.weight if self.config.fused else self.b(self.a(x))


class Other(Two):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 1), nn.LayerNorm(4)

    def forward(self, x):
        return self.b(self.a(x)) @ self.conv.weight[..., 0] * self.norm.weight


@pytest.mark.parametrize("kind", [Asked, Bias, Initial, Sliced, Early, Configured, Other])
def test_a_weight_that_is_asked_about_or_of_a_way_not_taken_is_not(kind):
    assert bypassed_linears(kind()) == {}
    x = torch.ones(2, 4)
    kind()(x)  # it is a forward indeed


def test_settings_are_those_of_the_module_at_hand():
    model = nn.Sequential(Sliced(), Sliced(), Configured())
    model[1].slices = 2
    model[2].config.fused = True
    assert list(bypassed_linears(model)) == ["1.b", "2.b"]
    model[1].mode = "exact"
    assert list(bypassed_linears(model)) == ["2.b"]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.more = Two(), nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.named = nn.ModuleDict({"k": nn.Linear(4, 4), "v": nn.Linear(4, 4)})


class FromAbove(Block):
    def forward(self, x):
        return x @ self.inner.b.weight


class Indexed(Block):
    def forward(self, x):
        return x @ self.more[1].weight


class Last(Block):
    def forward(self, x):
        return x @ self.more[-1].weight


class Looped(Block):
    def forward(self, x):
        for i, layer in enumerate(self.more[1:]):
            x = x @ layer.weight + i
        return x


class Zipped(Block):
    def forward(self, x):
        for layer, (_, other) in zip(self.more, self.named.items(), strict=False):
            x = layer(x) @ other.weight
        return x


class Comprehended(Block):
    def forward(self, x):
        return x @ torch.cat([layer.weight for layer in self.named.values()])


class Pairwise(Block):
    def forward(self, x):
        for layer in (self.inner.a, self.named["v"]):
            x = x @ layer.weight
        return x


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (FromAbove, ["inner.b"]),
        (Indexed, ["more.1"]),
        (Last, ["more.0", "more.1", "more.2"]),  # which one is not told apart
        (Looped, ["more.0", "more.1", "more.2"]),
        (Zipped, ["named.k", "named.v"]),
        (Comprehended, ["named.k", "named.v"]),
        (Pairwise, ["inner.a", "named.v"]),
    ],
)
def test_what_lies_deeper_is_noticed(kind, names):
    assert list(bypassed_linears(nn.ModuleList([kind()]))) == [f"0.{name}" for name in names]


class Parts(Two):
    """No forward of its own: its owner calls the method."""

    def predict(self, x):
        return self.a(x) @ self.b.weight


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = Parts()

    def forward(self, x):
        return self.parts.predict(x)


def test_a_method_that_is_called_from_above_is_looked_into():
    assert bypassed_linears(Owner()) == {"parts.b": "Parts.predict"}
    assert bypassed_linears(Parts()) == {}


def test_of_what_has_no_source_nothing_is_said():
    space = {"nn": nn, "Two": Two}
    exec("class Hidden(Two):\n    def forward(self, x):\n        return x @ self.b.weight", space)
    assert bypassed_linears(space["Hidden"]()) == {}
