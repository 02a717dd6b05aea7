"""Tokens to rows sorted by expert, and back: gathered by permutations, nothing added atomically."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


class Routing(NamedTuple):
    """Where the rows of a batch of tokens go, each of which visits ``top_k`` experts.

    Attributes:
        order: ``[T·top_k]``, for each sorted row the token and choice it is of, counted in a row.
        place: the same the other way round.
        offsets: int32 ``[G]``, where each expert's rows end. Choices of no expert, numbered G and
            up, come last.
        top_k: choices of a token.
    """

    order: Tensor
    place: Tensor
    offsets: Tensor
    top_k: int


def route(chosen: Tensor, experts: int) -> Routing:
    """The routing of ``chosen [T, top_k]``, numbers of experts."""
    numbers = chosen.reshape(-1)
    numbers, order = torch.sort(numbers, stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.shape[0], device=order.device)
    each = torch.arange(experts, device=numbers.device, dtype=numbers.dtype)
    offsets = torch.searchsorted(numbers, each, right=True).to(torch.int32)
    return Routing(order, place, offsets, chosen.shape[1])


def spread(tokens: Tensor, routing: Routing) -> Tensor:
    """``[T, K]`` to the sorted rows ``[T·top_k, K]``."""
    found: Tensor = _Spread.apply(tokens, *routing)
    return found


def gathered(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """The sorted rows ``[T·top_k, N]``, each times its weight ``[T, top_k]``, summed by token:
    ``[T, N]``."""
    weighted = rows * _Permuted.apply(weights.reshape(-1, 1), routing.order, routing.place)
    by_token: Tensor = _Permuted.apply(weighted, routing.place, routing.order)
    return by_token.view(-1, routing.top_k, rows.shape[1]).sum(1)


def permuted(rows: Tensor, order: Tensor, place: Tensor) -> Tensor:
    """``rows[order]``; ``place`` is the permutation the other way round."""
    found: Tensor = _Permuted.apply(rows, order, place)
    return found


class _Spread(torch.autograd.Function):
    """Each token once for each of its choices. The gradient of a gather would be a scatter, which
    a GPU adds up in any order."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        tokens, order, place, _, top_k = inputs
        ctx.save_for_backward(order, place)
        ctx.top_k = top_k
        found: Tensor = tokens[order // top_k]
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        order, place = ctx.saved_tensors
        by_token = _Permuted.apply(grad, place, order)
        return by_token.view(-1, ctx.top_k, grad.shape[1]).sum(1), None, None, None, None


class _Permuted(torch.autograd.Function):
    """``rows[order]``, whose gradient is ``grad[place]``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:  # type: ignore[override]
        rows, order, place = inputs
        ctx.save_for_backward(order, place)
        found: Tensor = rows[order]
        return found

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        order, place = ctx.saved_tensors
        return _Permuted.apply(grad, place, order), None, None
