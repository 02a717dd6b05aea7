"""`lora_feed_forward`, a whole gated feed-forward with LoRA on its projections, and its Function.

Three layers one after the other keep x, gate, act(gate), up and h for backward. Here gate and up
are kept alone; h is made anew from them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ..config import check_dropout
from ..dispatch import choose, is_named, multiplies_by_itself
from ..kernels.activations import ACTIVATIONS, activate
from ..kernels.dropout import draw_keep_mask, draw_seed, pack_bits, unpack_bits
from ..linear.autograd import autocasts, check_operands, fits, is_looked_into, lora_linear
from . import feed_forward_kernels as kernels
from . import feed_forward_reference as reference
from .feed_forward_reference import Masks, Piece, Projections, Settings, inner
from .ops import unflat_needs
from .reference import Factors, GroupNeeds, in_their_dtypes

_NAMES = ("gate", "up", "down")
_WIDENED, _PLAIN = "widened", "plain"
# Before the tensors, the Function has settings, x and what the two masks are made of.
_AHEAD = 4


def lora_feed_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors | None = None,
    *,
    scales: Sequence[float] | float = 1.0,
    activation: str = "silu",
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``down(act(gate(x))·up(x))``, each of the three as `lora_linear` has it.

    Of the width of the hidden layer only gate and up are kept for backward. Differentiable as
    `lora_linear` is. Each argument that comes in threes is in the order gate, up, down.

    Args:
        x: input ``[..., K]``, floating point, any strides.
        weights: ``[I, K]``, ``[I, K]`` and ``[N, I]``, of x's dtype.
        lora_as: ``[R, K]``, ``[R, K]`` and ``[R, I]``, of any rank and floating dtype each, or None
            for a projection without LoRA.
        lora_bs: ``[I, R]``, ``[I, R]`` and ``[N, R]``, likewise, None where A is.
        biases: of x's dtype or None; or None for no bias at all.
        scales: factors on the branches, or one for all.
        activation: ``"silu"``, ``"gelu"`` or ``"gelu_tanh"``, of gate.
        dropout_p: probability in [0, 1) of dropping an element of a branch's input. Gate and up
            share one mask over x; down has its own over the hidden layer.
        training: dropout is applied only when true.

    Returns:
        y ``[..., N]``, contiguous, in x's dtype, or in autocast's dtype under autocast.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`, naming the projection; or an unknown
            activation, or not three of something.

    Source: LoRA, arXiv 2106.09685; gated linear units, arXiv 2002.05202.
    """
    projections = Projections(
        tuple(weights),
        tuple(lora_as),
        tuple(lora_bs),
        (None,) * 3 if biases is None else tuple(biases),
    )
    scales = (scales,) * 3 if isinstance(scales, (int, float)) else tuple(scales)
    if activation not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {known}; got {activation!r}")
    check_dropout(dropout_p, "dropout_p")
    _check(x, projections, scales)
    scales = tuple(map(float, scales))
    dropped = dropout_p if training else 0.0
    if any(multiplies_by_itself(type(weight)) for weight in projections.weights):
        return _one_by_one(x, projections, scales, activation, dropped)
    autocast = autocasts(x)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, projections = x.to(dtype), projections.to(dtype)
    else:
        _check_dtypes(x, projections)
    settings = Settings(scales, dropped, activation, _path_of(x, projections))
    traced = is_compiling()
    if is_looked_into(traced) and not (settings.path == "triton" and is_named()):
        settings, traced = settings._replace(path=_PLAIN), False
    dims = x.dim()
    rows = x if dims == 2 else x[None] if dims == 1 else x.flatten(0, -2)
    noise = _noise(rows, projections, settings)
    with torch.autocast(x.device.type, enabled=False) if autocast else _NOTHING:
        y = _call(settings, rows, noise, projections, traced)
    if dims == 2:
        return y
    # As `lora_linear` does it: to autograd no view, which in-place operations would mind.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[1]))


_NOTHING = contextlib.nullcontext()


def _path_of(x: Tensor, projections: Projections) -> str:
    """The one path for all three: the kernels where they serve each."""
    choices = [choose(x, *member) for member in zip(*projections, strict=True)]
    if all(choice.backend == "triton" for choice in choices):
        return "triton"
    return _WIDENED if choices[0].widened else "reference"


