"""Gated activations as kernels, one pass each way; `activations` has their twin in torch.

Sums and products are taken in float32 and rounded once into the operands' dtype. Both are bound by
memory: what counts is that each matrix is read and written once, 16 bytes a thread at a time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plans
from .launching import Layout, Prepared, layout_of
from .tiles import TRITON_DTYPES, cast, ceil_div

# Eight elements a thread: 16 bytes of a 16-bit dtype.
BLOCK, WARPS = 1024, 4


@triton.jit
def _logistic(x):
    """``1 / (1 + exp(-x))`` and what it lacks of 1, by exponentials that do not overflow."""
    small = tl.exp(-tl.abs(x))
    larger, smaller = 1.0 / (1.0 + small), small / (1.0 + small)
    return tl.where(x < 0, smaller, larger), tl.where(x < 0, larger, smaller)


@triton.jit
def _act_and_slope(gate, ACT: tl.constexpr):
    """``act(gate)`` and ``act'(gate)`` in float32."""
    if ACT == "gelu":
        share = 0.5 * (1.0 + tl.erf(gate * 0.7071067811865476))
        slope = share + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    elif ACT == "gelu_tanh":
        # (1 + tanh u) / 2 is the logistic function of 2u.
        square = gate * gate
        share, rest = _logistic(1.5957691216057308 * gate * (1.0 + 0.044715 * square))
        inner = 1.5957691216057308 * (1.0 + 0.134145 * square)
        slope = share + gate * share * rest * inner
    else:
        share, rest = _logistic(gate)
        slope = share + gate * share * rest
    return gate * share, slope


@triton.jit
def _load_row(ptr, row, cols, stride, width):
    return tl.load(ptr + row * stride + cols, mask=cols < width, other=0.0).to(tl.float32)


@triton.jit
def gate_forward_kernel(
    gate_ptr,
    up_ptr,
    h_ptr,
    width,
    blocks,
    stride_gate,
    stride_up,
    stride_h,
    DTYPE: tl.constexpr,
    ACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = _load_row(gate_ptr, row, cols, stride_gate, width)
    up = _load_row(up_ptr, row, cols, stride_up, width)
    act, _ = _act_and_slope(gate, ACT)
    tl.store(h_ptr + row * stride_h + cols, cast(act * up, DTYPE), mask=cols < width)


@triton.jit
def gate_backward_kernel(
    dh_ptr,
    gate_ptr,
    up_ptr,
    h_ptr,
    dgate_ptr,
    dup_ptr,
    width,
    blocks,
    stride_dh,
    stride_gate,
    stride_up,
    stride_out,
    DTYPE: tl.constexpr,
    ACT: tl.constexpr,
    NEED_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < width
    dh = _load_row(dh_ptr, row, cols, stride_dh, width)
    gate = _load_row(gate_ptr, row, cols, stride_gate, width)
    up = _load_row(up_ptr, row, cols, stride_up, width)
    act, slope = _act_and_slope(gate, ACT)
    at = row * stride_out + cols
    if NEED_H:
        tl.store(h_ptr + at, cast(act * up, DTYPE), mask=mask)
    tl.store(dup_ptr + at, cast(dh * act, DTYPE), mask=mask)
    tl.store(dgate_ptr + row * stride_dh + cols, cast(dh * up * slope, DTYPE), mask=mask)


def gate_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``h = act(gate)·up``, contiguous; the operands' rows may be any distance apart.

    Args:
        gate, up: ``[M, I]`` of one dtype and not empty, neighbours in a row next to each other.
        activation: one of `activations.ACTIVATIONS`.
    """
    key = plans.key("gate_forward", (gate, up), activation)
    run = plans.find(key)
    if run is None:
        run = plans.keep(key, plan_gate_forward(layout_of(gate), layout_of(up), activation))
    return run(gate, up)


def plan_gate_forward(
    gate: Layout, up: Layout, activation: str
) -> Callable[[Tensor, Tensor], Tensor]:
    """`gate_forward` for tensors of these layouts."""
    h = gate.filled(*gate.shape)
    rows, width = _as_one_row(gate, up)
    launch = Prepared(
        gate_forward_kernel,
        rows * ceil_div(width, BLOCK),
        WARPS,
        1,
        {
            "width": width,
            "blocks": ceil_div(width, BLOCK),
            "stride_gate": gate.stride[0],
            "stride_up": up.stride[0],
            "stride_h": h.stride[0],
            "DTYPE": TRITON_DTYPES[gate.dtype],
            "ACT": activation,
            "BLOCK": BLOCK,
        },
    )

    def run(gate: Tensor, up: Tensor) -> Tensor:
        out = torch.empty(h.shape, dtype=h.dtype, device=h.device)
        launch(gate, up, out)
        return out

    return run


def gate_backward(
    dh: Tensor, gate: Tensor, up: Tensor, activation: str, need_h: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """``(h, dgate, dup)``; h is None where not needed, dgate lies where dh did.

    ``dgate = dh·up·act'(gate)``, ``dup = dh·act(gate)``; operands as in `gate_forward`.
    """
    key = plans.key("gate_backward", (dh, gate, up), (activation, need_h))
    run = plans.find(key)
    if run is None:
        layouts = layout_of(dh), layout_of(gate), layout_of(up)
        run = plans.keep(key, plan_gate_backward(*layouts, activation, need_h))
    return run(dh, gate, up)


def plan_gate_backward(
    dh: Layout, gate: Layout, up: Layout, activation: str, need_h: bool
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor | None, Tensor, Tensor]]:
    """`gate_backward` for tensors of these layouts."""
    out = gate.filled(*gate.shape)
    rows, width = _as_one_row(dh, gate, up)
    launch = Prepared(
        gate_backward_kernel,
        rows * ceil_div(width, BLOCK),
        WARPS,
        1,
        {
            "width": width,
            "blocks": ceil_div(width, BLOCK),
            "stride_dh": dh.stride[0],
            "stride_gate": gate.stride[0],
            "stride_up": up.stride[0],
            "stride_out": out.stride[0],
            "DTYPE": TRITON_DTYPES[gate.dtype],
            "ACT": activation,
            "NEED_H": need_h,
            "BLOCK": BLOCK,
        },
    )

    def run(dh: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
        dup = torch.empty(out.shape, dtype=out.dtype, device=out.device)
        h = torch.empty(out.shape, dtype=out.dtype, device=out.device) if need_h else None
        launch(dh, gate, up, h, dh, dup)
        return h, dh, dup

    return run


def _as_one_row(*matrices: Layout) -> tuple[int, int]:
    """``(rows, width)`` to walk: one long row where all are contiguous, which has but one end."""
    rows, width = matrices[0].shape
    if all(each.stride == (width, 1) for each in matrices):
        return 1, rows * width
    return rows, width
