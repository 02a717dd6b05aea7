"""The loss of the next token without the logits of all tokens at once.

``[tokens, vocabulary]`` in float32 is the largest thing of a step where the vocabulary is: at 4,096
supervised tokens of 151,936 entries 2.5 GB, and as much again for its gradient. Taken a chunk of
tokens at a time it never exists: each chunk's gradient is made right after its logits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Of logits a chunk holds at most, 64 MB in float32: enough for the products to be large ones.
_MOST = 2**24


def fits_whole(tokens: int, vocabulary: int) -> bool:
    """Whether the logits of all tokens are no more than a chunk's."""
    return tokens * vocabulary <= _MOST


def is_plain(head: nn.Module) -> bool:
    """Whether the head is one product of its weight, and nobody watches it."""
    return type(head) is nn.Linear and not (
        head._forward_hooks or head._forward_pre_hooks or "forward" in head.__dict__
    )


def chunked_cross_entropy(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int
) -> Tensor:
    """``Σ cross_entropy(hidden·Wᵀ + bias, targets)``, in float32 or wider.

    The gradients are made with the sum, so that what is kept for backward is as large as hidden,
    and as the weight where it is trained. To be differentiated once.

    Args:
        hidden: ``[T, D]``.
        weight: ``[V, D]`` of hidden's dtype, or of autocast's.
        bias: ``[V]`` or None.
        targets: ``[T]`` int64; ``ignored`` ones count nothing.
        ignored: the label that is passed over.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    found: Tensor = _Chunked.apply(hidden, weight, bias, targets, ignored)
    return found


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, ignored: int
    ) -> Tensor:
        wide = torch.promote_types(hidden.dtype, torch.float32)
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        total = torch.zeros((), dtype=wide, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_weight else None
        d_bias = torch.zeros(len(weight), dtype=wide, device=weight.device) if need_bias else None
        rows = max(1, _MOST // len(weight))
        with torch.autocast(hidden.device.type, enabled=False):
            for start in range(0, len(hidden), rows):
                chunk = slice(start, start + rows)
                logits = F.linear(hidden[chunk], weight, bias).to(wide)
                total += F.cross_entropy(
                    logits, targets[chunk], ignore_index=ignored, reduction="sum"
                )
                if not (need_hidden or need_weight or need_bias):
                    continue
                _to_gradient_(logits, targets[chunk], ignored)
                d_logits = logits.to(hidden.dtype)
                if d_hidden is not None:
                    torch.mm(d_logits, weight, out=d_hidden[chunk])
                if d_weight is not None:
                    d_weight += d_logits.t() @ hidden[chunk]
                if d_bias is not None:
                    d_bias += logits.sum(0)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.save_for_backward(d_hidden, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        of_hidden, of_weight = ctx.dtypes
        dtypes = of_hidden, of_weight, of_weight
        return (
            *(
                None if saved is None else (saved * d_total).to(dtype)
                for saved, dtype in zip(ctx.saved_tensors, dtypes, strict=True)
            ),
            None,
            None,
        )


def _to_gradient_(logits: Tensor, targets: Tensor, ignored: int) -> None:
    """Logits to the gradient of the summed cross entropy, in place: softmax less the target."""
    torch.softmax(logits, -1, out=logits)
    counted = targets != ignored
    rows = torch.arange(len(targets), device=targets.device)
    logits[rows, targets.where(counted, 0)] -= 1.0
    logits *= counted[:, None]
