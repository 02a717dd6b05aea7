"""Every contender under one signature: ``build(name, problem, device) -> Step``."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora_kernels import LoRALinear, explain, use_backend, use_strategy
from lora_kernels.kernels import STRATEGIES as BY_ROLE
from lora_kernels.kernels import Shape
from lora_kernels.kernels import strategy as strategy_for

from . import rivals
from .machine import cache_bytes, version
from .shapes import DTYPES, Problem

try:
    import peft
except ImportError:
    peft = None  # type: ignore[assignment]

SCALE = 2.0
MOST_SETS = 256
FLOOR = "frozen"
OURS = "ours"
STRATEGIES = tuple(dict.fromkeys(name for names in BY_ROLE.values() for name in names))

COMPILED = ("three calls, compiled", "peft, compiled")
CONTENDERS = (
    FLOOR,
    "three calls",
    "three calls, addmm",
    "three calls, compiled",
    "peft",
    "peft, bf16 adapters",
    "peft, compiled",
    "addmm Function",
    "beta=1",
    OURS,
    *(f"ours: {strategy}" for strategy in STRATEGIES),
)


class Unavailable(Exception):
    """This contender cannot take part here; the message says why."""


class Inputs(NamedTuple):
    """One set of buffers. x, the factors and their wide copies require grad.

    Attributes:
        x, weight, lora_a, lora_b, dy: in the problem's dtype, shapes as in `Problem`.
        wide_a, wide_b: the same values in float32, for contenders that keep the factors wide.
    """

    x: Tensor
    weight: Tensor
    lora_a: Tensor
    lora_b: Tensor
    wide_a: Tensor
    wide_b: Tensor
    dy: Tensor


def make_inputs(problem: Problem, device: torch.device, seed: int = 0) -> Inputs:
    """Random normal tensors, fresh for each seed, of such sizes that y and dx are near 1."""
    generator = torch.Generator(device=device).manual_seed(seed)
    dtype = DTYPES[problem.dtype]

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, device=device, generator=generator)
        return drawn.mul_(std).to(dtype)

    m, k, n, rank = problem.m, problem.k, problem.n, problem.rank
    lora_a, lora_b = normal(rank, k, std=k**-0.5), normal(n, rank, std=rank**-0.5)
    return Inputs(
        x=normal(m, k).requires_grad_(),
        weight=normal(n, k, std=k**-0.5),
        lora_a=lora_a.requires_grad_(),
        lora_b=lora_b.requires_grad_(),
        wide_a=lora_a.detach().float().requires_grad_(),
        wide_b=lora_b.detach().float().requires_grad_(),
        dy=normal(m, n),
    )


def sets_to_rotate(problem: Problem, device: torch.device) -> int:
    """How many sets of buffers, at least two, exceed the cache twice over."""
    m, k, n = problem.m, problem.k, problem.n
    size = DTYPES[problem.dtype].itemsize * (m * k + n * k + m * n)
    return min(max(2, math.ceil(2 * cache_bytes(device) / size)), MOST_SETS)


class Step:
    """One contender, ready to run on any set of buffers.

    Attributes:
        name: of the contender.
        has_lora: false for the frozen linear, which has no factors to differentiate.
        path: of ours, which implementation serves the problem, and by which strategies.
    """

    name: str
    has_lora = True
    path = ""

    def bind(self, inputs: Inputs) -> None:
        """Take up a set of buffers; not part of the work."""
        raise NotImplementedError

    def forward(self) -> Tensor:
        """``y [M, N]`` with a graph behind it."""
        raise NotImplementedError

    def leaves(self) -> list[Tensor]:
        """x and, unless frozen, the factors that forward took."""
        raise NotImplementedError

    def chosen(self) -> contextlib.AbstractContextManager[Any]:
        """To be entered around forward and backward."""
        return contextlib.nullcontext()


class _FunctionStep(Step):
    """A function of ``(x, weight, lora_a, lora_b)``."""

    def __init__(self, function: Callable[..., Tensor], has_lora: bool = True) -> None:
        self.function, self.has_lora = function, has_lora

    def bind(self, inputs: Inputs) -> None:
        self.arguments = inputs.x, inputs.weight, inputs.lora_a, inputs.lora_b

    def forward(self) -> Tensor:
        return self.function(*self.arguments)

    def leaves(self) -> list[Tensor]:
        x, _, lora_a, lora_b = self.arguments
        return [x, lora_a, lora_b] if self.has_lora else [x]


class _ModuleStep(Step):
    """A module that holds the weight and the factors as parameters."""

    def __init__(
        self,
        module: nn.Module,
        weight: nn.Parameter,
        lora_a: nn.Parameter,
        lora_b: nn.Parameter,
        chosen: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    ) -> None:
        self.module, self.weight, self.chosen = module, weight, chosen  # type: ignore[method-assign]
        self.factors = lora_a, lora_b
        self.wide = lora_a.dtype != weight.dtype
        weight.requires_grad_(False)

    def bind(self, inputs: Inputs) -> None:
        lora_a, lora_b = self.factors
        self.x, self.weight.data = inputs.x, inputs.weight
        lora_a.data = (inputs.wide_a if self.wide else inputs.lora_a).detach()
        lora_b.data = (inputs.wide_b if self.wide else inputs.lora_b).detach()

    def forward(self) -> Tensor:
        return self.module(self.x)

    def leaves(self) -> list[Tensor]:
        return [self.x, *self.factors]


def build(name: str, problem: Problem, device: torch.device) -> Step:
    """The contender called ``name`` for a problem.

    Raises:
        Unavailable: it is not installed or cannot serve this problem on this device.
        ValueError: no such contender.
    """
    if name not in CONTENDERS:
        raise ValueError(f"contender must be one of {', '.join(CONTENDERS)}; got {name!r}")
    if name in COMPILED:
        check_compiler(device)
    step = _build(name, problem, device)
    step.name = name
    return step


def _build(name: str, problem: Problem, device: torch.device) -> Step:
    p = problem.dropout
    if name == FLOOR:
        return _FunctionStep(lambda x, weight, a, b: F.linear(x, weight), has_lora=False)
    if name == "three calls":
        return _FunctionStep(lambda *tensors: rivals.three_calls(*tensors, SCALE, p))
    if name == "three calls, addmm":
        return _FunctionStep(lambda *tensors: rivals.three_calls_addmm(*tensors, SCALE, p))
    if name == "three calls, compiled":
        compiled = torch.compile(rivals.three_calls, dynamic=False)
        return _FunctionStep(lambda *tensors: compiled(*tensors, SCALE, p))
    if name == "addmm Function":
        if p:
            raise Unavailable("this kind of layer takes no dropout")
        return _FunctionStep(lambda *tensors: rivals.AddmmFunction.apply(*tensors, SCALE))
    if name == "beta=1":
        return _FunctionStep(lambda *tensors: rivals.Beta1Function.apply(*tensors, SCALE, p))
    if name.startswith("peft"):
        return _peft(problem, device, wide="bf16" not in name, compiled=name in COMPILED)
    return _ours(name, problem, device)


def check_compiler(device: torch.device) -> None:
    """Raise Unavailable where torch.compile lacks what it needs."""
    if device.type == "cpu":
        names = (os.environ.get("CXX", "c++"), "g++", "clang++")
        if not any(shutil.which(name) for name in names):
            raise Unavailable("torch.compile needs a C++ compiler on a CPU and found none")
    elif version("triton") is None:
        raise Unavailable("torch.compile needs Triton on a GPU and it is not installed")


class _Holder(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear


def _linear(problem: Problem, device: torch.device) -> nn.Linear:
    return nn.Linear(problem.k, problem.n, bias=False, device=device, dtype=DTYPES[problem.dtype])


def _peft(problem: Problem, device: torch.device, wide: bool, compiled: bool) -> Step:
    if peft is None:
        raise Unavailable("peft is not installed; pip install peft")
    if not wide and problem.dtype != "bfloat16":
        raise Unavailable("the base is float32, so that these adapters are too")
    config = peft.LoraConfig(
        r=problem.rank,
        lora_alpha=int(SCALE * problem.rank),
        lora_dropout=problem.dropout,
        target_modules=["linear"],
    )
    model = peft.get_peft_model(
        _Holder(_linear(problem, device)),  # type: ignore[arg-type]
        config,
        autocast_adapter_dtype=wide,
    )
    layer: Any = model.base_model.model.linear
    layer.train()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return _ModuleStep(
        torch.compile(layer, dynamic=False) if compiled else layer, layer.base_layer.weight, a, b
    )


def _ours(name: str, problem: Problem, device: torch.device) -> Step:
    layer = LoRALinear.from_linear(
        _linear(problem, device),
        problem.rank,
        alpha=SCALE * problem.rank,
        dropout=problem.dropout,
    ).train()
    strategy = name.partition(": ")[2]

    @contextlib.contextmanager
    def chosen() -> Iterator[None]:
        if not strategy:
            yield
            return
        roles = {role: strategy for role, known in BY_ROLE.items() if strategy in known}
        with use_backend("triton"), use_strategy(**roles):
            yield

    with chosen():
        path = explain(layer)
        if strategy and not path.startswith("triton"):
            raise Unavailable(path.partition("this call: ")[2].partition(". Leave")[0] or path)
        if path.startswith("triton") and device.type == "cuda":
            path += f"; {_strategies(problem, device)}"
    step = _ModuleStep(layer, layer.weight, layer.lora.A.weight, layer.lora.B.weight, chosen)
    step.path = path
    return step


def _strategies(problem: Problem, device: torch.device) -> str:
    """What the kernels' table gives for the problem, or what is forced on it."""
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    found = table_choice(problem, torch.cuda.get_device_capability(device), sms)
    return ", ".join(f"{role} by {name}" for role, name in found.items())


