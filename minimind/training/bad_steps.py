"""What a step that went wrong read, and a resume point that would go wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def samples_in_words(
    model: nn.Module,
    numbers: Sequence[int],
    rows: Sequence[Sequence[Tensor]],
    device: torch.device,
) -> str:
    """Which samples a step read, and which of them alone have no finite loss.

    Args:
        model: called with ``(X, labels=Y, loss_mask=…)``.
        numbers: of the samples in the data, from 0.
        rows: X, Y and mask ``[L]`` of each; empty where no one process has them all.
    """
    bad = []
    for number, row in zip(numbers, rows, strict=False):
        x, y, mask = (tensor[None].to(device) for tensor in row)
        if not torch.isfinite(model(x, labels=y, loss_mask=mask).loss):
            bad.append(number)
    if 0 < len(bad) < len(numbers):
        return f"{len(numbers)} samples, {_listed(bad)} without a finite loss (counted from 0)"
    return f"samples {_listed(numbers)} (counted from 0)"


def _listed(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 16} more" if len(numbers) > 16 else ""
    return ", ".join(map(str, numbers[:16])) + more


def refuse_other_moments(
    state: dict[str, Any], optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]
) -> None:
    """Raise ValueError where an optimizer's state is of other parameters or settings.

    The optimizer itself takes any, and fails at its next step.
    """
    for number, moments in state["state"].items():
        shape = parameters[number].shape
        for name, value in moments.items():
            fits = isinstance(value, Tensor) and value.shape == (() if name == "step" else shape)
            if not fits:
                raise ValueError(f"its optimizer's {name} does not fit parameter {number}")
    own = optimizer.state_dict()["param_groups"]
    for mine, other in zip(own, state["param_groups"], strict=True):
        for name in mine.keys() & other.keys() - {"lr"}:
            if mine[name] != other[name]:
                raise ValueError(f"its optimizer has another {name}")
