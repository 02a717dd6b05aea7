"""Gated activations in torch, against autograd of the one-line statement in float64."""

from __future__ import annotations

import pytest
import torch
from gated_activations import ACTS, statement, truth_of

from lora_kernels.kernels import activations
from lora_kernels.kernels.activations import ACTIVATIONS, gate_backward, gate_forward, slope_times


def test_there_is_an_oracle_for_each():
    assert set(ACTS) == set(ACTIVATIONS)


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize("need_h", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_and_backward(activation, need_h, compiling, monkeypatch):
    monkeypatch.setattr(activations, "is_compiling", lambda: compiling)
    gate, up, dh = (torch.randn(7, 19, dtype=torch.float64) for _ in range(3))
    wanted, dgate, dup = truth_of(activation, dh, gate, up)
    operands = gate.clone(), up.clone()
    torch.testing.assert_close(gate_forward(gate, up, activation), wanted)
    h, *found = gate_backward(dh.clone(), gate, up, activation, need_h)
    assert (h is not None) == need_h
    if h is not None:
        torch.testing.assert_close(h, wanted)
    torch.testing.assert_close(found, [dgate, dup])
    assert torch.equal(gate, operands[0]) and torch.equal(up, operands[1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_dgate_takes_the_place_of_dh(activation):
    gate, up, dh = (torch.randn(7, 19) for _ in range(3))
    _, dgate, dup = gate_backward(dh, gate, up, activation, False)
    assert dgate.data_ptr() == dh.data_ptr() != dup.data_ptr()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_slope_can_be_differentiated(activation):
    dact, gate = (torch.randn(3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda d, g: slope_times(d, g, activation), (dact, gate))
    assert torch.equal(statement(activation, gate, dact), ACTS[activation](gate) * dact)