def table_choice(problem: Problem, capability: tuple[int, int], sms: int) -> dict[str, str]:
    """The strategy by role that the kernels' table gives for the problem, or what is forced."""
    m, k, n, r = problem.m, problem.k, problem.n, problem.rank
    found = {}
    for role, shape in (("forward", (m, n, k, r)), ("dx", (m, k, n, r))):
        try:
            found[role] = strategy_for(
                role,
                capability,
                DTYPES[problem.dtype],
                Shape(*shape),
                dropped=problem.dropout > 0,
                tma=k % 8 == 0 and n % 8 == 0,  # fresh tensors lie on 16 bytes and more
                sms=sms,
            )
        except RuntimeError:  # forced on what it does not serve, which the gate will say
            found[role] = "none"
    return found


class Work:
    """A step on one direction of a problem, over a ring of buffers; see `measure.Call`.

    Args:
        step: who.
        direction: of `DIRECTIONS`.
        ring: sets of buffers; each `prepare` takes the next.
        shared: who else draws from the ring: a list of one number that all of them count up.
    """

    def __init__(
        self, step: Step, direction: str, ring: list[Inputs], shared: list[int] | None = None
    ) -> None:
        self.step, self.direction, self.ring = step, direction, ring
        self.position = [0] if shared is None else shared
        self.y: Tensor | None = None

    def prepare(self) -> None:
        """Bind the next buffers; for a backward, run the forward."""
        self.inputs = self.ring[self.position[0] % len(self.ring)]
        self.position[0] += 1
        self.step.bind(self.inputs)
        self.y = None
        if self.direction == "backward":
            with self.context():
                self.y = self.step.forward()

    def context(self) -> contextlib.AbstractContextManager[Any]:
        """The contender's own."""
        return self.step.chosen()

    def run(self) -> Any:
        """The work; returns y, the gradients, or both."""
        if self.direction == "forward":
            return self.step.forward()
        if self.direction == "backward":
            y, self.y = self.y, None
            return torch.autograd.grad(y, self.step.leaves(), self.inputs.dy)
        y = self.step.forward()
        return y, torch.autograd.grad(y, self.step.leaves(), self.inputs.dy)
