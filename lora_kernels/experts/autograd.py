"""`lora_grouped_linear`, and the autograd Function that joins its forward to its backward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ..config import check_dropout
from ..dispatch import choose, is_named, multiplies_by_itself
from ..kernels.dropout import draw_keep_mask
from ..linear.autograd import autocasts
from ..linear.reference import Needs
from . import ops, reference
from .ops import GROUPED, LOOP, WIDENED
from .products import serves


def lora_grouped_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``x·W_gᵀ + scale·(drop(x)·A_gᵀ)·B_gᵀ + bias_g`` for the rows of each group g.

    What `lora_linear` gives for each group by itself: the experts of a mixture, whose rows have
    been sorted by expert. Differentiable in every tensor as that is; no weight ``W + scale·B·A`` is
    made, and no gradient of a weight that is frozen. The gradients of a group without rows are
    zero.

    On a CPU the groups that have rows are taken one by one. On CUDA the products are torch's
    grouped ones throughout, and nobody waits for the offsets; float64 and features that are no
    multiple of 16 bytes are taken one by one there too, for which the host waits. There are no
    Triton kernels for this function yet.

    Args:
        x: input ``[M, K]``, floating point, any strides, its rows sorted by group.
        weight: base weights ``[G, N, K]`` of x's dtype, any strides: a transposed storage is
            passed as its transposed view.
        lora_a: first factors ``[G, R, K]``, of any floating dtype.
        lora_b: second factors ``[G, N, R]``, likewise.
        offsets: int32 ``[G]``: where the rows of each group end. A group may have none. Rows beyond
            the last offset belong to no group: y and their part of dx are zero. (torch's own
            grouped product leaves them unwritten.)
        bias: ``[G, N]`` of x's dtype, or None.
        scale: factor on the LoRA branch, usually `lora_scale`.
        dropout_p: probability in [0, 1) of dropping an element of the LoRA branch's input.
        training: dropout is applied only when true.

    Returns:
        y ``[M, N]``, contiguous, in x's dtype, or in autocast's dtype under autocast.

    Raises:
        TypeError: an argument is of another kind, or the dtypes differ.
        ValueError: shapes or devices do not fit, dropout_p is out of range, or, on a CPU, the
            offsets decrease or point beyond x. On CUDA nobody looks at their values.
        RuntimeError: `use_backend` asked for Triton.

    Source: LoRA, arXiv 2106.09685, equation 3, for each group.
    """
    _check(x, weight, lora_a, lora_b, offsets, bias)
    check_dropout(dropout_p, "dropout_p")
    casting = autocasts(x)
    if casting and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))  # the others follow, a group at a time
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"x, weight and bias must share a dtype, got {x.dtype}, {weight.dtype} and "
            f"{None if bias is None else bias.dtype}; cast them, or run under torch.autocast"
        )
    path = _path_of(x, weight)
    keep = draw_keep_mask(x, dropout_p) if training and dropout_p else None
    operands = x, weight, lora_a, lora_b, offsets, bias, keep, float(scale), dropout_p
    with torch.autocast(x.device.type, enabled=False) if casting else _NOTHING:
        if is_compiling():
            return _TracedGroupedLinear.apply(*operands, path)[0]  # type: ignore[no-any-return]
        if forward_ad._current_level >= 0 or _are_functorch_transforms_active():
            return reference.plain_forward(*operands)
        if torch.is_grad_enabled():
            return _GroupedLinear.apply(*operands, path)  # type: ignore[no-any-return]
        return ops.forward(*operands, path)[0]


_NOTHING = contextlib.nullcontext()


def _path_of(x: Tensor, weight: Tensor) -> str:
    choice = choose(x)
    if choice.backend == "triton" and is_named():
        raise RuntimeError(
            "use_backend('triton') was asked for, but lora_grouped_linear has no Triton kernels "
            "yet. Leave the `with`, or ask for 'reference'."
        )
    if x.is_cuda and serves(x, weight.shape[1]):
        return GROUPED
    return WIDENED if choice.widened else LOOP


def _save(ctx: Any, inputs: tuple[Any, ...], xa: Tensor) -> None:
    """Keep what backward, and a backward of which a graph is asked for, will read."""
    x, weight, lora_a, lora_b, offsets, _, keep, *ctx.settings = inputs
    need_x, need_weight, need_a, need_b, _, need_bias = ctx.needs_input_grad[:6]
    ctx.needs = Needs(need_x, need_weight, need_a, need_b, need_bias)
    reads_x = need_weight or need_a or need_b
    ctx.like = x.shape, x.dtype
    ctx.save_for_backward(
        x if reads_x else None,
        weight,
        lora_a,
        lora_b,
        offsets,
        xa if need_b else None,
        keep if reads_x or need_x else None,
    )


