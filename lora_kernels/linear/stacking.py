"""Several adapters of one linear as a single one of a wider rank."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def stack_adapters(pairs: Sequence[tuple[Tensor, Tensor, float]]) -> tuple[Tensor, Tensor]:
    """One pair of factors whose product is the sum of all: ``B·A = Σ scale_i·B_i·A_i``.

    Differentiable in every factor. Factors of several dtypes come out in the widest of them.

    Args:
        pairs: of each adapter ``lora_a [..., R_i, K]``, ``lora_b [..., N, R_i]`` and the factor on
            its branch; at least one.

    Returns:
        ``lora_a [..., ΣR, K]`` and ``lora_b [..., N, ΣR]``, to be used with scale 1.
    """
    dtype = functools.reduce(torch.promote_types, (f.dtype for a, b, _ in pairs for f in (a, b)))
    stacked = torch.cat([a.to(dtype) for a, _, _ in pairs], dim=-2)
    scaled = [b.to(dtype) if scale == 1.0 else b.to(dtype) * scale for _, b, scale in pairs]
    return stacked, torch.cat(scaled, dim=-1)
