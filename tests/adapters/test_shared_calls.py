"""What the source of a class says of children that are called with one variable."""

from __future__ import annotations

import pytest
from torch import nn

from lora_kernels.adapters.shared_calls import called_together


class Attention(nn.Module):
    def forward(self, x, mask=None):
        q = self.q(x).view(-1)
        k, v = self.k(x), self.v(x)
        return self.o(q * k + v)


class FeedForward(nn.Module):
    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Assigned(nn.Module):
    def forward(self, x):
        a = self.a(x)
        x = self.b(x)
        return a + self.c(x) + self.d(x)


class InPlace(nn.Module):
    def forward(self, x):
        a = self.a(x)
        x.add_(1)
        b = self.b(x)
        x[0] = 1
        c = self.c(x)
        x += 1
        return a + b + c + self.d(x)


class Cross(nn.Module):
    def forward(self, x, states):
        return self.attend(self.q(x), states)

    def attend(self, q, states):
        return q + self.k(states) + self.v(states)


class Inherited(Attention):
    pass


class Overriding(Attention):
    def forward(self, x):
        return self.q(x) + self.k(x + 1)


class More(nn.Module):
    def forward(self, x):
        return self.a(x, x) + self.b(x, y=1) + self.other.c(x) + self.d(x.t())


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Attention, {("q", "k", "v")}),
        (FeedForward, {("gate", "up")}),
        (Assigned, {("a", "b"), ("c", "d")}),
        (InPlace, set()),
        (Cross, {("k", "v")}),
        (Inherited, {("q", "k", "v")}),
        (Overriding, set()),
        (More, set()),
    ],
)
def test_source(cls, expected):
    assert set(called_together(cls)) == expected


def test_without_source():
    scope = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x): return self.a(x) + self.b(x)", scope)
    assert called_together(scope["Made"]) == ()
