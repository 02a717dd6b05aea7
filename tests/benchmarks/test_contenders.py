"""Contenders, and the gate that they pass before they are timed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from benchmarks import contenders, rivals
from benchmarks.contenders import COMPILED, CONTENDERS, SCALE, Unavailable, Work, build, make_inputs
from benchmarks.gate import Gate, GateError
from benchmarks.shapes import Problem

CPU = torch.device("cpu")
EAGER = [name for name in CONTENDERS if name not in COMPILED]


def problem(**changes):
    return Problem("minimind", 48, 32, 40, 4, "float32")._replace(**changes)


def absent(name, problem):
    """Why a contender is expected to be missing on a CPU with Triton's interpreter."""
    if name.startswith("peft"):
        pytest.importorskip("peft")
    if name.startswith("ours:"):
        pytest.importorskip("triton")
    if name == "peft, bf16 adapters" and problem.dtype == "float32":
        return "the base is float32"
    if name == "addmm Function" and problem.dropout:
        return "takes no dropout"
    if name == "ours: aten" and problem.dropout:
        return "takes no dropout"
    if name == "ours: hopper":
        return "hopper" if problem.dtype == "float32" else None
    return None


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", EAGER)
def test_every_contender_passes_or_says_why_not(name, dtype, dropout):
    of = problem(dtype=dtype, dropout=dropout)
    reason = absent(name, of)
    try:
        Gate(of, CPU).check(build(name, of, CPU))
    except Unavailable as refusal:
        assert reason is not None and reason in str(refusal), refusal
    else:
        assert reason is None


def test_strategies_are_forced():
    pytest.importorskip("triton")
    of = problem(dtype="float32")
    step = build("ours: hopper", of, CPU)
    with pytest.raises(Unavailable, match="'hopper' was asked for"):
        Gate(of, CPU).check(step)


def without_triton(monkeypatch):
    monkeypatch.setattr("lora_kernels.dispatch.TRITON_INSTALLED", False)


def test_absences_are_named(monkeypatch):
    monkeypatch.setattr(contenders, "peft", None)
    with pytest.raises(Unavailable, match="peft is not installed"):
        build("peft", problem(), CPU)
    without_triton(monkeypatch)
    with pytest.raises(Unavailable, match="x is on cpu"):
        build("ours: fused", problem(), CPU)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unavailable, match="C\\+\\+ compiler"):
        build("three calls, compiled", problem(), CPU)
    with pytest.raises(ValueError, match="contender must be one of frozen, "):
        build("unsloth", problem(), CPU)


def wrong(function, has_lora=True):
    step = contenders._FunctionStep(function, has_lora)
    step.name = "wrong"
    return step


class NoGradientOfB(torch.autograd.Function):
    @staticmethod
    def forward(ctx, b):
        return b.clone()

    @staticmethod
    def backward(ctx, db):
        return 0.9 * db


def two_masks(x, weight, a, b):
    """Backward for x takes another mask than forward did."""
    dropped, other = F.dropout(x.detach(), 0.1), F.dropout(x, 0.1)
    xa = dropped @ a.t() + (other @ a.t() - (other @ a.t()).detach())
    return F.linear(x, weight) + SCALE * xa @ b.t()


@pytest.mark.parametrize(
    ("what", "dropout", "function"),
    [
        ("y", 0.0, lambda x, w, a, b: rivals.three_calls(x, w, a, b, 1.01 * SCALE, 0.0)),
        (
            "db",
            0.0,
            lambda x, w, a, b: F.linear(x, w) + SCALE * x @ a.t() @ NoGradientOfB.apply(b).t(),
        ),
        ("y", 0.0, lambda x, w, a, b: rivals.three_calls(x, w, a, b, SCALE, 0.0) * float("nan")),
        ("keeps 1.0", 0.1, lambda x, w, a, b: rivals.three_calls(x, w, a, b, SCALE, 0.0)),
        ("keeps 0.8", 0.1, lambda x, w, a, b: rivals.three_calls(x, w, a, b, SCALE, 0.2)),
        ("y", 0.1, two_masks),
        (
            "y",
            0.1,
            lambda x, w, a, b: F.linear(x, w) + 0.9 * SCALE * F.dropout(x, 0.1) @ a.t() @ b.t(),
        ),
    ],
)
def test_the_gate_stops_what_is_wrong(what, dropout, function):
    with pytest.raises(GateError, match=f"wrong: {what}"):
        Gate(problem(m=200, dropout=dropout), CPU).check(wrong(function))


def test_the_gate_stops_a_wrong_floor():
    with pytest.raises(GateError, match="wrong: y"):
        Gate(problem(), CPU).check(wrong(lambda x, w, a, b: 1.001 * F.linear(x, w), False))


def test_contenders_take_the_next_buffers_in_turn():
    of = problem(m=3)
    ring = [make_inputs(of, CPU, seed) for seed in range(3)]
    assert not torch.equal(ring[0].x, ring[1].x)
    shared = [0]
    works = [Work(build(name, of, CPU), "both", ring, shared) for name in ("three calls", "ours")]
    for turn in range(6):
        work, inputs = works[turn % 2], ring[turn % 3]
        work.prepare()
        y, _ = work.run()
        expected = rivals.three_calls(
            inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b, SCALE, 0.0
        )
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
def test_directions(direction):
    of = problem()
    inputs = make_inputs(of, CPU)
    work = Work(build("ours", of, CPU), direction, [inputs])
    work.prepare()
    result = work.run()
    if direction == "forward":
        assert result.shape == (48, 40) and result.requires_grad
    else:
        gradients = result if direction == "backward" else result[1]
        assert [t.shape for t in gradients] == [(48, 32), (4, 32), (40, 4)]
