"""Backward by the kernels: what to compute of it, in what order, by which of them.

``dxa = scale·dy·B`` and ``db = scale·dyᵀ·xa`` come of one pass over dy, which also sums ``dbias``;
``da = dxaᵀ·drop(x)`` of one pass over x; ``dx = dy·W + mask⊙(dxa·A)`` is one product, forward's
sister in `gemm`. ``dW = dyᵀ·x``, asked for only where the base is trained too, is cuBLAS's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import plans, tuning
from ..kernels.gemm import plan_expand, plan_pointer_gemm
from ..kernels.hopper import plan_hopper_gemm, rows_suit_tma, suits_tma
from ..kernels.launching import Layout, layout_of, num_sms
from ..kernels.thin import plan_da, plan_db
from ..kernels.tiles import ceil_div
from ..kernels.tuning import Config, Shape
from . import reference
from .dxa_db import plan_dxa_db
from .reference import Grads, Needs

# Above this rank the passes for dxa, db and da are matrix products worth cuBLAS's while.
SKINNY_RANK = 128

_Lookup = Callable[..., Config]


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    xa: Tensor,
    scale: float,
    keep_bits: Tensor | None,
    dropout_p: float,
    needs: Needs,
    capability: tuple[int, int],
) -> Grads:
    """The gradients that ``needs`` asks for; as `reference.backward`, with packed keep bits.

    No dimension may be 0.
    """
    tensors = dy, x, weight, lora_a, lora_b, xa, keep_bits
    aligned = not (dy.data_ptr() | weight.data_ptr()) % 16
    settings = scale, dropout_p if keep_bits is not None else 0.0, needs, capability, aligned
    key = plans.key("backward", tensors, settings)
    run = plans.find(key)
    if run is None:
        layouts = (
            layout_of(dy),
            layout_of(x),
            layout_of(weight),
            layout_of(lora_a),
            layout_of(lora_b),
            layout_of(xa),
            layout_of(keep_bits),
        )
        run = plans.keep(key, plan_backward(*layouts, *settings))
    return run(*tensors)


def plan_backward(
    dy: Layout,
    x: Layout,
    weight: Layout,
    lora_a: Layout,
    lora_b: Layout,
    xa: Layout,
    keep_bits: Layout | None,
    scale: float,
    dropout_p: float,
    needs: Needs,
    capability: tuple[int, int],
    aligned: bool,
) -> Callable[..., Grads]:
    """`backward` for tensors of these layouts; called with them, keep bits last.

    ``aligned`` says whether the addresses of dy and weight are multiples of 16.
    """
    (m, n), (r, k), dtype = dy.shape, lora_a.shape, dy.dtype
    of_dx = Shape(m, k, n, r)
    name = tuning.strategy(
        "dx",
        capability,
        dtype,
        of_dx,
        dropped=keep_bits is not None,
        tma=aligned and rows_suit_tma(dy) and suits_tma(weight) and k % 8 == 0,
        sms=num_sms(x),
    )
    if name == "aten":
        return lambda dy, x, weight, lora_a, lora_b, xa, _: reference.backward(
            dy, x, weight, lora_a, lora_b, xa, scale, None, 0.0, needs
        )

    def config(kernel: str, of: Shape | None = None) -> Config:
        return tuning.lookup(kernel, capability, dtype.itemsize, of or Shape(m, n, k, r))

    need_dxa = needs.x or needs.lora_a
    from_dy = _plan_from_dy(dy, lora_b, xa, scale, need_dxa, needs, config)
    dxa, da_of, dx_of = dy.filled(m, r), None, None
    if needs.lora_a:
        da_of = _plan_da(dxa, x, lora_a, keep_bits, dropout_p, config)
    if needs.x:
        dx_of = _plan_dx(name, dy, weight, dxa, lora_a, keep_bits, dropout_p, of_dx, config)

    def run(
        dy: Tensor,
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        xa: Tensor,
        keep_bits: Tensor | None,
    ) -> Grads:
        dxa, db, dbias = from_dy(dy, lora_b, xa)
        da = dx = None
        if dxa is not None:
            da = None if da_of is None else da_of(dxa, x, keep_bits)
            dx = None if dx_of is None else dx_of(dy, weight, dxa, lora_a, keep_bits)
        return Grads(dx, dy.t() @ x if needs.weight else None, da, db, dbias)

    return run


def _plan_from_dy(
    dy: Layout,
    lora_b: Layout,
    xa: Layout,
    scale: float,
    need_dxa: bool,
    needs: Needs,
    config: _Lookup,
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor | None, Tensor | None]]:
    """``dxa``, ``db`` and ``dbias`` of dy, B and xa."""
    (m, n), r, dtype, wide = dy.shape, lora_b.shape[1], dy.dtype, lora_b.dtype
    if not (need_dxa or needs.lora_b) or r > SKINNY_RANK:

        def by_torch(dy: Tensor, lora_b: Tensor, xa: Tensor) -> Any:
            dxa = (dy @ lora_b.to(dtype)).mul_(scale) if need_dxa else None
            db = (dy.t() @ xa).mul_(scale).to(wide) if needs.lora_b else None
            return dxa, db, dy.sum(0, dtype=torch.float32).to(dtype) if needs.bias else None

        return by_torch
    chosen = config("dxa_db")
    apart = need_dxa and needs.lora_b and slabs_outweigh(m, n, r, chosen)
    together = needs.lora_b and not apart
    one_pass = plan_dxa_db(dy, lora_b, xa, scale, need_dxa, together, needs.bias, chosen)
    if not apart:
        return one_pass
    db_of = plan_db(dy, xa, scale, wide, config("da"))

    def in_two(dy: Tensor, lora_b: Tensor, xa: Tensor) -> Any:
        dxa, _, dbias = one_pass(dy, lora_b, xa)
        return dxa, db_of(dy, xa), dbias

    return in_two


def _plan_da(
    dxa: Layout,
    x: Layout,
    lora_a: Layout,
    keep_bits: Layout | None,
    dropout_p: float,
    config: _Lookup,
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """``da`` of dxa, x and the keep bits."""
    dtype = lora_a.dtype
    if dxa.shape[1] > SKINNY_RANK and keep_bits is None:
        return lambda dxa, x, _: (dxa.t() @ x).to(dtype)
    return plan_da(dxa, x, keep_bits is not None, dropout_p, dtype, config("da"))


def _plan_dx(
    name: str,
    dy: Layout,
    weight: Layout,
    dxa: Layout,
    lora_a: Layout,
    keep_bits: Layout | None,
    dropout_p: float,
    shape: Shape,
    config: _Lookup,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, Tensor | None], Tensor]:
    """``dx`` of dy, W, dxa, A and the keep bits."""
    if name == "beta1":
        of_rank = plan_expand(dxa, lora_a, None, keep_bits, 1.0, dropout_p, config("expand", shape))
        return lambda dy, weight, dxa, lora_a, bits: of_rank(dxa, lora_a, None, bits).addmm_(
            dy, weight
        )
    plan = plan_hopper_gemm if name == "hopper" else plan_pointer_gemm
    chosen = config("hopper" if name == "hopper" else "gemm", shape)
    gemm = plan(dy, weight, dxa, lora_a, None, keep_bits, 1.0, dropout_p, chosen)
    return lambda dy, weight, dxa, lora_a, bits: gemm(dy, weight, dxa, lora_a, None, bits)


def slabs_outweigh(m: int, n: int, r: int, config: Config) -> bool:
    """Whether db's partial sums would cost more than reading dy once more.

    They are written and read, ``8·M/block_m·N·R`` bytes of float32, beside dy's ``2·M·N``; small
    ones stay in the L2 cache and are free.
    """
    slabs = 4 * ceil_div(m, config.block_m) * n * r
    return 4 * r > config.block_m and slabs > 2**24