def _noise(x: Tensor, projections: Projections, settings: Settings) -> Masks:
    """What dropout draws from, over x and over h: packed masks, seeds for the kernels, boolean
    masks where torch is to look into the products; None where nothing is dropped."""
    if not settings.dropout_p:
        return None, None
    with_lora = [lora_a is not None for lora_a in projections.lora_as]
    rows, hidden = x.shape[0], projections.weights[0].shape[0]
    found: list[Tensor | None] = []
    for wanted, width in ((any(with_lora[:2]), x.shape[1]), (with_lora[2], hidden)):
        if not wanted:
            found.append(None)
        elif settings.path == "triton":
            found.append(draw_seed(x.device))
        else:
            keep = draw_keep_mask(x.new_empty(()).expand(rows, width), settings.dropout_p)
            found.append(keep if settings.path == _PLAIN else pack_bits(keep))
    return found[0], found[1]


def _one_by_one(
    x: Tensor,
    projections: Projections,
    scales: tuple[float, ...],
    activation: str,
    dropout_p: float,
) -> Tensor:
    """With each projection by itself, for weights that know products of their own."""

    def project(x: Tensor, index: int) -> Tensor:
        weight, lora_a, lora_b, bias = (kind[index] for kind in projections)
        assert weight is not None
        if lora_a is None or lora_b is None:
            return F.linear(x, weight, bias)
        options: Any = {"scale": scales[index], "dropout_p": dropout_p, "training": True}
        return lora_linear(x, weight, lora_a, lora_b, bias, **options)

    return project(activate(project(x, 0), activation) * project(x, 1), 2)


def _call(
    settings: Settings,
    x: Tensor,
    noise: Masks,
    projections: Projections,
    traced: bool,
) -> Tensor:
    if settings.path == _PLAIN:
        return reference.plain_forward(x, projections, noise, settings)
    tensors = [t for kind in projections for t in kind]
    asked = any(t is not None and t.requires_grad for t in (x, *tensors))
    transformed = _are_functorch_transforms_active()
    if not transformed and not (asked and torch.is_grad_enabled()):
        return _forward(settings, x, noise, projections, keeps=False)[0]
    operands: Any = (settings, x, *noise, *tensors)
    if traced or transformed:
        return _TracedFeedForward.apply(*operands)[0]
    return _FeedForward.apply(*operands)


def _forward(
    settings: Settings,
    x: Tensor,
    noise: Masks,
    projections: Projections,
    keeps: bool,
) -> tuple[Tensor, list[Piece], Masks]:
    """``(y, pieces, bits)``."""
    if settings.path == "triton":
        return kernels.forward(x, projections, noise, settings)
    return *reference.forward(x, projections, noise, settings, keeps), noise


def _apart(tensors: Sequence[Any]) -> Projections:
    """The twelve tensors of the Function as projections."""
    return Projections(*(tuple(tensors[start : start + 3]) for start in range(0, 12, 3)))


def _needs(ctx: Any) -> GroupNeeds:
    asked = ctx.needs_input_grad
    return unflat_needs([asked[1], *asked[_AHEAD:]], 3)


def _save(
    ctx: Any,
    inputs: tuple[Any, ...],
    pieces: Sequence[Piece],
    bits: Masks,
) -> None:
    """Keep what backward, and a backward of which a graph is asked for, will read."""
    settings, x, _, _, *tensors = inputs
    ctx.settings, ctx.count = settings, len(pieces)
    needs = _needs(ctx)
    # Neither where the gradients of down's B and bias alone are asked for.
    whole = inner(needs) or needs.lora_as[2] or needs.weights[2]
    kept = [
        (
            piece.gate if whole else None,
            piece.up if whole else None,
            piece.xa if any(needs.lora_bs[:2]) else None,
            piece.ha if needs.lora_bs[2] else None,
        )
        for piece in pieces
    ]
    ctx.save_for_backward(x, *bits, *tensors, *(t for piece in kept for t in piece))


