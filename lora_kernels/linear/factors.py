"""`LoRA`, an adapter's pair of factors for one linear, and what an adapter may be called."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..config import check_rank

# The name of an adapter that was given none.
DEFAULT = "default"

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def factor_dtype(weight: torch.dtype, lora_dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype of A and B over a weight of dtype ``weight``: ``lora_dtype`` if it is given.

    Otherwise the weight's own, but float32 over 16 bits: an optimizer's steps, a thousandth of a
    factor, are lost there in rounding, and `torch.amp.GradScaler` refuses float16.

    Raises:
        TypeError: ``lora_dtype`` is not of `DTYPES`.
    """
    if lora_dtype is None:
        return torch.float32 if weight.itemsize < 4 else weight
    if lora_dtype not in DTYPES:
        raise TypeError(
            f"lora_dtype must be None or one of {', '.join(map(str, DTYPES))}; got {lora_dtype!r}"
        )
    return lora_dtype


class _Factor(nn.Linear):
    """A bias-free linear that keeps LoRA's initialisation when it is reset.

    torch's meta-device initialisers call `reset_parameters` on every module, children last, which
    would make B non-zero.
    """

    def __init__(self, in_features: int, out_features: int, std: float, **factory: Any) -> None:
        self.std = std
        super().__init__(in_features, out_features, bias=False, **factory)

    def reset_parameters(self) -> None:
        if self.std:
            nn.init.normal_(self.weight, std=self.std)
        else:
            nn.init.zeros_(self.weight)

    def _get_name(self) -> str:
        return "Linear"


class LoRA(nn.Module):
    """The trained factors: ``B(A(x))``, with A ~ N(0, 0.02²) and B = 0.

    Args:
        in_features: K.
        out_features: N.
        rank: R, at least 1. ``A.weight`` is ``[R, K]``, ``B.weight`` is ``[N, R]``.
        device, dtype: as for ``nn.Linear``.

    Source: LoRA, arXiv 2106.09685, section 4.1.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int = 16,
        *,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.rank = check_rank(rank)
        self.A = _Factor(in_features, rank, std=0.02, device=device, dtype=dtype)
        self.B = _Factor(rank, out_features, std=0.0, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., K]`` to ``[..., N]``, without scale or dropout."""
        return self.B(self.A(x))


def check_adapter_name(name: Any, argument: str = "name") -> str:
    """Return ``name`` if it can be a part of the keys of a state dict, else raise.

    Raises:
        TypeError: it is no text.
        ValueError: it is empty, has a dot or begins with an underscore, or is a word that torch's
            modules, their wrappers or these keys use.
    """
    if not isinstance(name, str):
        raise TypeError(f"{argument} must be the name of an adapter, got {name!r}")
    if not name or "." in name or name.startswith("_"):
        raise ValueError(
            f"{argument} must be a word without dots that does not begin with an underscore, got "
            f"{name!r}"
        )
    if name in ("lora", "loras", "module") or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{argument} {name!r} is a word of torch's modules; take another name")
    return name
