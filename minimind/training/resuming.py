"""Whether a resume point is of the structure that a run can go on from."""

from __future__ import annotations

from typing import Any

from lora_kernels.adapters import strange_tensor

from .loop import Progress
from .report import Side


def refuse_strange(state: dict[str, Any]) -> None:
    """Raise on what `Job` and `Trainer` could not go on from."""
    for name, tensor in state["weights"].items():
        if strange := strange_tensor(tensor):
            raise ValueError(f"{name}: {strange}")
    trainer, report, before = state["trainer"], state["report"], state["before"]
    for name in ("step", "total_steps"):
        if type(trainer[name]) is not int or trainer[name] < 0:
            raise ValueError(f"its {name} is {trainer[name]!r}")
    if trainer["step"] > trainer["total_steps"]:
        raise ValueError(f"step {trainer['step']} of {trainer['total_steps']}")
    Side(**before)
    for row in report["rows"]:
        if "event" not in row and not isinstance(row["loss"], (float, type(None))):
            raise ValueError(f"it has a loss of {row['loss']!r}")
    for step in report["pending"]:
        Progress(**step)
