"""``act(gate)·up`` as one line of torch, and what autograd makes of it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

ACTS = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: (
        x * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))
    ),
}
# As torch has them.
OWN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def statement(activation, gate, up):
    return ACTS[activation](gate) * up


def truth_of(activation, dh, gate, up):
    """``(h, dgate, dup)`` in float64."""
    gate, up = (t.detach().double().requires_grad_() for t in (gate, up))
    h = statement(activation, gate, up)
    return h.detach(), *torch.autograd.grad(h, (gate, up), dh.double())


def plain_of(activation, dh, gate, up):
    """The same as torch's own activations compute it in the operands' dtype."""
    gate, up = (t.detach().clone().requires_grad_() for t in (gate, up))
    h = OWN[activation](gate) * up
    return h.detach(), *torch.autograd.grad(h, (gate, up), dh)
