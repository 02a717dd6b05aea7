"""Shapes, devices and tensors for every test that runs a kernel."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from lora_kernels.kernels.dropout import draw_keep_mask, draw_seed, keep_mask

DEVICES = [
    pytest.param("cpu", marks=pytest.mark.interpreted),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# (device, backend) of every way a call can go.
PATHS = [
    pytest.param("cpu", "reference", id="cpu-reference"),
    pytest.param("cpu", "triton", id="interpreted", marks=pytest.mark.interpreted),
    pytest.param("cuda", "reference", id="cuda-reference", marks=pytest.mark.gpu),
    pytest.param("cuda", "triton", id="cuda-triton", marks=pytest.mark.gpu),
]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


class Case(NamedTuple):
    m: int
    n: int
    k: int
    r: int


SHAPES = [
    Case(64, 64, 64, 16),  # whole tiles
    Case(1, 1, 1, 1),  # one element of everything
    Case(3, 17, 127, 5),  # multiples of nothing; the last byte of the mask is not full
    Case(129, 40, 33, 1),  # one row past a tile, rank 1
    Case(17, 129, 65, 48),  # one column past a tile, a rank of one and a half chunks
    Case(130, 72, 136, 16),  # several tiles each way, and strides that suit TMA
    Case(20, 24, 40, 130),  # a rank of more than two chunks
]


class Tensors(NamedTuple):
    x: torch.Tensor
    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    bias: torch.Tensor
    dy: torch.Tensor


def make(case: Case, dtype, device, factors=None):
    """Random tensors of a case; ``factors`` is the dtype of A and B, x's by default."""
    m, n, k, r = case
    shapes = [(m, k), (n, k), (r, k), (n, r), (n,), (m, n)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    for i in (2, 3):
        tensors[i] = torch.randn(shapes[i]).to(factors or dtype)
    return Tensors(*(t.to(device) for t in tensors))


def seed_of(number, device):
    return torch.tensor([number], dtype=torch.int64, device=device)


def drawn_mask(rows, dropout_p, backend):
    """The keep mask that a call on ``rows [M, K]`` draws from torch's generator as it stands."""
    if backend == "triton":
        return keep_mask(draw_seed(rows.device), *rows.shape, dropout_p)
    return draw_keep_mask(rows, dropout_p)
