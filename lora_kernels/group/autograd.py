"""`lora_linear_group`, and the autograd Function that joins a group's forward to its backward."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ..config import check_dropout
from ..dispatch import choose, is_named, multiplies_by_itself
from ..kernels.dropout import draw_keep_mask, draw_seed, unpack_bits
from ..linear.autograd import autocasts, check_operands, fits, is_looked_into, lora_linear
from ..linear.ops import watched
from . import ops, reference
from .reference import Factors, GroupGrads

# So many members one launch holds; the kernels get a larger group in pieces.
MOST_MEMBERS = 4
_WIDENED, _PLAIN = "widened", "plain"


def lora_linear_group(
    x: Tensor,
    weights: Sequence[Tensor],
    lora_as: Factors,
    lora_bs: Factors,
    biases: Factors | None = None,
    *,
    scales: Sequence[float] | float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
    shared_mask: bool = True,
) -> tuple[Tensor, ...]:
    """``y_i = x·W_iᵀ + scale_i·(drop(x)·A_iᵀ)·B_iᵀ + bias_i`` of linears that read the same x.

    What `lora_linear` gives for each, with one pass over x for all branches, one mask, and the sum
    of their dx made by the products themselves. Differentiable as `lora_linear` is.

    Args:
        x: input ``[..., K]``, floating point, any strides.
        weights: base weights ``[N_i, K]``, of x's dtype; at least one.
        lora_as: first factors ``[R_i, K]``, of any floating dtype, or None for a member without
            LoRA.
        lora_bs: second factors ``[N_i, R_i]``, likewise, None where A is.
        biases: ``[N_i]`` of x's dtype or None; or None for no bias at all.
        scales: factors on the branches, or one for all.
        dropout_p: probability in [0, 1) of dropping an element of the branches' input.
        training: dropout is applied only when true.
        shared_mask: draw one mask for all members. False draws one for each, as PEFT does; where
            something is dropped, the members are then computed one by one.

    Returns:
        ys ``[..., N_i]`` in x's dtype, or in autocast's under autocast. They may be column slices
        of one buffer: the last dimension is contiguous, rows may be further apart.

    Raises:
        TypeError, ValueError, RuntimeError: as `lora_linear`, naming the member; or the sequences
            differ in length.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """
    count = len(weights)
    members = _Members(
        tuple(weights),
        tuple(lora_as),
        tuple(lora_bs),
        (None,) * count if biases is None else tuple(biases),
        (float(scales),) * count if isinstance(scales, (int, float)) else tuple(map(float, scales)),
    )
    _check(x, members)
    check_dropout(dropout_p, "dropout_p")
    dropped = training and dropout_p != 0.0
    by_itself = any(multiplies_by_itself(type(weight)) for weight in members.weights)
    if by_itself or (dropped and not shared_mask):
        return tuple(_one(x, member, dropout_p, training) for member in zip(*members, strict=True))
    autocast = autocasts(x)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, members = x.to(dtype), members.to(dtype)
    else:
        _check_dtypes(x, members)
    path = _path_of(x, members)
    traced = is_compiling()
    if is_looked_into(traced) and not (path == "triton" and is_named()):
        path, traced = _PLAIN, False
    dims = x.dim()
    rows = x if dims == 2 else x[None] if dims == 1 else x.flatten(0, -2)
    noise = None
    if dropped and any(lora_a is not None for lora_a in members.lora_as):
        noise = draw_seed(x.device) if path == "triton" else draw_keep_mask(rows, dropout_p)
    ys: list[Tensor] = []
    with torch.autocast(x.device.type, enabled=False) if autocast else _NOTHING:
        most = MOST_MEMBERS if path == "triton" else count
        for start in range(0, count, most):
            piece = members.piece(start, start + most)
            settings = _Settings(len(piece.weights), piece.scales, dropout_p, path)
            ys += _call(settings, rows, noise, piece, traced)
    if dims == 2:
        return tuple(ys)
    # As `lora_linear` does it: to autograd no view, which in-place operations would mind.
    lead = x.shape[:-1]
    return tuple(
        torch.ops.aten._unsafe_view(y, (*lead, weight.shape[0]))
        for y, weight in zip(ys, members.weights, strict=True)
    )


class _Members(NamedTuple):
    """The tensors and scales of a group, of each kind one for every member."""

    weights: tuple[Tensor, ...]
    lora_as: tuple[Tensor | None, ...]
    lora_bs: tuple[Tensor | None, ...]
    biases: tuple[Tensor | None, ...]
    scales: tuple[float, ...]

    def to(self, dtype: torch.dtype) -> _Members:
        """The same with every tensor in ``dtype``."""
        kinds: Any = [tuple(None if t is None else t.to(dtype) for t in kind) for kind in self[:4]]
        return _Members(*kinds, self.scales)  # type: ignore[call-arg]

    def piece(self, start: int, stop: int) -> _Members:
        """The members from ``start`` to ``stop``."""
        kinds: Any = [kind[start:stop] for kind in self]
        return _Members(*kinds)


class _Settings(NamedTuple):
    """What the Function is told beside tensors."""

    members: int
    scales: tuple[float, ...]
    dropout_p: float
    path: str


_NOTHING = contextlib.nullcontext()


def _one(x: Tensor, member: tuple[Any, ...], dropout_p: float, training: bool) -> Tensor:
    """One member by itself."""
    weight, lora_a, lora_b, bias, scale = member
    if lora_a is None:
        return torch.nn.functional.linear(x, weight, bias)
    return lora_linear(
        x, weight, lora_a, lora_b, bias, scale=scale, dropout_p=dropout_p, training=training
    )


def _path_of(x: Tensor, members: _Members) -> str:
    """The one path for all: the kernels where they serve every member."""
    choices = [choose(x, *member[:4]) for member in zip(*members, strict=True)]
    if all(choice.backend == "triton" for choice in choices):
        return "triton"
    return _WIDENED if choices[0].widened else "reference"


def _call(
    settings: _Settings, x: Tensor, noise: Tensor | None, members: _Members, traced: bool
) -> Sequence[Tensor]:
    weights, lora_as, lora_bs, biases, scales = members
    if settings.path == _PLAIN:
        return reference.plain_forward(
            x, weights, lora_as, lora_bs, biases, scales, noise, settings.dropout_p
        )
    operands: Any = (settings, x, noise, *weights, *lora_as, *lora_bs, *biases)
    learns = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in operands[1:]
    )
    if (traced and learns) or _are_functorch_transforms_active():
        return _TracedGroup.apply(*operands)[: settings.members]
    if learns:
        return _Group.apply(*operands)[: settings.members]
    return _forward(*operands)[0]


def _apart(settings: _Settings, tensors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Weights, A's, B's and biases out of their row."""
    count = settings.members
    return [tuple(tensors[start : start + count]) for start in range(0, 4 * count, count)]


