"""Fused experts with LoRA on both projections: against PEFT, a loop of linears, and frozen."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.contenders import SCALE, Unavailable, peft
from benchmarks.gate import compare
from benchmarks.measure import Call
from benchmarks.shapes import DTYPES
from benchmarks.stage import Outcome, Stage, measure_together, replayed_seconds, seconds_for
from lora_kernels import LoRALinear, apply_lora

FLOOR = "frozen"
CONTENDERS = (FLOOR, "a loop of LoRALinears", "peft", "ours")
PARAMETERS = ["gate_up_proj", "down_proj"]
SECONDS = 8.0
FULL_SECONDS = 20.0


class ExpertsProblem(NamedTuple):
    """``experts`` of ``hidden → inner → hidden``, of which each of ``m`` tokens visits ``top``.

    ``skew`` is the exponent of a power law by which experts are chosen, 0 for all alike.
    """

    model: str
    experts: int
    top: int
    hidden: int
    inner: int
    m: int
    skew: float = 0.0
    rank: int = 16
    dtype: str = "float32"

    def __str__(self) -> str:
        return f"{self.model}-e{self.experts}-top{self.top}-m{self.m}-s{self.skew:g}-{self.dtype}"


def problems(device: str, full: bool) -> list[ExpertsProblem]:
    """The mixtures to measure on a kind of device; on a CPU at an eighth of the widths."""
    if device == "cuda":
        qwen, mixtral = (128, 8, 2048, 768), (8, 2, 4096, 14336)
        found = [("qwen3-30b", *qwen, 4096, skew) for skew in (0.0, 1.0)]
        found += [("mixtral", *mixtral, 4096, 0.0)]
        return [ExpertsProblem(*case, dtype="bfloat16") for case in found]
    small = [("qwen3-30b/8", 32, 4, 256, 96, m, skew) for m in (256, 1024) for skew in (0.0, 1.0)]
    if full:
        small += [
            ("qwen3-30b/8", 128, 8, 256, 96, 1024, 1.0),
            ("mixtral/8", 8, 2, 512, 1792, 512, 0.0),
        ]
    return [ExpertsProblem(*case) for case in (small if full else small[:2])]


class Inputs(NamedTuple):
    """What all contenders get; the factors as `lora_grouped_linear` has them."""

    x: Tensor
    chosen: Tensor
    weights: Tensor
    dy: Tensor
    bases: list[Tensor]
    factors: list[Tensor]


def make_inputs(problem: ExpertsProblem, device: torch.device) -> Inputs:
    """Random normal tensors, and experts chosen by the power law."""
    generator = torch.Generator(device="cpu").manual_seed(0)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * std).to(device, DTYPES[problem.dtype])

    e, h, i, r = problem.experts, problem.hidden, problem.inner, problem.rank
    likely = torch.arange(1, e + 1).double().pow(-problem.skew).expand(problem.m, e)
    chosen = torch.multinomial(likely, problem.top, generator=generator)
    weights = torch.rand(problem.m, problem.top, generator=generator) / problem.top
    factors = [
        normal(e, r, h, std=h**-0.5),
        normal(e, 2 * i, r, std=r**-0.5),
        normal(e, r, i, std=i**-0.5),
        normal(e, h, r, std=r**-0.5),
    ]
    return Inputs(
        normal(problem.m, h).requires_grad_(),
        chosen.to(device),
        weights.to(device, DTYPES[problem.dtype]),
        normal(problem.m, h),
        [normal(e, 2 * i, h, std=h**-0.5), normal(e, h, i, std=i**-0.5)],
        [factor.requires_grad_() for factor in factors],
    )


def by_loop(given: Inputs, products: Any) -> Tensor:
    """The mixture an expert at a time; ``products(expert, which, rows)`` is a projection."""
    y = torch.zeros_like(given.x)
    for expert in range(len(given.bases[0])):
        rows, slots = (given.chosen == expert).nonzero(as_tuple=True)
        if len(rows):
            gate, up = products(expert, 0, given.x[rows]).chunk(2, -1)
            part = products(expert, 1, F.silu(gate) * up) * given.weights[rows, slots, None]
            y = y.index_add(0, rows, part)
    return y


class ExpertsCall(Call):
    """Forward and backward of one contender."""

    def __init__(self, name: str, problem: ExpertsProblem, given: Inputs) -> None:
        self.name, self.given = name, given
        self.factors: list[Tensor] = []
        self.module: Any = None
        if name == "a loop of LoRALinears":
            self._linears(problem)
            return
        self.module = _experts_of_transformers(problem, given)
        if name == "ours":
            dtype = DTYPES[problem.dtype]
            options: dict[str, Any] = {"lora_dtype": dtype, "verbose": False}
            alpha = SCALE * problem.rank
            apply_lora(
                self.module, problem.rank, alpha=alpha, target_parameters=PARAMETERS, **options
            )
            layers = [getattr(self.module.experts, f"lora_of_{p}").lora for p in PARAMETERS]
            self.factors = [f.weight for layer in layers for f in (layer.A, layer.B)]
            with torch.no_grad():
                for own, value in zip(self.factors, given.factors, strict=True):
                    own.copy_(value)
        elif name == "peft":
            self._peft(problem)

    def _linears(self, problem: ExpertsProblem) -> None:
        self.linears: list[list[LoRALinear]] = []
        for which, bases in enumerate(self.given.bases):
            a, b = self.given.factors[2 * which : 2 * which + 2]
            made = []
            for expert, base in enumerate(bases):
                n, k = base.shape
                rank, alpha = problem.rank, SCALE * problem.rank
                with torch.device(base.device):
                    layer = LoRALinear(k, n, False, rank=rank, alpha=alpha, dtype=base.dtype)
                layer.weight = nn.Parameter(base, requires_grad=False)
                for factor, values in ((layer.lora.A, a), (layer.lora.B, b)):
                    factor.weight = nn.Parameter(values[expert].detach().clone())
                made.append(layer)
            self.linears.append(made)
        # By projection and factor, as the others' stand.
        self.per_expert = [
            [getattr(layer.lora, f).weight for layer in made] for made in self.linears for f in "AB"
        ]
        self.factors = [factor for kind in self.per_expert for factor in kind]

    def _peft(self, problem: ExpertsProblem) -> None:
        if peft is None:
            raise Unavailable("peft is not installed; pip install peft")
        config = peft.LoraConfig(
            r=problem.rank,
            lora_alpha=int(SCALE * problem.rank),
            target_modules=[],
            target_parameters=PARAMETERS,
        )
        model = peft.get_peft_model(self.module, config, autocast_adapter_dtype=False)
        outer: Any = self.module.experts
        wrappers = {w.parameter_name: w for w in (outer, outer.base_layer)}
        with torch.no_grad():
            for p, (a, b) in zip(
                PARAMETERS, (self.given.factors[:2], self.given.factors[2:]), strict=True
            ):
                own = (wrappers[p].lora_A["default"].weight, wrappers[p].lora_B["default"].weight)
                own[0].copy_(a.flatten(0, 1))
                own[1].copy_(b.permute(1, 2, 0).flatten(1))
                self.factors += own
        self.module = model.base_model.model

    def prepare(self) -> None:
        """Nothing: one set of inputs is larger than a cache."""

    def run(self) -> tuple[Tensor, ...]:
        given = self.given
        if self.module is None:
            y = by_loop(given, lambda expert, which, rows: self.linears[which][expert](rows))
        else:
            y = self.module.experts(given.x, given.chosen, given.weights)
        wanted = [given.x, *self.factors]
        grads = torch.autograd.grad(y, wanted, given.dy, allow_unused=True, materialize_grads=True)
        return (y.detach(), *grads)

    def values(self) -> list[Tensor]:
        """y, dx and the gradients of the four factors, as `Inputs` has them."""
        y, dx, *grads = self.run()
        if self.name == "peft":
            e = len(self.given.bases[0])
            for i in (0, 2):
                grads[i] = grads[i].view(e, -1, grads[i].shape[1])
                rows = grads[i + 1]
                grads[i + 1] = rows.view(rows.shape[0], -1, e).permute(2, 0, 1)
        elif self.module is None:
            e = len(self.given.bases[0])
            grads = [torch.stack(grads[i : i + e]) for i in range(0, 4 * e, e)]
        return [y, dx, *grads]


def _experts_of_transformers(problem: ExpertsProblem, given: Inputs) -> nn.Module:
    """A module whose ``experts`` are Qwen3-MoE's, with the given weights."""
    transformers: Any = pytest.importorskip("transformers", minversion="5")
    modeling: Any = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = transformers.Qwen3MoeConfig(
        hidden_size=problem.hidden,
        moe_intermediate_size=problem.inner,
        num_experts=problem.experts,
    )
    config._experts_implementation = "grouped_mm"
    module = nn.Module()
    with torch.device("meta"):
        module.experts = modeling.Qwen3MoeExperts(config)
    for name, weight in zip(PARAMETERS, given.bases, strict=True):
        setattr(module.experts, name, nn.Parameter(weight, requires_grad=False))
    return module


