"""Gated activations by the kernels, against float64."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from gated_activations import plain_of, truth_of
from kernel_cases import DEVICES, DTYPES

from lora_kernels.kernels import gated
from lora_kernels.kernels.activations import ACTIVATIONS

SHAPES = [(1, 1), (3, 127), (17, 1024), (2, 1030)]


def operands(shape, dtype, device, strided):
    """dh, gate and up; the latter two as column slices of one buffer, dh's rows with a gap."""
    rows, width = shape
    if not strided:
        return [torch.randn(shape).to(device, dtype) for _ in range(3)]
    buffer = torch.randn(rows, 2 * width).to(device, dtype)
    dh = torch.randn(rows, width + 5).to(device, dtype)
    return dh[:, :width], buffer[:, :width], buffer[:, width:]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("strided", [False, True])
def test_forward_and_backward(shape, activation, dtype, device, strided, poisoned):
    dh, gate, up = operands(shape, dtype, device, strided)
    plain, truth = (of(activation, dh, gate, up) for of in (plain_of, truth_of))
    before = gate.clone(), up.clone(), dh.clone()
    h = gated.gate_forward(gate, up, activation)
    assert h.is_contiguous()
    assert_close(h, plain[0], truth[0], "h")
    again, dgate, dup = gated.gate_backward(dh, gate, up, activation, True)
    assert torch.equal(again, h) and dgate.data_ptr() == dh.data_ptr()
    assert_close(dgate, plain[1], truth[1], "dgate")
    assert_close(dup, plain[2], truth[2], "dup")
    assert torch.equal(gate, before[0]) and torch.equal(up, before[1])
    without, *others = gated.gate_backward(before[2], gate, up, activation, False)
    assert without is None and all(map(torch.equal, others, (dgate, dup)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_far_from_zero(activation, device):
    """Where exponentials overflow and shares are 0 or 1."""
    gate = torch.tensor([[-1e4, -200.0, -30.0, 0.0, 30.0, 200.0, 1e4]], device=device)
    up, dh = torch.full_like(gate, 0.5), torch.full_like(gate, 3.0)
    h, dgate, dup = gated.gate_backward(dh, gate, up, activation, True)
    positive = gate.clamp(min=0)
    middle = torch.where(gate == 0, 0.5, (gate > 0).float())
    for found, wanted in ((h, positive * 0.5), (dgate, 1.5 * middle), (dup, 3 * positive)):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.interpreted
def test_offsets_beyond_31_bits():
    wide = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    values, up = torch.randn(3, 64).half(), torch.randn(3, 64).half()
    wide.copy_(values)
    for first, second in ((wide, up), (up, wide)):
        plain = [values if t is wide else t for t in (first, second)]
        ours = gated.gate_forward(first, second, "silu")
        assert torch.equal(ours, gated.gate_forward(*plain, "silu"))
        dh = torch.randn(3, 64).half()
        ours = gated.gate_backward(dh.clone(), first, second, "silu", True)
        for found, wanted in zip(ours, gated.gate_backward(dh, *plain, "silu", True), strict=True):
            assert torch.equal(found, wanted)
