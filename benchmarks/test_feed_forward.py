"""A whole gated feed-forward: time and peak memory of its forward and backward."""

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
from benchmarks.rivals import three_calls
from benchmarks.shapes import DTYPES, slow_in_bfloat16
from benchmarks.stage import Outcome, Stage, measure_together, replayed_seconds, seconds_for
from lora_kernels import accelerate_peft, apply_lora

FLOOR = "frozen"
CONTENDERS = (
    FLOOR,
    "three calls",
    "peft",
    "peft, accelerated and whole",
    "ours, one by one",
    "ours, whole",
)
NAMES = ("gate_proj", "up_proj", "down_proj")
SECONDS = 3.0
FULL_SECONDS = 10.0
SETS = 3  # of inputs
SIZES = {
    "minimind": (512, 1408),
    "minimind 104M": (768, 2048),
    "llama-3-8b": (4096, 14336),
    "qwen2.5-7b": (3584, 18944),
}


class FeedForwardProblem(NamedTuple):
    """``[m, k]`` by way of ``[m, hidden]`` to ``[m, k]``."""

    model: str
    m: int
    k: int
    hidden: int
    rank: int = 16
    dtype: str = "float32"
    dropout: float = 0.0

    def __str__(self) -> str:
        return f"{self.model}-m{self.m}-r{self.rank}-{self.dtype}-p{self.dropout:g}"


def problems(device: str, full: bool) -> list[FeedForwardProblem]:
    """The feed-forwards to measure on a kind of device."""
    on_gpu = device == "cuda"
    found = []
    for model, (k, hidden) in SIZES.items():
        if model.startswith("minimind") == on_gpu:
            continue
        for dtype in ("bfloat16",) if on_gpu else ("float32", "bfloat16"):
            slow = not on_gpu and dtype == "bfloat16" and slow_in_bfloat16()
            tokens = (8192,) if on_gpu else (16,) if slow and not full else (4096, 512)
            for m in tokens if full else tokens[:1]:
                for p in (0.0, 0.1):
                    found.append(FeedForwardProblem(model, m, k, hidden, 16, dtype, p))
    return found


class FeedForward(nn.Module):
    """As transformers has it."""

    def __init__(self, problem: FeedForwardProblem, device: torch.device) -> None:
        super().__init__()
        k, hidden, options = problem.k, problem.hidden, {"device": device, "bias": False}
        self.gate_proj = nn.Linear(k, hidden, dtype=DTYPES[problem.dtype], **options)
        self.up_proj = nn.Linear(k, hidden, dtype=DTYPES[problem.dtype], **options)
        self.down_proj = nn.Linear(hidden, k, dtype=DTYPES[problem.dtype], **options)
        self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        """``x [M, K]`` to ``y [M, K]``."""
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Inputs(NamedTuple):
    """One set of buffers; the projections' tensors in the order of `NAMES`."""

    x: Tensor
    weights: list[Tensor]
    lora_as: list[Tensor]
    lora_bs: list[Tensor]
    dy: Tensor


def make_inputs(problem: FeedForwardProblem, device: torch.device, seed: int) -> Inputs:
    """Random normal tensors of such sizes that what is computed is near 1."""
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, device=device, generator=generator).mul_(std)
        return drawn.to(DTYPES[problem.dtype])

    m, k, hidden, rank = problem.m, problem.k, problem.hidden, problem.rank
    sizes = ((hidden, k), (hidden, k), (k, hidden))
    return Inputs(
        normal(m, k).requires_grad_(),
        [normal(*size, std=size[1] ** -0.5) for size in sizes],
        [normal(rank, into, std=into**-0.5).requires_grad_() for _, into in sizes],
        [normal(out, rank, std=0.3 * rank**-0.5).requires_grad_() for out, _ in sizes],
        normal(m, k),
    )


def by_calls(
    x: Tensor, weights: list[Tensor], lora_as: list[Tensor], lora_bs: list[Tensor], p: float
) -> Tensor:
    """Three calls for each projection."""
    gate, up = (three_calls(x, weights[i], lora_as[i], lora_bs[i], SCALE, p) for i in (0, 1))
    return three_calls(F.silu(gate) * up, weights[2], lora_as[2], lora_bs[2], SCALE, p)