def _forward(
    settings: _Settings, x: Tensor, noise: Tensor | None, *tensors: Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor | None, Tensor | None]:
    """``(ys, xa, keep_bits)``; the noise as in `linear.autograd`."""
    count, scales, dropout_p, path = settings
    weights, lora_as, lora_bs, biases = _apart(settings, tensors)
    if path != "triton":
        forward = reference.widened_forward if path == _WIDENED else reference.forward
        return *forward(x, weights, lora_as, lora_bs, biases, scales, noise, dropout_p), None
    operands = x, weights, lora_as, lora_bs, biases, noise, scales, dropout_p
    if not (is_compiling() or watched(x, *tensors, noise)):
        return ops.forward(*operands)
    found = torch.ops.lora_kernels.group_forward(*operands)
    ys, rest = tuple(found[:count]), list(found[count:])
    xa = rest.pop(0) if any(lora_a is not None for lora_a in lora_as) else None
    return ys, xa, rest.pop(0) if rest else None


def _save(ctx: Any, inputs: tuple[Any, ...], xa: Tensor | None, bits: Tensor | None) -> bool:
    """Keep what backward will read, and no more; whether ``xa`` has to be an output.

    As in `linear.autograd`: it has to where a gradient of db flows on by it alone.
    """
    settings, x, noise, *tensors = inputs
    count = settings.members
    need_x, (need_weights, need_as, need_bs, _) = _asked(ctx, count)
    weights, lora_as, lora_bs, _ = _apart(settings, tensors)
    need_dxa = need_x or any(need_as)
    x_kept = any(need_as) or any(need_weights)
    mask = noise if bits is None else bits
    ctx.save_for_backward(
        x if x_kept else None,
        xa if any(need_bs) else None,
        mask if need_dxa else None,
        *(weights if need_x else [None] * count),
        *(lora_as if need_x else [None] * count),
        *(b if need_x or need_a else None for b, need_a in zip(lora_bs, need_as, strict=True)),
    )
    _note(ctx, settings, x, tensors)
    return xa is not None and any(need_bs) and need_dxa and not (x_kept and need_x)


