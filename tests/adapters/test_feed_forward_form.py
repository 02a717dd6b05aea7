"""Which forwards are those of a gated feed-forward, by their source."""

from __future__ import annotations

import functools
import importlib

import pytest
import torch.nn.functional as F
from torch import nn

from lora_kernels.adapters.feed_forward_form import child_name, form_of, valued


class Names:
    gate, up, down = "first", "second", "third"


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(3, 3) for _ in range(3))
        self.act, self.names = nn.SiLU(), Names()


class Plain(Base):
    def forward(self, x):
        """Documented."""
        return self.third(self.act(self.first(x)) * self.second(x))


class Turned(Base):
    def forward(self, hidden):
        gated = self.act(self.first(hidden))
        up = self.second(hidden)
        hidden = up * gated
        hidden = self.third(hidden)
        return hidden


class ByNames(Base):
    def forward(self, x):
        gate, down, up = (
            getattr(self, name) for name in (self.names.gate, self.names.down, self.names.up)
        )
        return down(F.silu(gate(x)) * up(x))


class InTurn(Base):
    def forward(self, x):
        gate, up = getattr(self, "first"), self.second  # noqa: B009
        return getattr(self, self.names.down)(nn.functional.gelu(gate(x)) * up(x))


FOUND = {Plain: nn.SiLU, Turned: nn.SiLU, ByNames: F.silu, InTurn: F.gelu}


@pytest.mark.parametrize("kind", FOUND, ids=lambda kind: kind.__name__)
def test_the_form_is_found(kind):
    form, module = form_of(kind.forward), kind()
    assert [child_name(term, module) for term in form[:3]] == ["first", "second", "third"]
    act = valued(form.activation, module)
    assert act is FOUND[kind] or type(act) is FOUND[kind]


class Sum(Base):
    def forward(self, x):
        return self.third(self.act(self.first(x)) + self.second(x))


class BothGated(Base):
    def forward(self, x):
        return self.third(self.act(self.first(x)) * self.act(self.second(x)))


class Ungated(Base):
    def forward(self, x):
        return self.third(self.first(x) * self.second(x))


class Scaled(Base):
    def forward(self, x):
        return self.third(self.act(self.first(x)) * self.second(x)) * 2


class Residual(Base):
    def forward(self, x):
        return x + self.third(self.act(self.first(x)) * self.second(x))


class OfAnother(Base):
    def forward(self, x):
        y = self.act(x)
        return self.third(self.act(self.first(y)) * self.second(x))


class Renamed(Base):
    def forward(self, x):
        x = self.act(x)
        return self.third(self.act(self.first(x)) * self.second(x))


class Option(Base):
    def forward(self, x):
        return self.third(F.gelu(self.first(x), approximate="tanh") * self.second(x))


class Branch(Base):
    def forward(self, x):
        if self.training:
            return x
        return self.third(self.act(self.first(x)) * self.second(x))


class Noted(Base):
    def forward(self, x):
        self.seen = x
        return self.third(self.act(self.first(x)) * self.second(x))


class Called(Base):
    def forward(self, x):
        self.note(x)
        return self.third(self.act(self.first(x)) * self.second(x))


class More(Base):
    def forward(self, x, y=None):
        return self.third(self.act(self.first(x)) * self.second(x))


class Deeper(Base):
    def forward(self, x):
        return self.names.third(self.act(self.first(x)) * self.second(x))


class Shadowed(Base):
    def forward(self, x):
        getattr = self.names
        gate = getattr(self, "first")
        return self.third(self.act(gate(x)) * self.second(x))


class Filtered(Base):
    def forward(self, x):
        gate, down, up = (getattr(self, n) for n in ("first", "third", "second") if n != x)
        return down(F.silu(gate(x)) * up(x))


def doubled(function):
    @functools.wraps(function)
    def wrapper(self, x):
        return 2 * function(self, x)

    return wrapper


class Wrapped(Base):
    @doubled
    def forward(self, x):
        return self.third(self.act(self.first(x)) * self.second(x))


class Lambda(Base):
    forward = lambda self, x: self.third(self.act(self.first(x)) * self.second(x))  # noqa: E731


OTHERS = [Sum, BothGated, Ungated, Scaled, Residual, OfAnother, Renamed, Option, Branch, Noted]
OTHERS += [Called, More, Deeper, Shadowed, Filtered, Wrapped, Lambda, nn.Linear, nn.Sequential]


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_another_form_is_not(kind):
    assert form_of(kind.forward) is None


def test_a_forward_without_source_is_not():
    scope = {}
    exec("def forward(self, x):\n    return self.d(self.a(self.g(x)) * self.u(x))", scope)
    assert form_of(scope["forward"]) is None
    assert form_of(len) is None


TRANSFORMERS = {
    "llama": "LlamaMLP",
    "mistral": "MistralMLP",
    "qwen2": "Qwen2MLP",
    "qwen3": "Qwen3MLP",
    "gemma": "GemmaMLP",
    "gemma3": "Gemma3MLP",
    "qwen2_moe": "Qwen2MoeMLP",
    "olmo2": "Olmo2MLP",
}


@pytest.mark.parametrize("family", TRANSFORMERS)
def test_those_of_transformers(family):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    form = form_of(getattr(module, TRANSFORMERS[family]).forward)
    assert [term[-1] for term in form] == ["gate_proj", "up_proj", "down_proj", "act_fn"]


@pytest.mark.parametrize("family", ["phi3", "gpt2"])
def test_others_of_transformers(family):
    pytest.importorskip("transformers")
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    kind = {"phi3": "Phi3MLP", "gpt2": "GPT2MLP"}[family]
    assert form_of(getattr(module, kind).forward) is None