def check(call: ExpertsCall) -> None:
    """Output and gradients against ``W + scale·B·A`` of every expert in float64."""
    if not call.factors:
        return
    results = []
    for dtype in (call.given.x.dtype, torch.float64):
        x = call.given.x.detach().to(dtype).requires_grad_()
        factors = [f.detach().to(dtype).requires_grad_() for f in call.given.factors]
        bases = [base.to(dtype) for base in call.given.bases]
        sums = [w + SCALE * (factors[2 * i + 1] @ factors[2 * i]) for i, w in enumerate(bases)]
        given = call.given._replace(x=x, weights=call.given.weights.to(dtype))
        y = by_loop(given, lambda expert, which, rows, s=sums: rows @ s[which][expert].t())
        grads = torch.autograd.grad(y, [x, *factors], call.given.dy.to(dtype))
        results.append([y.detach(), *grads])
    for i, (got, plain, truth) in enumerate(zip(call.values(), *results, strict=True)):
        compare(f"{call.name}: value {i}", got, [plain], truth)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    cases = [
        pytest.param(problem, contender, id=f"{problem}-{contender}")
        for problem in problems(machine.best_device().type, full)
        for contender in CONTENDERS
    ]
    metafunc.parametrize(("problem", "contender"), cases)


@pytest.mark.benchmark(timer=replayed_seconds)
def test_experts(
    problem: ExpertsProblem,
    contender: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    benchmark: object,
) -> None:
    info = problem._asdict() | {"base": FLOOR, "base_is_rival": False}
    info["section"] = f"{problem.dtype}, LoRA on fused experts, forward and backward"
    info["label"] = (
        f"{problem.model}, {problem.experts} experts, top {problem.top}, M {problem.m}, "
        f"skew {problem.skew:g}, r {problem.rank}"
    )
    seconds = seconds_for(request.config, SECONDS, FULL_SECONDS)

    def measure_problem(problem: ExpertsProblem, names: list[str]) -> dict[str, Outcome]:
        return measure_experts(problem, names, seconds)

    stage.row(request, benchmark, measure_problem, info)


def measure_experts(
    problem: ExpertsProblem, names: list[str], seconds: float
) -> dict[str, Outcome]:
    """Check and time the contenders on one mixture."""
    device = machine.best_device()
    given = make_inputs(problem, device)

    def proven(name: str) -> ExpertsCall:
        call = ExpertsCall(name, problem, given)
        check(call)
        return call

    return measure_together(names, proven, device, seconds)
