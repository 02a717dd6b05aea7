"""Products of groups of rows, each with a matrix of its own, by torch's grouped product.

``torch._grouped_mm`` reads the offsets on the device: nobody waits for them. It takes float32 and
16 bits; rows of its operands must begin on 16 bytes, for which ranks are padded here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BYTES = 16


def serves(x: Tensor, n: int) -> bool:
    """Whether torch's grouped product takes rows ``x [M, K]`` to N columns."""
    aligned = all(size * x.element_size() % _BYTES == 0 and size for size in (x.shape[1], n))
    return aligned and x.dtype in _DTYPES and x.shape[0] > 0


def times(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """``rows_g·matrices_g`` for each group g: ``[M, K]`` and ``[G, K, N]`` to ``[M, N]``.

    Rows beyond the last offset are left as the memory was.
    """
    return torch._grouped_mm(rows, matrices, offs=offsets)


def outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """``left_gᵀ·right_g`` for each group g: ``[M, K]`` and ``[M, N]`` to ``[G, K, N]``; zero for
    a group without rows."""
    found = torch._grouped_mm(left.t(), right, offs=offsets)
    before = F.pad(offsets[:-1], (1, 0))
    return found.masked_fill_((offsets == before)[:, None, None], 0.0)


def padded(factor: Tensor, dim: int) -> Tensor:
    """A factor whose rank, at ``dim``, is zeros up to a multiple of 16 bytes."""
    missing = -factor.shape[dim] % (_BYTES // factor.element_size())
    if not missing:
        return factor
    last = dim in (-1, factor.dim() - 1)
    return F.pad(factor, (0, missing) if last else (0, 0, 0, missing))


def group_of_rows(offsets: Tensor, rows: int) -> Tensor:
    """``[rows]``: the group of each row; that of rows beyond the last offset is G."""
    numbers = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets, numbers, right=True)
