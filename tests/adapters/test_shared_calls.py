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


class Branches(nn.Module):
    def forward(self, x, states=None):
        q = self.q(x)
        if states is None:
            k, v = self.k(x), self.v(x)
        else:
            k, v = self.k(states), self.v(states)
        y = self.a(x) if self.training else self.b(x)
        return q + k + v + y + self.c(x)


class Returning(nn.Module):
    def forward(self, x):
        if self.first:
            return self.a(x)
        return self.b(x) + self.c(x)


class Heads(nn.Module):
    def forward(self, x):
        return self.policy(x), self.value(x)


class HeadsByName(nn.Module):
    def forward(self, x):
        mean = self.mean(x)
        spread = self.spread(x).exp()
        return {"mean": mean, "spread": spread}


class WithCache(nn.Module):
    def forward(self, x, cache):
        q, k, v = self.q(x), self.k(x), self.v(x)
        k, v = cache.update(k, v)
        out, weights = attend(q, k, v)  # noqa: F821
        return out, weights


class Listed(nn.Module):
    def forward(self, x):
        return sum(head(x) for head in self.heads) + sum(f(x) for f in (self.a, self.b))


class ByName(nn.Module):
    def forward(self, x):
        q, k = (getattr(self, name)(x).tanh() for name in (self.names.q, self.names.k))
        return q * k


class InLoop(nn.Module):
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.a(x) + self.b(x)


@pytest.mark.parametrize(
    ("cls", "expected"),
    [
        (Attention, {(("q", "k", "v"), False)}),
        (FeedForward, {(("gate", "up"), False)}),
        (Assigned, {(("a", "b"), False), (("c", "d"), False)}),
        (InPlace, set()),
        (Cross, {(("k", "v"), False)}),
        (Inherited, {(("q", "k", "v"), False)}),
        (Overriding, set()),
        (More, set()),
        (Branches, {(("k", "v"), False), (("q", "c"), False)}),
        (Returning, {(("b", "c"), False)}),
        (Heads, {(("policy", "value"), True)}),
        (HeadsByName, {(("mean", "spread"), True)}),
        (WithCache, {(("q", "k", "v"), False)}),
        (Listed, {(("heads.*", "a", "b"), False)}),
        (ByName, {(("=names.q", "=names.k"), False)}),
        (InLoop, {(("a", "b"), False)}),
    ],
)
def test_source(cls, expected):
    assert {(group.children, group.apart) for group in called_together(cls)} >= expected
    assert len(called_together(cls)) <= len(expected) + (cls is Branches)  # and states' k, v


def test_without_source():
    scope = {"nn": nn}
    exec("class Made(nn.Module):\n    def forward(self, x): return self.a(x) + self.b(x)", scope)
    assert called_together(scope["Made"]) == ()
