"""LoRA on groups of rows by torch's grouped products: no host waits for the offsets.

The contract of `reference`. What is beyond the last offset the products leave unwritten; it is
zeroed in what is returned, and read by nothing else.
"""

from __future__ import annotations

from torch import Tensor

from ..linear.reference import Grads, Needs, as_dtype, kept
from .products import group_of_rows, outer, padded, times
from .reference import in_their_dtypes


def forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    """``(y, xa)``; xa has its rank padded with zeros to a multiple of 16 bytes."""
    x = x.contiguous()
    dtype = x.dtype
    factor_a, factor_b = padded(as_dtype(lora_a, dtype), 1), padded(as_dtype(lora_b, dtype), 2)
    dropped = x if keep is None else kept(x, keep)
    xa = times(dropped, factor_a.mT, offsets)
    if keep is not None:
        xa.mul_(1.0 / (1.0 - dropout_p))
    y = times(x, as_dtype(weight, dtype).mT, offsets)
    y.add_(times(xa, factor_b.mT, offsets), alpha=scale)
    groups = group_of_rows(offsets, x.shape[0])
    if bias is not None:
        y.add_(as_dtype(bias, dtype)[groups.clamp(max=bias.shape[0] - 1)])
    return _without_beyond(y, groups, offsets), xa


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    xa: Tensor,
    keep: Tensor | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
) -> Grads:
    """The gradients that ``needs`` asks for; those of groups without rows are zero."""
    dy, dtype, rank = dy.contiguous(), dy.dtype, lora_a.shape[1]
    dx = dweight = da = db = dbias = None
    if needs.x or needs.lora_a:
        # Wherever dxa is used the mask follows, so the 1 / (1 - p) of both goes in here.
        undropped = scale if keep is None else scale / (1.0 - dropout_p)
        dxa = times(dy, padded(as_dtype(lora_b, dtype), 2), offsets).mul_(undropped)
    if needs.x:
        branch = times(dxa, padded(as_dtype(lora_a, dtype), 1), offsets)
        dx = times(dy, as_dtype(weight, dtype), offsets)
        dx.add_(branch if keep is None else kept(branch, keep))
        _without_beyond(dx, group_of_rows(offsets, dy.shape[0]), offsets)
    if needs.lora_a:
        rows = x if keep is None else kept(x, keep)
        da = outer(dxa, rows.contiguous(), offsets)[:, :rank].contiguous()
    if needs.lora_b:
        db = outer(dy, xa, offsets)[:, :, :rank].mul(scale)
    if needs.weight:
        dweight = outer(dy, x.contiguous(), offsets)
    if needs.bias:
        # A product with ones, summed in float32 as every product is, and in a fixed order.
        ones = dy.new_ones(dy.shape[0], 16 // dy.element_size())
        dbias = outer(ones, dy, offsets)[:, 0].contiguous()
    return in_their_dtypes(Grads(dx, dweight, da, db, dbias), weight, lora_a, lora_b)


def _without_beyond(tensor: Tensor, groups: Tensor, offsets: Tensor) -> Tensor:
    """Zero the rows that belong to no group, in place."""
    return tensor.masked_fill_((groups == offsets.shape[0])[:, None], 0.0)
