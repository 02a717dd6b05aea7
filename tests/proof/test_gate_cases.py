"""The kernels of gated activations among what is checked, compiled and packed."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from lora_kernels.kernels import gated
from lora_kernels.kernels.activations import ACTIVATIONS, GATE_KERNELS
from lora_kernels.kernels.launching import recording
from lora_kernels.proof import check, packing
from lora_kernels.proof.cases import DTYPE_NAMES
from lora_kernels.proof.gate_cases import GateCase, gate_cases, gate_sweep_cases

KINDS = {(k, a, d) for k in GATE_KERNELS for a in ACTIVATIONS for d in DTYPE_NAMES.values()}


def kinds(cases):
    return {(c.kernel, c.activation, c.dtype_name) for c in cases if isinstance(c, GateCase)}


def test_every_kernel_and_activation_in_every_dtype(monkeypatch):
    monkeypatch.setattr(check.knobs.runtime, "interpret", True)
    assert kinds(check.plan()[0]) == kinds(gate_sweep_cases()) == KINDS
    assert kinds(packing.pack_cases((9, 0))) == KINDS
    assert {case.need_h for case in gate_cases(check.ON_GPU)} == {True, False}
    assert {case.sliced for case in gate_cases(check.ON_GPU)} == {True, False}
    assert kinds(check.plan(quick=True)[0]) == {kind for kind in KINDS if kind[2] != "fp16"}
    assert {case.name for case in check.plan(only=["gate_forward"])[0]} == {
        f"gate_forward {activation}" for activation in ACTIVATIONS
    }


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "case", gate_cases(check.INTERPRETED), ids=lambda c: f"{c.name} {c.variant}"
)
def test_each_passes(case):
    for output in check.run_case(case):
        assert not output.problem, output


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", GATE_KERNELS)
def test_a_wrong_kernel_does_not(kernel, monkeypatch):
    real = getattr(gated, kernel)
    monkeypatch.setattr(gated, kernel, lambda first, *rest: real(first * 1.02, *rest))
    (case, *_) = [c for c in gate_cases(check.INTERPRETED) if c.kernel == kernel]
    assert any(output.problem for output in check.run_case(case))


@pytest.mark.parametrize("case", gate_sweep_cases()[::7], ids=lambda c: c.name)
def test_one_launch_each(case):
    with recording(132) as launches:
        case.run(case.operands(torch.device("meta")))
    assert [launch.kernel.__name__ for launch in launches] == [f"{case.kernel}_kernel"]
