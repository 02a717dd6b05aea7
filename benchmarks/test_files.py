"""Saving, loading and merging an adapter on every linear of MiniMind, against PEFT."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from benchmarks import machine
from benchmarks.contenders import Unavailable, peft
from benchmarks.gate import GateError
from benchmarks.measure import Call
from benchmarks.stage import Outcome, Stage, measure_together, replayed_seconds
from lora_kernels import apply_lora, load_lora, merge_lora, save_lora
from minimind import LMConfig, MiniMindLM

RANK = 16
RIVAL = "peft"
OPERATIONS = ("save", "load", "merge")
# By the suffix of the path: our own two formats and PEFT's directory.
FORMATS = {"ours": ".safetensors", "ours, .pth": ".pth", "ours, PEFT's directory": ""}
TARGETS = ["wq", "wk", "wv", "wo", "w1", "w2", "w3"]
SECONDS = 0.5


class Task(NamedTuple):
    """One operation on a model of so many layers."""

    operation: str
    n_layers: int

    def __str__(self) -> str:
        return f"{self.operation}-{self.n_layers}-layers"


class Once(Call):
    """An operation on what `fresh` makes anew for each call."""

    def __init__(self, fresh: Callable[[], Any], work: Callable[[Any], Any]) -> None:
        self.fresh, self.work = fresh, work

    def prepare(self) -> None:
        self.subject = self.fresh()

    def run(self) -> Any:
        return self.work(self.subject)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    layers = (2, 8) if metafunc.config.getoption("--full") else (2,)
    cases = [
        pytest.param(Task(operation, n), contender, id=f"{Task(operation, n)}-{contender}")
        for n in layers
        for operation in OPERATIONS
        for contender in (RIVAL, *FORMATS)
        if operation != "merge" or contender in (RIVAL, "ours")
    ]
    metafunc.parametrize(("problem", "contender"), cases)


@pytest.mark.benchmark(timer=replayed_seconds)
def test_files(
    problem: Task,
    contender: str,
    stage: Stage,
    request: pytest.FixtureRequest,
    benchmark: object,
) -> None:
    info = problem._asdict() | {"dtype": "float32", "base": RIVAL, "base_is_rival": True}
    info["section"] = f"MiniMind, rank {RANK} on every linear but the head"
    info["label"] = f"{problem.operation}, {problem.n_layers} layers"
    stage.row(request, benchmark, measure_files, info)


def measure_files(task: Task, names: list[str]) -> dict[str, Outcome]:
    """Check and time one operation."""
    device = machine.best_device()
    torch.manual_seed(0)
    base = MiniMindLM(LMConfig(dim=512, n_layers=task.n_layers)).to(device).eval()
    adapted = copy.deepcopy(base)
    apply_lora(adapted, rank=RANK, target_modules=TARGETS, verbose=False)
    for name, parameter in adapted.named_parameters():
        if ".lora.B." in name:
            nn.init.normal_(parameter, std=0.02)
    ids = torch.arange(32, device=device)[None]
    with torch.no_grad():
        logits = adapted(ids).logits

    with tempfile.TemporaryDirectory() as folder:
        stored = {name: Path(folder) / f"adapter{suffix}" for name, suffix in FORMATS.items()}
        for path in stored.values():
            save_lora(adapted, path)
        files = _Files(base, adapted, stored, Path(folder))

        def proven(name: str) -> Once:
            call = files.call(task.operation, name)
            call.prepare()
            model = files.result(task.operation, name, call.run())
            with torch.no_grad():
                off = (model(ids).logits - logits).abs().max().item()
            if not off <= 1e-4:
                raise GateError(f"{name}: logits off by {off:.2e} after {task.operation}")
            return call

        return measure_together(names, proven, device, SECONDS, least_rounds=5, warmup_rounds=1)


class _Files:
    """The operations, and the model that each leaves behind."""

    def __init__(
        self, base: nn.Module, adapted: nn.Module, stored: dict[str, Path], folder: Path
    ) -> None:
        self.base, self.adapted, self.stored, self.folder = base, adapted, stored, folder

    def call(self, operation: str, name: str) -> Once:
        """The operation as a contender does it."""
        if name == RIVAL:
            return self._peft(operation)
        target = self.folder / f"written{FORMATS[name]}"
        if operation == "save":
            return Once(lambda: self.adapted, lambda model: save_lora(model, target))
        if operation == "load":
            path = self.stored[name]
            return Once(lambda: copy.deepcopy(self.base), lambda model: _load(model, path))
        return Once(lambda: copy.deepcopy(self.adapted), _merge)

    def _peft(self, operation: str) -> Once:
        if peft is None:
            raise Unavailable("peft is not installed; pip install peft")
        directory = self.stored["ours, PEFT's directory"]

        def load(model: nn.Module) -> Any:
            return peft.PeftModel.from_pretrained(model, directory)  # type: ignore[arg-type]

        if operation == "load":
            return Once(lambda: copy.deepcopy(self.base), load)
        live = load(copy.deepcopy(self.base))
        if operation == "save":
            target = self.folder / "peft"
            return Once(lambda: live, lambda model: model.save_pretrained(target))
        return Once(lambda: copy.deepcopy(live), lambda model: model.merge_and_unload())

    def result(self, operation: str, name: str, returned: Any) -> Any:
        """A model to look at after the operation; of a save, one that loads what was written."""
        if operation != "save":
            return returned
        path = self.folder / ("peft" if name == RIVAL else f"written{FORMATS[name]}")
        return _load(copy.deepcopy(self.base), path)


def _load(model: nn.Module, path: Path) -> nn.Module:
    load_lora(model, path)
    return model


def _merge(model: nn.Module) -> nn.Module:
    merge_lora(model)
    return model
