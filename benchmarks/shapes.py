"""Which linears are measured, and at which sizes: MiniMind's, Llama-3-8B's, Qwen2.5-7B's."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch

from lora_kernels.dispatch import choose


class Linear(NamedTuple):
    """A projection of a model: ``weight [n, k]``."""

    model: str
    name: str
    k: int
    n: int


LINEARS = (
    Linear("minimind", "q, o", 512, 512),
    Linear("minimind", "k, v", 512, 128),
    Linear("minimind", "gate, up", 512, 1408),
    Linear("minimind", "down", 1408, 512),
    Linear("llama-3-8b", "q, o", 4096, 4096),
    Linear("llama-3-8b", "k, v", 4096, 1024),
    Linear("llama-3-8b", "gate, up", 4096, 14336),
    Linear("llama-3-8b", "down", 14336, 4096),
    Linear("qwen2.5-7b", "q, o", 3584, 3584),
    Linear("qwen2.5-7b", "k, v", 3584, 512),
    Linear("qwen2.5-7b", "gate, up", 3584, 18944),
    Linear("qwen2.5-7b", "down", 18944, 3584),
)
TOKENS = (1, 16, 64, 256, 1024, 4096, 8192, 16384)
RANKS = (8, 16, 32, 64, 128)
DROPOUTS = (0.0, 0.1)
# "both" is forward and backward as one piece of work.
DIRECTIONS = ("forward", "backward", "both")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Problem(NamedTuple):
    """One LoRA linear to measure.

    Attributes:
        model: whose projection it is.
        m, k, n: ``x [m, k]``, ``weight [n, k]``.
        rank: R.
        dtype: a key of `DTYPES`, of x and the weight.
        dropout: probability.
        direction: one of `DIRECTIONS`.
        timing: ``call`` as the device's clock sees calls in a row, or ``graph`` for CUDA graphs.
    """

    model: str
    m: int
    k: int
    n: int
    rank: int = 16
    dtype: str = "bfloat16"
    dropout: float = 0.0
    direction: str = "both"
    timing: str = "call"

    def __str__(self) -> str:
        return (
            f"{self.model}-{self.k}x{self.n}-m{self.m}-r{self.rank}-{self.dtype}"
            f"-p{self.dropout:g}-{self.direction}-{self.timing}"
        )


def linear_problems(device: str, full: bool) -> list[Problem]:
    """The problems of the linear suite, without repetition, the most telling first."""
    if device == "cuda":
        walk = _cuda_problems(full)
    elif full or not slow_in_bfloat16():
        walk = _cpu_problems(full, ("float32", "bfloat16"))
    else:
        walk = itertools.chain(_cpu_problems(full, ("float32",)), _slow_problems())
    return list(dict.fromkeys(walk))


def slow_in_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 so slowly that full sizes would take minutes each."""
    return choose(torch.zeros(1, dtype=torch.bfloat16)).widened


def _slow_problems() -> Iterator[Problem]:
    for linear in LINEARS:
        if linear.model == "minimind":
            for m in (16, 64) if linear.n <= 512 else (16,):
                yield Problem(linear.model, m, linear.k, linear.n)


def _cpu_problems(full: bool, dtypes: tuple[str, ...]) -> Iterator[Problem]:
    mini = [linear for linear in LINEARS if linear.model == "minimind"]
    square = mini[0]
    if full:
        tokens: tuple[int, ...] = tuple(m for m in TOKENS if m <= 4096)
        for dtype in dtypes:
            for linear in mini:
                for m in tokens:
                    for p in DROPOUTS:
                        yield Problem(linear.model, m, linear.k, linear.n, dtype=dtype, dropout=p)
                for rank in RANKS:
                    yield Problem(linear.model, 1024, linear.k, linear.n, rank, dtype)
                for direction in DIRECTIONS:
                    for p in DROPOUTS:
                        yield Problem(
                            linear.model, 1024, linear.k, linear.n, 16, dtype, p, direction
                        )
        return
    for dtype in dtypes:
        for linear in mini:
            for p in DROPOUTS:
                yield Problem(linear.model, 1024, linear.k, linear.n, dtype=dtype, dropout=p)
    for dtype in dtypes:
        for m in (1, 64, 256, 4096):
            yield Problem(square.model, m, square.k, square.n, dtype=dtype)
        for rank in RANKS:
            yield Problem(square.model, 1024, square.k, square.n, rank, dtype)
        for direction in DIRECTIONS:
            yield Problem(square.model, 1024, square.k, square.n, 16, dtype, 0.0, direction)


def _cuda_problems(full: bool) -> Iterator[Problem]:
    large = [linear for linear in LINEARS if linear.model != "minimind"]
    mini = [linear for linear in LINEARS if linear.model == "minimind"]
    llama = [linear for linear in large if linear.model == "llama-3-8b"]
    square = llama[0]
    if full:
        for linear in large:
            for m in TOKENS:
                for p in DROPOUTS:
                    yield Problem(linear.model, m, linear.k, linear.n, dropout=p)
                if m <= 1024:
                    yield Problem(linear.model, m, linear.k, linear.n, timing="graph")
            for rank in RANKS:
                for p in DROPOUTS:
                    yield Problem(linear.model, 8192, linear.k, linear.n, rank, dropout=p)
            for direction in DIRECTIONS:
                yield Problem(linear.model, 8192, linear.k, linear.n, direction=direction)
        for linear in mini:
            for m in TOKENS:
                for timing in ("call", "graph"):
                    yield Problem(linear.model, m, linear.k, linear.n, timing=timing)
                yield Problem(linear.model, m, linear.k, linear.n, dropout=0.1)
        return
    for linear in llama:
        yield Problem(linear.model, 8192, linear.k, linear.n)
    for linear in llama:
        yield Problem(linear.model, 8192, linear.k, linear.n, dropout=0.1)
    for m in TOKENS:
        yield Problem(square.model, m, square.k, square.n)
    for rank in RANKS:
        yield Problem(square.model, 8192, square.k, square.n, rank)
    for direction in DIRECTIONS:
        yield Problem(square.model, 8192, square.k, square.n, direction=direction)
    for linear in large:
        if linear.model == "qwen2.5-7b":
            yield Problem(linear.model, 8192, linear.k, linear.n)
    for m in (256, 4096):
        for timing in ("call", "graph"):
            yield Problem("minimind", m, mini[0].k, mini[0].n, timing=timing)
    for m in (1, 16, 64, 256, 1024):
        yield Problem(square.model, m, square.k, square.n, timing="graph")


def compiled_too(problem: Problem, full: bool) -> bool:
    """Whether torch.compile's contenders, seconds each to compile, are part of a problem."""
    if full:
        return True
    few = {("minimind", 1024, 512, 512, 0.0), ("llama-3-8b", 8192, 4096, 14336, 0.0)}
    few |= {("llama-3-8b", 8192, 4096, 4096, p) for p in DROPOUTS}
    plain = problem.rank == 16 and problem.direction == "both" and problem.timing == "call"
    return plain and (*problem[:4], problem.dropout) in few
