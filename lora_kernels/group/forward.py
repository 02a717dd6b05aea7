"""Forward of a group by the kernels: ``xa`` of all members in one pass over x, then the products.

The products are one launch over all members (`group_gemm`, `group_hopper`), or cuBLAS's: one where
the weights lie one below the other in memory, else one a member. Narrow outputs take one kernel
for everything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..kernels import plans, tuning
from ..kernels.group_gemm import plan_group_gemm
from ..kernels.group_hopper import plan_group_hopper
from ..kernels.hopper import rows_suit_tma, suits_tma
from ..kernels.launching import Layout, layout_of, num_sms
from ..kernels.members import Tensors, alike, layout_of_stacked
from ..kernels.tuning import Config, Shape
from ..linear.xa import plan_xa
from . import reference
from .one_kernel import plan_group_one_kernel
from .packing import packed, stacked

# The ys, xa and the keep bits.
Found = tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Tensors,
    lora_bs: Tensors,
    biases: Tensors,
    scales: Sequence[float],
    seed: Tensor | None,
    dropout_p: float,
    capability: tuple[int, int],
    apart: bool = False,
) -> Found:
    """The ``ys``, ``xa`` and the keep bits, by the strategy that `tuning` gives for the group.

    x ``[M, K]`` and no dimension 0, up to `members.MOST` members; otherwise as `reference.forward`,
    with a seed for the mask. The ys are slices of one ``[M, ΣN]`` where one product made them, but
    not if they are to be ``apart``.
    """
    low = x.data_ptr()
    for weight in weights:
        low |= weight.data_ptr()
    together = packed(weights) if len(weights) > 1 and not apart else None
    settings = (
        tuple(scales),
        None if seed is None else dropout_p,
        capability,
        not low % 16,
        together is not None,
    )
    key = plans.key("group forward", (x, *weights, *lora_as, *lora_bs, *biases), settings)
    run = plans.find(key)
    if run is None:
        run = plans.keep(
            key,
            plan_forward(
                Layout.of(x),
                [Layout.of(weight) for weight in weights],
                [layout_of(lora_a) for lora_a in lora_as],
                [layout_of(lora_b) for lora_b in lora_bs],
                [layout_of(bias) for bias in biases],
                *settings,
            ),
        )
    found: Found = run(x, weights, together, lora_as, lora_bs, biases, seed)
    return found


def plan_forward(
    x: Layout,
    weights: Sequence[Layout],
    lora_as: Sequence[Layout | None],
    lora_bs: Sequence[Layout | None],
    biases: Sequence[Layout | None],
    scales: Sequence[float],
    dropout_p: float | None,
    capability: tuple[int, int],
    aligned: bool,
    together: bool,
) -> Callable[..., Found]:
    """`forward` for tensors of these layouts; called with x, the weights one by one and together,
    the A, the B, the biases and the seed.

    Args:
        dropout_p: None where nothing is dropped.
        aligned: whether the addresses of x and the weights are multiples of 16.
        together: whether the weights lie one below the other.
    """
    if all(lora_a is None for lora_a in lora_as):
        return _by_torch(scales, together)
    ns = [weight.shape[0] for weight in weights]
    ranks = [0 if lora_a is None else lora_a.shape[0] for lora_a in lora_as]
    (m, k), dtype = x.shape, x.dtype
    dropped, p = dropout_p is not None, dropout_p or 0.0
    # As of one output of all columns. Each takes up no more of the rank than its own.
    shape = Shape(m, sum(ns), k, max(ranks))
    name = tuning.strategy(
        "forward",
        capability,
        dtype,
        shape,
        dropped=dropped,
        tma=aligned
        and rows_suit_tma(x)
        and all(map(suits_tma, weights))
        and not any(n % 8 for n in ns),
        sms=num_sms(x),
        alike=alike(weights),
    )
    if name == "aten":
        return _by_torch(scales, together)

    def config(kernel: str, of: Shape = shape) -> Config:
        return tuning.lookup(kernel, capability, dtype.itemsize, of)

    factor = layout_of_stacked(lora_as)
    if name == "one_kernel":
        chosen = config("group_one_kernel")
        one = plan_group_one_kernel(x, weights, factor, lora_bs, biases, scales, dropped, p, chosen)
        return lambda x, weights, _, lora_as, lora_bs, biases, seed: one(
            x, weights, _stacked(lora_as), lora_bs, biases, seed
        )
    xa_of = plan_xa(x, factor, dropped, p, config("xa", shape._replace(r=sum(ranks))))
    xa = x.filled(m, sum(ranks))
    if name == "beta1":
        chosen = config("group_expand")
        ys_of = plan_group_gemm(None, weights, xa, lora_bs, biases, scales, chosen, together)
    elif name == "hopper":
        # A tile is of one member, and those are narrower than all together.
        chosen = config("group_y_hopper", shape._replace(n=max(ns)))
        ys_of = plan_group_hopper(x, weights, xa, lora_bs, biases, scales, chosen)
    else:
        chosen = config("group_y")
        ys_of = plan_group_gemm(x, weights, xa, lora_bs, biases, scales, chosen)

    def run(
        x: Tensor,
        weights: Sequence[Tensor],
        together: Tensor | None,
        lora_as: Tensors,
        lora_bs: Tensors,
        biases: Tensors,
        seed: Tensor | None,
    ) -> Found:
        xa, bits = xa_of(x, _stacked(lora_as), seed)
        if name != "beta1":
            return ys_of(x, weights, xa, lora_bs, biases), xa, bits
        ys = ys_of(None, weights, xa, lora_bs, biases)
        if together is not None:
            ys[0].as_strided((m, sum(ns)), (sum(ns), 1)).addmm_(x, together.t())
        else:
            for y, weight in zip(ys, weights, strict=True):
                y.addmm_(x, weight.t())
        return ys, xa, bits

    return run


def _by_torch(scales: Sequence[float], together: bool) -> Callable[..., Found]:
    """The products of the reference, or one for all weights where they lie so."""

    def run(
        x: Tensor,
        weights: Sequence[Tensor],
        together: Tensor | None,
        lora_as: Tensors,
        lora_bs: Tensors,
        biases: Tensors,
        seed: Tensor | None,
    ) -> Found:
        if together is None:
            ys, xa = reference.forward(x, weights, lora_as, lora_bs, biases, scales, None, 0.0)
            return ys, xa, None
        bias = None
        if any(one is not None for one in biases):
            rows = zip(biases, weights, strict=True)
            bias = torch.cat([x.new_zeros(len(w)) if one is None else one for one, w in rows])
        ys = F.linear(x, together, bias).split([len(weight) for weight in weights], 1)
        if all(lora_a is None for lora_a in lora_as):
            return ys, None, None
        xa = x.mm(_stacked(lora_as, x.dtype).t())
        spans = reference.rank_spans(lora_as)
        for y, lora_b, scale, span in zip(ys, lora_bs, scales, spans, strict=True):
            if span is not None and lora_b is not None:
                y.addmm_(xa[:, span], lora_b.to(x.dtype).t(), alpha=scale)
        return ys, xa, None

    return run


def _stacked(lora_as: Tensors, dtype: torch.dtype | None = None) -> Tensor:
    return stacked([lora_a for lora_a in lora_as if lora_a is not None], dtype)
