"""The seven projections of a transformer block, three of which share an input and two another."""

from __future__ import annotations

import copy
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import machine
from benchmarks.contenders import SCALE, Unavailable, check_compiler, peft
from benchmarks.gate import GateError, compare
from benchmarks.measure import Call
from benchmarks.rivals import three_calls
from benchmarks.shapes import DTYPES, slow_in_bfloat16
from benchmarks.stage import Outcome, Stage, measure_together, replayed_seconds, seconds_for
from lora_kernels import apply_lora

NAMES = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
CONTENDERS = (
    "frozen",
    "three calls",
    "three calls, compiled",
    "peft",
    "peft, bf16 adapters",
    "peft, compiled",
    "ours",
    "ours, compiled",
)
SECONDS = 1.5
FULL_SECONDS = 5.0
SETS = 4  # of inputs; the weights of a block exceed most caches by themselves


class BlockProblem(NamedTuple):
    """A block of ``width`` with keys and values of ``kv_width``, on m tokens."""

    model: str
    m: int
    width: int
    kv_width: int
    hidden: int
    rank: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.model}-m{self.m}-r{self.rank}-{self.dtype}"


def problems(device: str, full: bool) -> list[BlockProblem]:
    """The blocks to measure on a kind of device."""
    mini = ("minimind", 512, 128, 1408)
    if device == "cpu":
        tokens = (256, 1024, 4096) if full else (256,)
        few = tokens if full or not slow_in_bfloat16() else (16,)
        return [
            BlockProblem(mini[0], m, *mini[1:], 16, dtype)
            for dtype, counts in (("float32", tokens), ("bfloat16", few))
            for m in counts
        ]
    blocks: tuple[tuple[str, int, int, int], ...] = (("llama-3-8b", 4096, 1024, 14336),)
    if full:
        blocks += (("qwen2.5-7b", 3584, 512, 18944), mini)
    tokens = (512, 4096, 16384) if full else (4096,)
    ranks = (16, 64) if full else (16,)
    return [
        BlockProblem(name, m, *sizes, rank, "bfloat16")
        for name, *sizes in blocks
        for m in tokens
        for rank in ranks
    ]


