"""Fine-tuning MiniMind: one optimizer step and one epoch, against the walk-through's loop."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import machine
from benchmarks.contenders import Unavailable
from benchmarks.gate import GateError
from benchmarks.measure import Call, spread
from benchmarks.stage import Outcome, Stage, measure_together, replayed_seconds
from benchmarks.walkthrough import WalkThrough
from lora_kernels import apply_lora, lora_parameters, mark_only_lora_as_trainable
from minimind import LMConfig, MiniMindLM, SFTDataset, load_tokenizer
from minimind.data import find_data, read_conversations
from minimind.training import Trainer, TrainingConfig, best_dtype

RIVAL = "walk-through"
CONTENDERS = (RIVAL, "ours, float32", "ours")
BATCH, RANK, LR = 4, 16, 5e-4
# Relative difference of the losses from the walk-through's, over the first epoch.
CLOSE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Job(NamedTuple):
    """Conversations to train on once, ``n_layers`` deep."""

    conversations: int
    n_layers: int

    def __str__(self) -> str:
        return f"{self.conversations}-conversations-{self.n_layers}-layers"


def jobs(device: str, full: bool) -> list[Job]:
    """A step is the epoch of one batch."""
    if device == "cpu":
        return [Job(BATCH, 2), Job(256 if full else 12, 2)] + [Job(BATCH, 8)] * full
    return [Job(count, layers) for layers in (2, 8) for count in (BATCH, 1024 if full else 128)]


@lru_cache(maxsize=1)
def _conversations() -> tuple[Any, Any]:
    return load_tokenizer(), read_conversations(find_data("identity"))


class Ours:
    """`minimind finetune`'s loop: batches padded to their own longest, the head where needed."""

    def __init__(
        self, model: MiniMindLM, dataset: SFTDataset, device: torch.device, dtype: torch.dtype
    ) -> None:
        apply_lora(model, rank=RANK, verbose=False)
        mark_only_lora_as_trainable(model)
        config = TrainingConfig(epochs=1, batch_size=BATCH, lr=LR)
        parameters = lora_parameters(model)
        self.trainer = Trainer(model, parameters, dataset, config, device, dtype)
        self.losses: list[float] = []

    def run(self) -> None:
        """Train an epoch."""
        self.trainer.step = 0
        self.trainer.run(lambda progress: self.losses.append(progress.loss))


class Epoch(Call):
    """A contender's epoch; the parameters go on learning from one to the next."""

    def __init__(self, loop: Ours | WalkThrough) -> None:
        self.loop = loop

    def prepare(self) -> None:
        pass

    def run(self) -> None:
        self.loop.run()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    full = metafunc.config.getoption("--full")
    cases = [
        pytest.param(job, contender, id=f"{job}-{contender}")
        for job in jobs(machine.best_device().type, full)
        for contender in CONTENDERS
    ]
    metafunc.parametrize(("problem", "contender"), cases)


@pytest.mark.benchmark(timer=replayed_seconds)
def test_training(
    problem: Job,
    contender: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    benchmark: object,
) -> None:
    info = problem._asdict() | {"base": RIVAL, "base_is_rival": True}
    what = "one step" if problem.conversations == BATCH else "an epoch"
    info["section"] = f"MiniMind, rank {RANK} on the square linears, batches of {BATCH}"
    info["label"] = f"{what}: {problem.conversations} conversations, {problem.n_layers} layers"
    stage.row(request, benchmark, measure_training, info)


def measure_training(job: Job, names: list[str]) -> dict[str, Outcome]:
    """Check and time the loops on the same conversations."""
    device = machine.best_device()
    tokenizer, conversations = _conversations()
    dataset = SFTDataset(conversations[: job.conversations], tokenizer)
    torch.manual_seed(0)
    base = MiniMindLM(LMConfig(dim=512, n_layers=job.n_layers)).to(device)
    rival = _loop(RIVAL, base, dataset, device)
    rival.run()

    def proven(name: str) -> Epoch:
        if name == RIVAL:
            return Epoch(rival)
        loop = _loop(name, base, dataset, device)
        loop.run()
        _compare(name, loop, rival)
        return Epoch(loop)

    if device.type == "cuda":
        outcomes = measure_together(names, proven, device, 1.5, least_rounds=10, warmup_rounds=1)
    else:  # everything has run once or twice by then, and a padded epoch is long
        outcomes = measure_together(names, proven, device, 0.0, least_rounds=3, warmup_rounds=0)
    for name, outcome in outcomes.items():
        if outcome.samples:
            narrow = name == "ours" or (name == RIVAL and device.type == "cuda")
            outcome.info["dtype"] = str(best_dtype(device) if narrow else torch.float32)[6:]
            seconds = spread(outcome.samples).median
            outcome.info["samples_per_second"] = round(len(dataset) / seconds, 1)
            outcome.info["tokens_per_second"] = round(sum(dataset.lengths) / seconds)
    return outcomes


def _loop(name: str, base: MiniMindLM, dataset: SFTDataset, device: torch.device) -> Any:
    model = copy.deepcopy(base)
    torch.manual_seed(1)  # of the factors
    if name == RIVAL:
        return WalkThrough(model, dataset, BATCH, RANK, LR, device)
    dtype = torch.float32 if name.endswith("float32") else best_dtype(device)
    if name == "ours" and dtype == torch.float32:
        raise Unavailable("this device is no faster in bfloat16, so that ours is float32")
    return Ours(model, dataset, device, dtype)


def _compare(name: str, loop: Any, rival: WalkThrough) -> None:
    """The mean losses of the first epoch: the order of the samples differs."""
    wide = name == "ours, float32" and rival.device.type == "cpu"
    close = CLOSE[torch.float32 if wide and len(rival.losses) == 1 else torch.bfloat16]
    ours, theirs = (sum(each.losses) / len(each.losses) for each in (loop, rival))
    if not abs(ours - theirs) <= close * theirs:
        raise GateError(f"{name}: loss {ours:.5f}, the walk-through's {theirs:.5f}")