def _saved(ctx: Any) -> tuple[Any, ...]:
    """x, bits, projections and pieces."""
    x, *tensors = ctx.saved_tensors  # once: checkpointing unpacks no more
    pieces = [Piece(*tensors[14 + 4 * i : 18 + 4 * i]) for i in range(ctx.count)]
    return x, tuple(tensors[:2]), _apart(tensors[2:14]), pieces


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the Function's arguments, without a graph of their own."""
    if autocasts(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx, dy)
    x, bits, projections, pieces = _saved(ctx)
    by = kernels if ctx.settings.path == "triton" else reference
    grads = by.backward(dy, x, projections, pieces, bits, ctx.settings, _needs(ctx))
    return None, grads.dx, None, None, *(grad for kind in grads[1:] for grad in kind)


def _backward_with_graph(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The same by products that torch differentiates."""
    if autocasts(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _backward_with_graph(ctx, dy)
    x, bits, projections, _ = _saved(ctx)
    widths = x.shape[1], projections.weights[0].shape[0]
    keeps: Any = tuple(
        None if packed is None else unpack_bits(packed, width)
        for packed, width in zip(bits, widths, strict=True)
    )
    dtype = torch.float32 if ctx.settings.path == _WIDENED else x.dtype
    grads = reference.backward_with_graph(
        dy, x, projections, keeps, ctx.settings, _needs(ctx), dtype
    )
    dx, *kinds = in_their_dtypes(grads, x, *projections[:3])
    return None, dx, None, None, *(grad for kind in kinds for grad in kind)


class _FeedForward(torch.autograd.Function):
    """`_forward` and `_backward` joined; gives y."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        settings, x, x_noise, h_noise, *tensors = inputs
        y, pieces, bits = _forward(settings, x, (x_noise, h_noise), _apart(tensors), keeps=True)
        _save(ctx, inputs, pieces, bits)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # Several dy in a batch come as one that hides it, and has no memory to write to.
        batched = _are_functorch_transforms_active() or is_legacy_batchedtensor(dy)
        if batched or torch.is_grad_enabled():
            return _backward_with_graph(ctx, dy)
        return _backward(ctx, dy)


class _TracedFeedForward(torch.autograd.Function):
    """The same for torch.compile, which wants what backward needs as outputs."""

    @staticmethod
    def forward(  # type: ignore[override]
        settings: Settings,
        x: Tensor,
        x_noise: Tensor | None,
        h_noise: Tensor | None,
        *tensors: Tensor | None,
    ) -> tuple[Tensor | None, ...]:
        y, (piece,), bits = _forward(settings, x, (x_noise, h_noise), _apart(tensors), keeps=True)
        return y, *piece, *bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, *made = output
        ctx.mark_non_differentiable(*(t for t in made if t is not None))
        _save(ctx, inputs, [Piece(*made[:4])], tuple(made[4:]))
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return (None,) * (_AHEAD + 12) if dy is None else _backward(ctx, dy)


def _check(x: Tensor, projections: Projections, scales: tuple[Any, ...]) -> None:
    """Raise where there are not three of each, or a projection would be refused."""
    for name, kind in zip((*Projections._fields, "scales"), (*projections, scales), strict=True):
        if len(kind) != 3:
            raise ValueError(
                f"{name} must have three entries, for gate, up and down, got {len(kind)}; write "
                "None for a projection without it"
            )
    into = x
    for name, weight, lora_a, lora_b, bias in zip(_NAMES, *projections, strict=True):
        try:
            if (lora_a is None) != (lora_b is None):
                raise ValueError(
                    "lora_a and lora_b must both be given or both be None, got only one of them"
                )
            if lora_a is None or lora_b is None or not fits(into, weight, lora_a, lora_b, bias):
                check_operands(into, weight, lora_a, lora_b, bias)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{name}: {error}") from None
        if name == "up":
            hidden = projections.weights[0].shape[0]
            if weight.shape[0] != hidden:
                raise ValueError(
                    f"up: weight must be [{hidden}, {weight.shape[1]}] as gate's, got shape "
                    f"{tuple(weight.shape)}"
                )
            # Of the hidden layer's width, and of the projections' dtype and device.
            into = weight.new_empty(()).expand(hidden)


def _check_dtypes(x: Tensor, projections: Projections) -> None:
    for name, weight, _, _, bias in zip(_NAMES, *projections, strict=True):
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            raise TypeError(
                f"{name}: x, weight and bias must share a dtype, got {x.dtype}, {weight.dtype} and "
                f"{None if bias is None else bias.dtype}; cast them, or run under torch.autocast"
            )
