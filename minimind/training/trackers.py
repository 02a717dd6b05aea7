"""Metrics for those who watch elsewhere: TensorBoard and Weights & Biases, where installed.

What they fail at, training goes on without: metrics.jsonl is the record.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ..settings import TRACKERS


def parse_trackers(names: str | None) -> list[str]:
    """``--report-to`` as a list, each of it installed.

    Raises:
        ValueError: an unknown name, or a package that is not installed.
    """
    asked = [name.strip() for name in names.split(",")] if names else []
    for name in asked:
        if name not in TRACKERS:
            raise ValueError(
                f"--report-to must name {' or '.join(TRACKERS)}, or both with a comma between, got "
                f"{name!r}"
            )
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"--report-to {name} needs the package {name}; install it with: pip install {name}"
            )
    return asked


class Trackers:
    """Those that a run reports to; nothing they do stops it.

    Args:
        names: as `parse_trackers` gives them.
        warn: told once of each that fails.
    """

    def __init__(self, names: Sequence[str] = (), warn: Callable[[str], object] = print) -> None:
        self._names, self._warn = names, warn
        self._open: dict[str, Any] = {}

    def start(self, out: Path, config: dict[str, Any], step: int) -> None:
        """Begin to report.

        Args:
            out: the run's directory.
            config: what the run was started with.
            step: what the run goes on from; later steps of it are told anew.
        """
        for name in self._names:
            with self._going_on(name):
                make = _TensorBoard if name == "tensorboard" else _Wandb
                self._open[name] = make(out, config, step)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Report the numbers among ``values``, of a step."""
        numbers = {
            name: value
            for name, value in values.items()
            if isinstance(value, (int, float)) and name != "step"
        }
        for name, tracker in list(self._open.items()):
            with self._going_on(name):
                tracker.log(step, numbers)

    def close(self) -> None:
        """Have all of it written."""
        for name, tracker in list(self._open.items()):
            with self._going_on(name):
                tracker.close()
        self._open = {}

    @contextlib.contextmanager
    def _going_on(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of packages that reach for files, networks and accounts
            self._open.pop(name, None)
            self._warn(f"nothing more is reported to {name} ({error!r}); training goes on")


class _TensorBoard:
    def __init__(self, out: Path, config: dict[str, Any], step: int) -> None:
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        # What an unfinished run wrote after its resume point is not shown.
        self.writer = tensorboard.SummaryWriter(
            str(out / "tensorboard"), purge_step=step + 1 if step else None
        )
        if not step:
            lines = "\n".join(f"    {name}: {value}" for name, value in config.items())
            self.writer.add_text("settings", lines)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class _Wandb:
    def __init__(self, out: Path, config: dict[str, Any], step: int) -> None:
        wandb = importlib.import_module("wandb")
        name = f"{out.resolve().parent.name}-{out.name}"
        # A run that goes on is one of its own there, from its step on.
        self.run = wandb.init(project="minimind", name=name, dir=str(out), config=config)

    def log(self, step: int, values: dict[str, float]) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()