class Block(nn.Module):
    """The projections with what joins them, attention itself left out."""

    def __init__(self, problem: BlockProblem) -> None:
        super().__init__()
        width, kv_width, hidden = problem.width, problem.kv_width, problem.hidden
        sizes = {"wq": (width, width), "wk": (width, kv_width), "wv": (width, kv_width)}
        sizes |= {"wo": (width, width), "w1": (width, hidden), "w3": (width, hidden)}
        sizes["w2"] = (hidden, width)
        for name, (k, n) in sizes.items():
            setattr(self, name, nn.Linear(k, n, bias=False))
            nn.init.normal_(getattr(self, name).weight, std=k**-0.5)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x [M, width]`` to the residual stream, the keys and the values."""
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        x = x + self.wo(q)
        return x + self.w2(F.silu(self.w1(x)) * self.w3(x)), k, v


class EagerLoRA(nn.Module):
    """A linear with three calls beside it."""

    def __init__(self, linear: nn.Linear, lora_a: Tensor, lora_b: Tensor) -> None:
        super().__init__()
        self.linear = linear
        self.lora_a, self.lora_b = nn.Parameter(lora_a.clone()), nn.Parameter(lora_b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return three_calls(x, self.linear.weight, self.lora_a, self.lora_b, SCALE, 0.0)


class Buffers(NamedTuple):
    """x and the gradients of the three outputs."""

    x: Tensor
    dy: list[Tensor]


class Setting:
    """What all contenders of a problem share: the base, the factors' values, the buffers."""

    def __init__(self, problem: BlockProblem, device: torch.device) -> None:
        self.problem, self.device = problem, device
        self.dtype = DTYPES[problem.dtype]
        torch.manual_seed(0)
        with device:
            self.base = Block(problem).to(self.dtype)
            self.factors: dict[str, tuple[Tensor, Tensor]] = {}
            for name in NAMES:
                n, k = getattr(self.base, name).weight.shape
                a = torch.randn(problem.rank, k).mul_(k**-0.5).to(self.dtype)
                b = torch.randn(n, problem.rank).mul_(0.3 * problem.rank**-0.5).to(self.dtype)
                self.factors[name] = a, b
            self.ring = [self._buffers() for _ in range(SETS)]

    def _buffers(self) -> Buffers:
        m, width, kv_width = self.problem.m, self.problem.width, self.problem.kv_width
        x, *dy = (torch.randn(m, n).to(self.dtype) for n in (width, width, kv_width, kv_width))
        return Buffers(x.requires_grad_(), dy)

    def build(self, name: str) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        """A contender and its factors, in the order of `NAMES`."""
        if name.endswith("compiled"):
            check_compiler(self.device)
        module, factors = self._plain(name.partition(",")[0], bf16="bf16" in name)
        return torch.compile(module, dynamic=False) if "compiled" in name else module, factors

    def _plain(self, name: str, bf16: bool) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        block = copy.deepcopy(self.base)
        if name == "frozen":
            return block, []
        if name == "three calls":
            for target in NAMES:
                linear = getattr(block, target)
                setattr(block, target, EagerLoRA(linear, *self.factors[target]))
            layers = [getattr(block, target) for target in NAMES]
            return block, [(layer.lora_a, layer.lora_b) for layer in layers]
        if name == "peft":
            return self._peft(block, bf16)
        apply_lora(
            block,
            self.problem.rank,
            alpha=SCALE * self.problem.rank,
            target_modules=list(NAMES),
            verbose=False,
        )
        layers = [getattr(block, target).lora for target in NAMES]
        return block, self._filled([(layer.A.weight, layer.B.weight) for layer in layers])

    def _peft(self, block: nn.Module, bf16: bool) -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
        if peft is None:
            raise Unavailable("peft is not installed; pip install peft")
        if bf16 and self.problem.dtype != "bfloat16":
            raise Unavailable("the base is float32, so that these adapters are too")
        config = peft.LoraConfig(
            r=self.problem.rank,
            lora_alpha=int(SCALE * self.problem.rank),
            target_modules=list(NAMES),
        )
        model = peft.get_peft_model(block, config, autocast_adapter_dtype=not bf16)
        layers = [getattr(block, target) for target in NAMES]
        weights = [(x.lora_A["default"].weight, x.lora_B["default"].weight) for x in layers]
        return model.base_model.model, self._filled(weights)

    def _filled(self, factors: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        with torch.no_grad():
            for name, pair in zip(NAMES, factors, strict=True):
                for mine, given in zip(pair, self.factors[name], strict=True):
                    mine.copy_(given)
        return factors


class BlockCall(Call):
    """Forward and backward of a block, over the ring."""

    def __init__(self, setting: Setting, name: str) -> None:
        self.module, factors = setting.build(name)
        self.leaves = [tensor for pair in factors for tensor in pair]
        self.ring, self.position = setting.ring, 0

    def prepare(self) -> None:
        self.buffers = self.ring[self.position % len(self.ring)]
        self.position += 1

    def run(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        y = self.module(self.buffers.x)
        return y, torch.autograd.grad(y, [self.buffers.x, *self.leaves], self.buffers.dy)


class BlockGate:
    """Outputs and gradients against the three calls in float64."""

    def __init__(self, setting: Setting) -> None:
        self.plain = self._values(*setting.build("three calls"), setting.ring[0])
        module, _ = setting.build("three calls")
        module = module.double()
        layers = [getattr(module, name) for name in NAMES]
        buffers = setting.ring[0]
        wide = Buffers(
            buffers.x.detach().double().requires_grad_(), [t.double() for t in buffers.dy]
        )
        factors = [(layer.lora_a, layer.lora_b) for layer in layers]
        self.truth = self._values(module, factors, wide)

    def _values(
        self, module: nn.Module, factors: list[tuple[Tensor, Tensor]], buffers: Buffers
    ) -> list[Tensor]:
        y = module(buffers.x)
        leaves = [buffers.x, *(tensor for pair in factors for tensor in pair)]
        return [t.detach() for t in (*y, *torch.autograd.grad(y, leaves, buffers.dy))]

    def check(self, name: str, call: BlockCall) -> None:
        """Raise GateError where a contender with LoRA is off."""
        if not call.leaves:
            return
        call.prepare()
        y, gradients = call.run()
        given = [*y, *gradients]
        whats = ["y", "k", "v", "dx"] + [f"d{factor} of {w}" for w in NAMES for factor in "ab"]
        if len(given) != len(whats):
            raise GateError(f"{name}: {len(given)} values instead of {len(whats)}")
        for what, got, plain, truth in zip(whats, given, self.plain, self.truth, strict=True):
            compare(f"{name}: {what}", got, [plain], truth)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    cases = [
        pytest.param(problem, contender, id=f"{problem}-{contender}")
        for problem in problems(machine.best_device().type, full)
        for contender in CONTENDERS
        if full or _quick(problem, contender)
    ]
    metafunc.parametrize(("problem", "contender"), cases)


def _quick(problem: BlockProblem, contender: str) -> bool:
    """Whether it belongs to the default few: compiling PEFT's layers takes longest of all."""
    if "compiled" not in contender:
        return True
    few = problem.dtype == "bfloat16" and not contender.startswith("peft")
    return few and (machine.best_device().type == "cuda" or not slow_in_bfloat16())


@pytest.mark.benchmark(timer=replayed_seconds)
def test_block(
    problem: BlockProblem,
    contender: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    benchmark: object,
) -> None:
    info = problem._asdict() | {"base": "frozen", "base_is_rival": False}
    info["section"] = f"{problem.dtype}, seven projections, forward and backward"
    info["label"] = f"{problem.model}, M {problem.m}, r {problem.rank}"
    seconds = seconds_for(request.config, SECONDS, FULL_SECONDS)

    def measure_problem(problem: BlockProblem, names: list[str]) -> dict[str, Outcome]:
        return measure_block(problem, names, seconds)

    stage.row(request, benchmark, measure_problem, info)


def measure_block(problem: BlockProblem, names: list[str], seconds: float) -> dict[str, Outcome]:
    """Check and time the contenders on one block."""
    torch.compiler.reset()
    device = machine.best_device()
    setting = Setting(problem, device)
    gate = BlockGate(setting)

    def proven(name: str) -> BlockCall:
        call = BlockCall(setting, name)
        call.position = 0
        gate.check(name, call)
        return call

    return measure_together(names, proven, device, seconds)
