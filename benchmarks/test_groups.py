"""Projections that share their input, together and one by one: q, k and v; gate and up."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.contenders import SCALE, Unavailable, peft
from benchmarks.gate import GateError, compare
from benchmarks.measure import Call
from benchmarks.rivals import GroupAddmmFunction, three_calls
from benchmarks.shapes import DTYPES, slow_in_bfloat16
from benchmarks.stage import Outcome, Stage, measure_together, replayed_seconds, seconds_for
from lora_kernels import accelerate_peft, apply_lora

FLOOR = "frozen"
CONTENDERS = (
    FLOOR,
    "three calls",
    "one Function",
    "peft",
    "peft, accelerated",
    "ours, one by one",
    "ours, together",
)
SECONDS = 2.0
FULL_SECONDS = 6.0
SETS = 3  # of inputs


class GroupProblem(NamedTuple):
    """Linears ``k → n`` for each n of ``widths`` on one ``x [m, k]``."""

    model: str
    members: str
    m: int
    k: int
    widths: tuple[int, ...]
    rank: int = 16
    dtype: str = "float32"
    dropout: float = 0.0

    def __str__(self) -> str:
        members = self.members.replace(", ", "")
        return f"{self.model}-{members}-m{self.m}-r{self.rank}-{self.dtype}-p{self.dropout:g}"


GROUPS = (
    ("minimind", "q, k, v", 512, (512, 128, 128)),
    ("minimind", "gate, up", 512, (1408, 1408)),
    ("minimind 104M", "q, k, v", 768, (768, 192, 192)),
    ("minimind 104M", "gate, up", 768, (2048, 2048)),
    ("llama-3-8b", "q, k, v", 4096, (4096, 1024, 1024)),
    ("llama-3-8b", "gate, up", 4096, (14336, 14336)),
    ("qwen2.5-7b", "q, k, v", 3584, (3584, 512, 512)),
    ("qwen2.5-7b", "gate, up", 3584, (18944, 18944)),
)


def problems(device: str, full: bool) -> list[GroupProblem]:
    """The groups to measure on a kind of device."""
    on_gpu = device == "cuda"
    found = []
    for model, members, k, widths in GROUPS:
        if model.startswith("minimind") == on_gpu and not full:
            continue
        if not on_gpu and not model.startswith("minimind"):
            continue
        for dtype in ("bfloat16",) if on_gpu else ("float32", "bfloat16"):
            slow = not on_gpu and dtype == "bfloat16" and slow_in_bfloat16()
            tokens = (8192,) if on_gpu else (16,) if slow and not full else (1024, 4096)
            for m in tokens if full or on_gpu or slow else tokens[:1]:
                for p in (0.0, 0.1):
                    found.append(GroupProblem(model, members, m, k, widths, 16, dtype, p))
    return found


class Projections(nn.Module):
    """The linears, called with one tensor."""

    def __init__(self, problem: GroupProblem, device: torch.device) -> None:
        super().__init__()
        dtype = DTYPES[problem.dtype]
        self.linears = nn.ModuleList(
            nn.Linear(problem.k, n, bias=False, device=device, dtype=dtype) for n in problem.widths
        )
        self.names = [f"linears.{i}" for i in range(len(problem.widths))]

    def forward(self, x: Tensor) -> list[Tensor]:
        """``x [M, K]`` to the ys."""
        return [linear(x) for linear in self.linears]


class Inputs(NamedTuple):
    """One set of buffers; the tensors of the members in their order."""

    x: Tensor
    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    dys: list[Tensor]


def make_inputs(problem: GroupProblem, device: torch.device, seed: int) -> Inputs:
    """Random normal tensors of such sizes that ys and dx are near 1."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, device=device, generator=generator).mul_(std)
        return drawn.to(DTYPES[problem.dtype])

    m, k, rank, widths = problem.m, problem.k, problem.rank, problem.widths
    return Inputs(
        normal(m, k).requires_grad_(),
        [normal(n, k, std=k**-0.5) for n in widths],
        [normal(rank, k, std=k**-0.5).requires_grad_() for _ in widths],
        [normal(n, rank, std=rank**-0.5).requires_grad_() for n in widths],
        [normal(m, n) for n in widths],
    )


