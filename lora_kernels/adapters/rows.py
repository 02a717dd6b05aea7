"""Adapters of a mixed batch: each row with its own, over one product with the base weight.

Rows are sorted by adapter, and the branches of all adapters are two products of groups of rows
with a matrix each: with all A, then with all B. A row without an adapter comes last and is of no
group.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..experts.module import LoRAParameter, frozen
from ..experts.routing import permuted
from ..linear.module import LoRALinear
from .carried import known_adapters, lora_layers
from .wholes import whole_slots

# Ranks are filled up with zeros to a multiple of this, which torch's grouped products need.
_RANKS = 8


class Rows:
    """Which adapter each row of a batch is computed with, for the layers of one model."""

    def __init__(self, names: Sequence[str | None]) -> None:
        self.names = tuple(names)
        self._places: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}

    def serve(self, layer: LoRALinear, x: Tensor) -> Tensor:
        """``x [B, ..., K]`` to ``y [B, ..., N]``, each of the B rows as its adapter has it.

        A batch flattened to ``[B·S, K]`` is taken for its rows one after another.

        Raises:
            ValueError: x has another number of rows.
        """
        count = len(self.names)
        fits = x.dim() == 2 and x.shape[0] % count == 0
        if x.dim() < 2 or (x.shape[0] != count and not fits):
            raise ValueError(
                f"rows names an adapter for each of {count} rows, x has shape {tuple(x.shape)}; "
                "call use_lora with as many names as the batch has rows"
            )
        y = F.linear(x, layer.weight, layer.bias)
        adapters = layer.adapters()
        used = [name for name in dict.fromkeys(self.names) if name in adapters]
        if not used or not x.numel():
            return y
        flat = x.reshape(-1, x.shape[-1])
        order, place, offsets = self._sorted(used, flat.shape[0] // count, x.device)
        rows = permuted(flat, order, place)
        if layer.training:
            rows = _dropped(rows, [layer.lora_configs[name].dropout for name in used], offsets)
        pairs = [(adapters[n].A.weight, adapters[n].B.weight) for n in used]
        rank = -(-max(a.shape[0] for a, _ in pairs) // _RANKS) * _RANKS
        lora_a = torch.stack([F.pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in pairs])
        scaled = [b * layer.lora_configs[n].scale for n, (_, b) in zip(used, pairs, strict=True)]
        lora_b = torch.stack([F.pad(b, (0, rank - b.shape[1])) for b in scaled])
        xa = frozen(rows, lora_a.to(rows.dtype), offsets, None)
        branch = frozen(xa, lora_b.to(xa.dtype), offsets, None)
        return y + permuted(branch, place, order).view(y.shape).to(y.dtype)

    def _sorted(
        self, used: list[str], each: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Order, place and ends of the groups, as `experts.routing` has them; ``each`` tokens a
        row."""
        key = tuple(used), each, device
        if key not in self._places:
            numbers = [used.index(n) if n in used else len(used) for n in self.names]  # type: ignore[arg-type]
            order = torch.tensor(numbers).repeat_interleave(each).argsort(stable=True)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order))
            counts = torch.tensor([numbers.count(i) * each for i in range(len(used))])
            offsets = counts.cumsum(0, dtype=torch.int32)
            self._places[key] = order.to(device), place.to(device), offsets.to(device)
        return self._places[key]

    def __getstate__(self) -> dict[str, Any]:
        return {"names": self.names, "_places": {}}


def _dropped(rows: Tensor, dropouts: list[float], offsets: Tensor) -> Tensor:
    """The rows of each group with its adapter's dropout."""
    if not any(dropouts):
        return rows
    if len(set(dropouts)) == 1:
        return F.dropout(rows, dropouts[0])
    ends = [0, *offsets.tolist()]
    parts = [
        F.dropout(rows[start:end], dropout)
        for dropout, start, end in zip(dropouts, ends, ends[1:], strict=False)
    ]
    return torch.cat([*parts, rows[ends[-1] :]])


def check_rows(model: nn.Module, rows: Any) -> list[str]:
    """The adapters that ``rows`` names, each once.

    Raises:
        TypeError: it is no list of names and None.
        ValueError: it is empty or names an adapter that the model lacks, that is on experts, or
            that trains something whole.
    """
    if not isinstance(rows, (list, tuple)) or not all(
        name is None or isinstance(name, str) for name in rows
    ):
        raise TypeError(f"rows must be a list with an adapter's name or None a row, got {rows!r}")
    if not rows:
        raise ValueError("rows is empty; name an adapter, or None, for each row of the batch")
    names = known_adapters(model, [name for name in dict.fromkeys(rows) if name], "rows")
    for name in names:
        for key, layer in lora_layers(model).items():
            if isinstance(layer, LoRAParameter) and name in layer.lora_configs:
                raise ValueError(
                    f"adapter {name!r} is on the experts {key!r}, whose tokens are of no row any "
                    "more; rows are for adapters of linears"
                )
        if whole := next(iter(whole_slots(model, name)), None):
            raise ValueError(
                f"adapter {name!r} trains {whole!r} whole, which cannot be another's in other rows"
            )
    return names


def refuse_rows(model: nn.Module, what: str) -> None:
    """Raise ValueError where rows of a batch have adapters of their own."""
    if any(rows_of(layer) is not None for layer in lora_layers(model).values()):
        raise ValueError(
            f"{what} while rows have adapters of their own; call use_lora with the names first"
        )


def rows_of(layer: nn.Module) -> Rows | None:
    """What `use_lora` was given for the rows of a batch."""
    found: Rows | None = layer.__dict__.get("_lora_rows")
    return found


def set_rows(layer: nn.Module, rows: Rows | None) -> None:
    """Have a layer compute by rows, or not any more."""
    if rows is None:
        layer.__dict__.pop("_lora_rows", None)
    else:
        layer.__dict__["_lora_rows"] = rows
