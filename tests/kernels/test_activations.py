"""Gated activations in torch, against autograd of the one-line statement in float64."""

from __future__ import annotations

import pytest
import torch
from gated_activations import ACTS, statement, truth_of

from lora_kernels.kernels import activations
from lora_kernels.kernels.activations import (
    ACTIVATIONS,
    activate,
    gate_backward,
    gate_forward,
    slope_times,
)


def test_there_is_an_oracle_for_each():
    assert set(ACTS) == set(ACTIVATIONS)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward(activation, compiling, monkeypatch):
    monkeypatch.setattr(activations, "is_compiling", lambda: compiling)
    gate, up, dh = (torch.randn(7, 19, dtype=torch.float64) for _ in range(3))
    h, *wanted = truth_of(activation, dh, gate, up)
    operands = gate.clone(), up.clone()
    torch.testing.assert_close(gate_forward(gate, up, activation), h)
    found = gate_backward(dh.clone(), activate(gate, activation), gate, up, activation)
    torch.testing.assert_close(list(found), wanted)
    assert torch.equal(gate, operands[0]) and torch.equal(up, operands[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_backward_writes_over_what_it_has_read(activation):
    gate, up, dh = (torch.randn(7, 19) for _ in range(3))
    act = activate(gate, activation)
    dgate, dup = gate_backward(dh, act, gate, up, activation)
    assert dgate.data_ptr() == dh.data_ptr() and dup.data_ptr() == act.data_ptr()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slope_can_be_differentiated(activation):
    dact, gate = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda d, g: slope_times(d, g, activation), (dact, gate))
    assert torch.equal(statement(activation, gate, dact), ACTS[activation](gate) * dact)