class GroupCall(Call):
    """Forward and backward of one contender, over a ring of x and dy."""

    def __init__(self, name: str, problem: GroupProblem, ring: list[Inputs]) -> None:
        self.name, self.problem, self.ring, self.position = name, problem, ring, 0
        first = ring[0]
        self.module: nn.Module | None = None
        self.factors = [*first.lora_as, *first.lora_bs]
        if name == FLOOR:
            self.factors = []
        elif name.startswith(("peft", "ours")):
            self.module, pairs = self._module(name, first)
            self.factors = [a for a, _ in pairs] + [b for _, b in pairs]
        elif problem.dropout and name == "one Function":
            raise Unavailable("this kind of layer takes no dropout")

    def _module(self, name: str, given: Inputs) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        problem = self.problem
        module = Projections(problem, given.x.device)
        module.requires_grad_(False)
        layers: list[nn.Module]
        if name.startswith("peft"):
            if peft is None:
                raise Unavailable("peft is not installed; pip install peft")
            config = peft.LoraConfig(
                r=problem.rank,
                lora_alpha=int(SCALE * problem.rank),
                lora_dropout=problem.dropout,
                target_modules=module.names,
            )
            model = peft.get_peft_model(module, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
            if "accelerated" in name:
                accelerate_peft(model, group=True)
            layers = list(module.linears)
            pairs = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers]  # type: ignore[union-attr, index]
            bases = [layer.base_layer.weight for layer in layers]  # type: ignore[union-attr]
        else:
            apply_lora(
                module,
                problem.rank,
                alpha=SCALE * problem.rank,
                dropout=problem.dropout,
                target_modules=module.names,
                lora_dtype=DTYPES[problem.dtype],
                group=name.endswith("together"),
                verbose=False,
            )
            layers = list(module.linears)
            pairs = [(layer.lora.A.weight, layer.lora.B.weight) for layer in layers]  # type: ignore[union-attr]
            bases = [layer.weight for layer in layers]
        with torch.no_grad():
            for base, pair, *values in zip(
                bases, pairs, given.weights, given.lora_as, given.lora_bs, strict=True
            ):
                for target, value in zip((base, *pair), values, strict=True):
                    target.copy_(value)
        return module.train(), pairs

    def prepare(self) -> None:
        self.inputs = self.ring[self.position % len(self.ring)]
        self.position += 1

    def ys(self) -> list[Tensor]:
        """Forward, with a graph behind it."""
        x, first = self.inputs.x, self.ring[0]
        if self.module is not None:
            return self.module(x)
        if self.name == FLOOR:
            return [F.linear(x, weight) for weight in first.weights]
        if self.name == "one Function":
            return list(
                GroupAddmmFunction.apply(x, SCALE, *first.weights, *first.lora_as, *first.lora_bs)
            )
        members = zip(first.weights, first.lora_as, first.lora_bs, strict=True)
        return [three_calls(x, *member, SCALE, self.problem.dropout) for member in members]

    def run(self) -> tuple[list[Tensor], tuple[Tensor, ...]]:
        ys = self.ys()
        return ys, torch.autograd.grad(ys, [self.inputs.x, *self.factors], self.inputs.dys)


def check(call: GroupCall) -> None:
    """Outputs and gradients against the three calls in float64, before dropout comes in.

    What dropout does to them is for the tests: each contender draws its masks in its own way.
    """
    if not call.factors:
        return
    undropped = GroupCall(call.name, call.problem._replace(dropout=0.0), call.ring)
    undropped.prepare()
    given = undropped.ring[0]
    results = []
    for dtype in (given.x.dtype, torch.float64):
        members = [
            [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in kind]
            for kind in (given.weights, given.lora_as, given.lora_bs)
        ]
        x = given.x.detach().to(dtype).requires_grad_()
        ys = [three_calls(x, *member, SCALE, 0.0) for member in zip(*members, strict=True)]
        grads = torch.autograd.grad(
            ys, [x, *members[1], *members[2]], [dy.to(dtype) for dy in given.dys]
        )
        results.append([*ys, *grads])
    plain, truth = results
    ys, grads = undropped.run()
    together = call.name in ("peft, accelerated", "ours, together")
    if together != (len({y.grad_fn for y in ys}) == 1) and call.name != "one Function":
        raise GateError(f"{call.name}: the linears are not computed as the name says")
    if len(ys) + len(grads) != len(truth):
        raise GateError(f"{call.name}: {len(ys) + len(grads)} values instead of {len(truth)}")
    for i, (got, one, other) in enumerate(zip([*ys, *grads], plain, truth, strict=True)):
        compare(f"{call.name}: value {i}", got.detach(), [one.detach()], other.detach())


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    cases = [
        pytest.param(problem, contender, id=f"{problem}-{contender}")
        for problem in problems(machine.best_device().type, full)
        for contender in CONTENDERS
    ]
    metafunc.parametrize(("problem", "contender"), cases)


@pytest.mark.benchmark(timer=replayed_seconds)
def test_groups(
    problem: GroupProblem,
    contender: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    benchmark: object,
) -> None:
    info = problem._asdict() | {"base": FLOOR, "base_is_rival": False}
    info["section"] = f"{problem.dtype}, linears that share their input, forward and backward"
    info["label"] = (
        f"{problem.model} {problem.members}, M {problem.m}, r {problem.rank}, p {problem.dropout:g}"
    )
    seconds = seconds_for(request.config, SECONDS, FULL_SECONDS)

    def measure_problem(problem: GroupProblem, names: list[str]) -> dict[str, Outcome]:
        return measure_groups(problem, names, seconds)

    stage.row(request, benchmark, measure_problem, info)


def measure_groups(problem: GroupProblem, names: list[str], seconds: float) -> dict[str, Outcome]:
    """Check and time the contenders on one group."""
    device = machine.best_device()
    ring = [make_inputs(problem, device, seed) for seed in range(SETS)]

    def proven(name: str) -> GroupCall:
        call = GroupCall(name, problem, ring)
        check(call)
        return call

    return measure_together(names, proven, device, seconds)
