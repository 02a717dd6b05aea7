"""Matrices one below the other: as one view where they lie so in memory, else as a copy."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def packed(tensors: Sequence[Tensor]) -> Tensor | None:
    """The ``[ΣN, K]`` view over ``[N_i, K]`` tensors that follow each other in one storage.

    None where they do not, or where one is not contiguous. Nothing is copied.
    """
    first = tensors[0]
    if len(tensors) == 1:
        return first if first.is_contiguous() else None
    address, rows = first.data_ptr(), 0
    storage = first.untyped_storage().data_ptr()
    for tensor in tensors:
        if (
            tensor.data_ptr() != address
            or tensor.dtype != first.dtype
            or not tensor.is_contiguous()
            or tensor.shape[1:] != first.shape[1:]
            or tensor.untyped_storage().data_ptr() != storage
        ):
            return None
        address += tensor.numel() * tensor.element_size()
        rows += tensor.shape[0]
    return first.as_strided((rows, first.shape[1]), first.stride())


def stacked(tensors: Sequence[Tensor], dtype: torch.dtype | None = None) -> Tensor:
    """``[ΣN, K]`` of ``[N_i, K]`` tensors in ``dtype``, by default the widest of theirs."""
    if dtype is None:
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors))
    if len(tensors) == 1:
        return tensors[0].to(dtype)
    return torch.cat([tensor.to(dtype) for tensor in tensors])