def _note(ctx: Any, settings: _Settings, x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    ctx.settings = settings
    ctx.like = [
        None if t is None else (t.shape, t.dtype) for t in (x, *tensors[: 3 * settings.members])
    ]


def _asked(ctx: Any, count: int) -> tuple[bool, list[tuple[bool, ...]]]:
    """Which gradients: of x, and of the weights, A's, B's and biases."""
    _, need_x, _, *rest = ctx.needs_input_grad
    return need_x, [tuple(rest[i * count : (i + 1) * count]) for i in range(4)]


def _unpacked(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Any, ...]:
    """What `_save` kept, and the needs; tensors that hold nothing in the place of what it did not,
    which need only have a shape."""
    x, xa, mask, *tensors = ctx.saved_tensors  # once: checkpointing unpacks no more
    given = next(dy for dy in dys if dy is not None)
    x, *tensors = (
        tensor if tensor is not None or like is None else _shaped(given, *like)
        for tensor, like in zip((x, *tensors), ctx.like, strict=True)
    )
    needs = ops.unflat_needs(_needed(ctx), ctx.settings.members)
    return x, xa, mask, _apart(ctx.settings, tensors)[:3], needs


def _shaped(like: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    return like.new_empty((), dtype=dtype).expand(shape)


def _needed(ctx: Any) -> list[bool]:
    """Of x, weights, A's, B's and biases in a row."""
    return [ctx.needs_input_grad[1], *ctx.needs_input_grad[3:]]


def _backward(ctx: Any, dys: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """The gradients of `_forward`'s arguments, without a graph of their own."""
    given = next((dy for dy in dys if dy is not None), None)
    if given is None:
        return (None,) * (3 + 4 * ctx.settings.members)
    if autocasts(given):
        with torch.autocast(given.device.type, enabled=False):
            return _backward(ctx, dys)
    x, xa, keep, (weights, lora_as, lora_bs), needs = _unpacked(ctx, dys)
    count, scales, dropout_p, path = ctx.settings
    if path != "triton":
        backward = reference.widened_backward if path == _WIDENED else reference.backward
        grads = backward(dys, x, weights, lora_as, lora_bs, xa, scales, keep, dropout_p, needs)
        return _in_place(grads)
    operands = dys, x, weights, lora_as, lora_bs, xa, keep, scales, dropout_p
    if not (is_compiling() or watched(x, *dys, *weights, *lora_as, *lora_bs)):
        return _in_place(ops.backward(*operands, needs))
    asked = _needed(ctx)
    found = iter(torch.ops.lora_kernels.group_backward(*operands, asked))
    flat = [next(found) if is_there else None for is_there in ops.there(dys, asked, count)]
    return None, flat[0], None, *flat[1:]


def _backward_with_graph(
    ctx: Any, dys: Sequence[Tensor | None], d_xa: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same by products that torch differentiates, with ``d_xa`` for the output ``xa``."""
    given = next((dy for dy in (*dys, d_xa) if dy is not None), None)
    if given is None:
        return (None,) * (3 + 4 * ctx.settings.members)
    if autocasts(given):
        with torch.autocast(given.device.type, enabled=False):
            return _backward_with_graph(ctx, dys, d_xa)
    x, xa, keep, *tensors = ctx.saved_tensors
    count, scales, dropout_p, path = ctx.settings
    (of_x, dtype), *of_tensors = ctx.like
    if path == "triton" and keep is not None:
        keep = unpack_bits(keep, of_x[1])
    ranks = [None if like is None else like[0][0] for like in of_tensors[count : 2 * count]]
    weights, lora_as, lora_bs, _ = _apart(ctx.settings, tensors)
    grads = reference.backward_with_graph(
        dys,
        d_xa,
        x,
        weights,
        lora_as,
        lora_bs,
        xa,
        ranks,
        scales,
        keep,
        dropout_p,
        ops.unflat_needs(_needed(ctx), count),
        torch.float32 if path == _WIDENED else dtype,
    )
    dtypes = [None if like is None else like[1] for like in of_tensors]
    flat = zip(ops.flat(grads), [dtype, *dtypes, *[dtype] * count], strict=True)
    dx, *others = (grad if grad is None else grad.to(its) for grad, its in flat)
    return None, dx, None, *others


def _in_place(grads: GroupGrads) -> tuple[Tensor | None, ...]:
    """The gradients in the order of the Function's arguments."""
    dx, *others = ops.flat(grads)
    return None, dx, None, *others


class _Group(torch.autograd.Function):
    """`_forward` and `_backward` joined; gives the ys, and ``xa`` where `_save` says so."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        ys, xa, bits = _forward(*inputs)
        ctx.set_materialize_grads(False)
        also = (xa,) if _save(ctx, inputs, xa, bits) else ()
        # Slices of one buffer are to be tensors of their own: as views none could be written to.
        own = (torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y for y in ys)
        return *own, *also

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        count = ctx.settings.members
        dys, d_xa = dys[:count], dys[count] if len(dys) > count else None
        ctx.went_backward = True
        again = torch.is_grad_enabled() or d_xa is not None
        # Several dy in a batch come as one that hides it, and has no memory to read.
        batched = any(dy is not None and is_legacy_batchedtensor(dy) for dy in dys)
        if again or batched or _are_functorch_transforms_active():
            return _backward_with_graph(ctx, dys, d_xa)
        return _backward(ctx, dys)


def spent(y: Tensor) -> bool:
    """Whether a backward has gone through the call that made y, and freed what it kept."""
    node = y.grad_fn
    while node is not None and node.name() != "_GroupBackward":
        node = node.next_functions[0][0] if len(node.next_functions) == 1 else None
    return getattr(node, "went_backward", False)


class _TracedGroup(torch.autograd.Function):
    """The same for torch.compile, which wants what backward needs as outputs."""

    @staticmethod
    def forward(*inputs: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        ys, xa, bits = _forward(*inputs)
        return *ys, xa, bits

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        *_, xa, bits = output
        ctx.mark_non_differentiable(*(t for t in (xa, bits) if t is not None))
        settings, x, noise, *tensors = inputs
        # All are kept: the compiler drops what its graph does not read.
        mask = noise if bits is None else bits
        ctx.save_for_backward(x, xa, mask, *tensors[: 3 * settings.members])
        _note(ctx, settings, x, tensors)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, dys[: ctx.settings.members])


def _check(x: Tensor, members: _Members) -> None:
    """Raise where a member would be refused by `lora_linear`, or the members are not as many."""
    count = len(members.weights)
    if count == 0:
        raise ValueError("weights must hold at least one member, got none")
    for name, kind in zip(members._fields, members, strict=True):
        if len(kind) != count:
            raise ValueError(
                f"{name} must have one entry for each of the {count} weights, got {len(kind)}; "
                "write None for a member without it"
            )
    for index, (weight, lora_a, lora_b, bias, _) in enumerate(zip(*members, strict=True)):
        try:
            if (lora_a is None) != (lora_b is None):
                raise ValueError(
                    "lora_a and lora_b must both be given or both be None, got only one of them"
                )
            if lora_a is None or lora_b is None or not fits(x, weight, lora_a, lora_b, bias):
                check_operands(x, weight, lora_a, lora_b, bias)
        except (TypeError, ValueError) as error:
            raise type(error)(f"member {index} of the group: {error}") from None


def _check_dtypes(x: Tensor, members: _Members) -> None:
    for index, (weight, _, _, bias, _) in enumerate(zip(*members, strict=True)):
        if weight.dtype != x.dtype or (bias is not None and bias.dtype != x.dtype):
            raise TypeError(
                f"member {index} of the group: x, weight and bias must share a dtype, got "
                f"{x.dtype}, {weight.dtype} and {None if bias is None else bias.dtype}; cast "
                "them, or run under torch.autocast"
            )