class FeedForwardCall(Call):
    """Forward and backward of one contender, over a ring of x and dy."""

    def __init__(self, name: str, problem: FeedForwardProblem, ring: list[Inputs]) -> None:
        self.name, self.problem, self.ring, self.position = name, problem, ring, 0
        first = ring[0]
        self.module: nn.Module | None = None
        self.factors = [] if name == FLOOR else [*first.lora_as, *first.lora_bs]
        if name.startswith(("peft", "ours")):
            self.module, pairs = self._module(name, first)
            self.factors = [a for a, _ in pairs] + [b for _, b in pairs]

    def _module(self, name: str, given: Inputs) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        problem = self.problem
        module = FeedForward(problem, given.x.device)
        module.requires_grad_(False)
        if name.startswith("peft"):
            if peft is None:
                raise Unavailable("peft is not installed; pip install peft")
            config = peft.LoraConfig(
                r=problem.rank,
                lora_alpha=int(SCALE * problem.rank),
                lora_dropout=problem.dropout,
                target_modules=list(NAMES),
            )
            model = peft.get_peft_model(module, config, autocast_adapter_dtype=False)  # type: ignore[arg-type]
            if "accelerated" in name:
                accelerate_peft(model, group=True)
        else:
            apply_lora(
                module,
                problem.rank,
                alpha=SCALE * problem.rank,
                dropout=problem.dropout,
                target_modules=list(NAMES),
                lora_dtype=DTYPES[problem.dtype],
                group=name.endswith("whole"),
                verbose=False,
            )
        layers = [getattr(module, target) for target in NAMES]
        if name.startswith("peft"):
            pairs = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers]
            bases = [layer.base_layer.weight for layer in layers]
        else:
            pairs = [(layer.lora.A.weight, layer.lora.B.weight) for layer in layers]
            bases = [layer.weight for layer in layers]
        with torch.no_grad():
            for base, pair, *values in zip(
                bases, pairs, given.weights, given.lora_as, given.lora_bs, strict=True
            ):
                for target, value in zip((base, *pair), values, strict=True):
                    target.copy_(value)
        if name.endswith("whole") and type(module) is FeedForward:
            raise RuntimeError("the feed-forward was not found")
        return module.train(), pairs

    def prepare(self) -> None:
        self.inputs = self.ring[self.position % len(self.ring)]
        self.position += 1

    def y(self) -> Tensor:
        """Forward, with a graph behind it."""
        x, first = self.inputs.x, self.ring[0]
        if self.module is not None:
            return self.module(x)
        if self.name == FLOOR:
            gate, up, down = first.weights
            return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)
        return by_calls(x, first.weights, first.lora_as, first.lora_bs, self.problem.dropout)

    def run(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        y = self.y()
        return y, torch.autograd.grad(y, [self.inputs.x, *self.factors], self.inputs.dy)


def check(call: FeedForwardCall) -> None:
    """Output and gradients against the three calls in float64, before dropout comes in.

    What dropout does to them is for the tests: each contender draws its masks in its own way.
    """
    if not call.factors:
        return
    undropped = FeedForwardCall(call.name, call.problem._replace(dropout=0.0), call.ring)
    undropped.prepare()
    given = undropped.ring[0]
    results = []
    for dtype in (given.x.dtype, torch.float64):
        weights, lora_as, lora_bs = (
            [t.detach().to(dtype).requires_grad_(t.requires_grad) for t in kind]
            for kind in (given.weights, given.lora_as, given.lora_bs)
        )
        x = given.x.detach().to(dtype).requires_grad_()
        y = by_calls(x, weights, lora_as, lora_bs, 0.0)
        results.append([y, *torch.autograd.grad(y, [x, *lora_as, *lora_bs], given.dy.to(dtype))])
    plain, truth = results
    y, grads = undropped.run()
    if 1 + len(grads) != len(truth):
        raise GateError(f"{call.name}: {1 + len(grads)} values instead of {len(truth)}")
    for i, (got, one, other) in enumerate(zip([y, *grads], plain, truth, strict=True)):
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
def test_feed_forward(
    problem: FeedForwardProblem,
    contender: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    benchmark: object,
) -> None:
    info = problem._asdict() | {"base": FLOOR, "base_is_rival": False}
    info["section"] = f"{problem.dtype}, a gated feed-forward, forward and backward"
    info["label"] = f"{problem.model}, M {problem.m}, r {problem.rank}, p {problem.dropout:g}"
    seconds = seconds_for(request.config, SECONDS, FULL_SECONDS)

    def measure_problem(problem: FeedForwardProblem, names: list[str]) -> dict[str, Outcome]:
        return measure_feed_forward(problem, names, seconds)

    stage.row(request, benchmark, measure_problem, info)


def measure_feed_forward(
    problem: FeedForwardProblem, names: list[str], seconds: float
) -> dict[str, Outcome]:
    """Check and time the contenders on one feed-forward."""
    device = machine.best_device()
    ring = [make_inputs(problem, device, seed) for seed in range(SETS)]

    def proven(name: str) -> FeedForwardCall:
        call = FeedForwardCall(name, problem, ring)
        check(call)
        return call

    return measure_together(names, proven, device, seconds)
