"""One LoRA linear: forward, backward and both, against every rival."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import machine
from benchmarks.contenders import (
    COMPILED,
    CONTENDERS,
    FLOOR,
    Step,
    Work,
    build,
    make_inputs,
    sets_to_rotate,
)
from benchmarks.gate import Gate
from benchmarks.shapes import Problem, compiled_too, linear_problems
from benchmarks.stage import Outcome, Stage, measure_together, replayed_seconds, seconds_for

SECONDS = 1.2  # for all contenders of a problem
FULL_SECONDS = 5.0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    problems = linear_problems(machine.best_device().type, full)
    cases = [
        pytest.param(problem, contender, id=f"{problem}-{contender}")
        for problem in problems
        for contender in CONTENDERS
        if contender not in COMPILED or compiled_too(problem, full)
    ]
    metafunc.parametrize(("problem", "contender"), cases)


@pytest.mark.benchmark(timer=replayed_seconds)
def test_linear(
    problem: Problem,
    contender: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    benchmark: object,
) -> None:
    seconds = seconds_for(request.config, SECONDS, FULL_SECONDS)

    def measure_problem(problem: Problem, names: list[str]) -> dict[str, Outcome]:
        return measure_linear(problem, names, machine.best_device(), seconds)

    info = problem._asdict() | {"base": FLOOR, "base_is_rival": False}
    info |= {"section": section(problem), "label": label(problem)}
    stage.row(request, benchmark, measure_problem, info)


def section(problem: Problem) -> str:
    """The table that a problem belongs to."""
    direction = {"both": "forward and backward"}.get(problem.direction, problem.direction)
    timing = ", CUDA graphs" if problem.timing == "graph" else ""
    return f"{problem.dtype}, {direction}{timing}"


def label(problem: Problem) -> str:
    """Its row there."""
    return (
        f"{problem.model} {problem.k}→{problem.n}, M {problem.m}, r {problem.rank}, "
        f"p {problem.dropout:g}"
    )


def measure_linear(
    problem: Problem, names: list[str], device: torch.device, seconds: float
) -> dict[str, Outcome]:
    """Check and time the contenders on one problem."""
    torch.compiler.reset()  # or dynamo, asked for ever new shapes, falls back to eager
    gate = Gate(problem, device)
    steps: dict[str, Step] = {}

    def proven(name: str) -> Work:
        steps[name] = build(name, problem, device)
        gate.check(steps[name])
        return Work(steps[name], problem.direction, ring, shared)

    ring = [make_inputs(problem, device, seed) for seed in range(sets_to_rotate(problem, device))]
    shared = [0]
    # Whole turns of the ring, and so many calls that the gap between two replays is little.
    repeats = len(ring) * math.ceil(20 / len(ring)) if problem.timing == "graph" else 0
    outcomes = measure_together(names, proven, device, seconds, graph_repeats=repeats)
    for name, step in steps.items():
        outcomes[name].info |= {"path": step.path} if step.path else {}
    return outcomes