def _unpacked(ctx: Any, dy: Tensor) -> list[Any]:
    """What `_save` kept, with a tensor of its shape that holds nothing in x's or xa's place."""
    x, weight, lora_a, lora_b, offsets, xa, keep = ctx.saved_tensors
    shape, dtype = ctx.like
    if x is None:
        x = dy.new_empty((), dtype=dtype).expand(shape)
    if xa is None:
        xa = dy.new_empty(()).expand(shape[0], lora_a.shape[1])
    return [x, weight, lora_a, lora_b, offsets, xa, keep]


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the Function's arguments, without a graph of their own."""
    scale, dropout_p, path = ctx.settings
    with torch.autocast(dy.device.type, enabled=False) if autocasts(dy) else _NOTHING:
        grads = ops.backward(dy, *_unpacked(ctx, dy), scale, dropout_p, ctx.needs, path)
        return _in_place(ctx, grads)


def _backward_with_graph(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by products that torch differentiates."""
    x, weight, lora_a, lora_b, offsets, _, keep = _unpacked(ctx, dy)
    scale, dropout_p, path = ctx.settings
    with torch.autocast(dy.device.type, enabled=False) if autocasts(dy) else _NOTHING:
        grads = reference.backward_with_graph(
            dy,
            x,
            weight,
            lora_a,
            lora_b,
            offsets,
            keep,
            scale,
            dropout_p,
            ctx.needs,
            torch.float32 if path == WIDENED else x.dtype,
        )
        grads = reference.in_their_dtypes(grads, weight, lora_a, lora_b)
        return _in_place(ctx, grads)


def _in_place(ctx: Any, grads: Any) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the Function's arguments, in the dtypes of these."""
    dx, dweight, da, db, dbias = grads
    dtype = ctx.like[1]
    dx, dbias = (None if grad is None else grad.to(dtype) for grad in (dx, dbias))
    return dx, dweight, da, db, None, dbias, None, None, None, None


class _GroupedLinear(torch.autograd.Function):
    """`ops.forward` and `_backward` joined; gives y."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y, xa = ops.forward(*inputs)
        _save(ctx, inputs, xa)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        if torch.is_grad_enabled() or _are_functorch_transforms_active():
            return _backward_with_graph(ctx, dy)
        return _backward(ctx, dy)


class _TracedGroupedLinear(torch.autograd.Function):
    """The same for torch.compile, which wants what backward needs as outputs."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return ops.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.mark_non_differentiable(output[1])
        _save(ctx, inputs, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return (None,) * 10 if dy is None else _backward(ctx, dy)


_NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


def _check(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    offsets: Tensor,
    bias: Tensor | None,
) -> None:
    tensors = (x, weight, lora_a, lora_b, x if bias is None else bias)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {came}")
    if not isinstance(offsets, Tensor) or offsets.dtype != torch.int32:
        came = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        raise TypeError(
            f"offsets must be an int32 tensor of the groups' ends, got {came}; "
            "counts.cumsum(0, dtype=torch.int32) makes them"
        )
    for name, tensor in zip((*_NAMES, "offsets"), (*tensors, offsets), strict=True):
        if tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device} but x is on {x.device}; move them to one device"
            )
    if multiplies_by_itself(type(weight)):
        raise TypeError(
            f"weight is a {type(weight).__name__}, which multiplies by itself; the experts of a "
            "quantised model are not supported"
        )
    if weight.dim() != 3 or not weight.shape[0]:
        raise ValueError(
            f"weight must be [G, N, K] with G at least 1, got shape {tuple(weight.shape)}"
        )
    groups, n, k = weight.shape
    if x.dim() != 2 or x.shape[1] != k:
        raise ValueError(
            f"x must be [M, {k}] to fit weight [{groups}, {n}, {k}], got shape {tuple(x.shape)}; "
            "sort its rows by group"
        )
    if lora_a.dim() != 3 or lora_a.shape != (groups, lora_a.shape[1], k) or lora_a.shape[1] < 1:
        raise ValueError(
            f"lora_a must be [{groups}, R, {k}] with R at least 1, got shape {tuple(lora_a.shape)}"
        )
    rank = lora_a.shape[1]
    expected = {"lora_b": (groups, n, rank), "offsets": (groups,), "bias": (groups, n)}
    for (name, shape), found in zip(expected.items(), (lora_b, offsets, bias), strict=True):
        if found is not None and found.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(found.shape)}")
