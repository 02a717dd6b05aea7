"""The wiring: `lora_linear`, and the autograd Function that joins a forward to its backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _are_functorch_transforms_active
from torch._C._functorch import is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.compiler import is_compiling

from ..config import check_dropout
from ..dispatch import choose, is_named, multiplies_by_itself
from ..kernels.dropout import draw_keep_mask, draw_seed, unpack_bits
from . import ops, reference
from .own_product import onto_own_product


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    dropout_p: float = 0.0,
    training: bool = False,
) -> Tensor:
    """``x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ + bias``, differentiable in every tensor.

    Where torch has to look into the products they are its own, whatever the backend: a backward
    of which a graph is asked for (``create_graph=True``), forward-mode differentiation, the
    transforms of ``torch.func`` (vmap among them) and ``torch.export``. A model that
    ``torch.compile`` has made can be differentiated once.

    A weight of another library's class, as torchao's quantised ones, is multiplied as its class
    says, see `onto_own_product`.

    Args:
        x: input ``[..., K]``, floating point, any strides.
        weight: base weight ``[N, K]``, of x's dtype.
        lora_a: first factor ``[R, K]``; x's dtype or another floating one, in which case the
            products are taken in x's dtype and the gradient comes back in the factor's.
        lora_b: second factor ``[N, R]``, likewise.
        bias: ``[N]`` of x's dtype, or None.
        scale: factor on the LoRA branch, usually `lora_scale`.
        dropout_p: probability in [0, 1) of dropping an element of the LoRA branch's input. The
            base product always sees the whole x. Drawn from torch's generator.
        training: dropout is applied only when true.

    Returns:
        y ``[..., N]``, contiguous, in x's dtype, or in autocast's dtype under autocast.

    Raises:
        TypeError: an argument is not a floating-point tensor, or the dtypes differ.
        ValueError: shapes or devices do not fit, or dropout_p is out of range.
        RuntimeError: `use_backend` asked for what cannot serve this call, or the weight's own
            product passes no gradient on.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """
    # Outside of compiled code this runs on the host in each call, often as the slowest part of it:
    # what is usual is settled by the cheapest question.
    if not fits(x, weight, lora_a, lora_b, bias):
        check_operands(x, weight, lora_a, lora_b, bias)
    if dropout_p != 0.0:
        check_dropout(dropout_p, "dropout_p")
    casting = autocasts(x)
    own = type(weight) not in _PLAIN_TYPES and multiplies_by_itself(type(weight))
    if own and casting:
        pass  # the product settles by itself what becomes of the dtypes
    elif casting and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        # Kept wide, A and B would be rounded inside and their gradients widened: the same values.
        lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"x, weight and bias must share a dtype, got {x.dtype}, {weight.dtype} and "
            f"{None if bias is None else bias.dtype}; cast them, or run under torch.autocast"
        )
    path, _, widened = choose(x, weight, lora_a, lora_b, bias)
    if own:
        dropped = dropout_p if training else 0.0
        return onto_own_product(x, weight, lora_a, lora_b, bias, scale, dropped)
    if widened:
        path = _WIDENED
    traced = is_compiling()
    if is_looked_into(traced) and not (path == "triton" and is_named()):
        path, traced = _PLAIN, False
    dims = x.dim()
    rows = x if dims == 2 else x[None] if dims == 1 else x.flatten(0, -2)
    noise = None
    if training and dropout_p:
        noise = draw_seed(x.device) if path == "triton" else draw_keep_mask(rows, dropout_p)
    operands = rows, weight, lora_a, lora_b, bias, noise, float(scale), dropout_p, path
    if casting:  # the dtypes are settled: it would change some of the products and not others
        with torch.autocast(x.device.type, enabled=False):
            y = _call(operands, traced)
    else:
        y = _call(operands, traced)
    if dims == 2:
        return y
    # As nn.Linear does it: to autograd no view, which in-place operations and FSDP would mind.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))


# Within `dispatch` no paths of their own: the reference with its products in float32, and the sum
# as torch differentiates, batches or exports it by itself.
_WIDENED, _PLAIN = "widened", "plain"
_PLAIN_TYPES = (Tensor, nn.Parameter)


def autocasts(tensor: Tensor) -> bool:
    if tensor.is_cpu:
        return torch.is_autocast_enabled("cpu")
    # The meta device has no autocast and raises; torch.amp's own question breaks the graph on 2.11.
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def is_looked_into(traced: bool) -> bool:
    """Whether somebody needs the products themselves, of which a Function would show none."""
    if traced:
        # Not `is_exporting()`, which torch 2.11 takes for true in every graph that it traces.
        return getattr(torch.compiler, "_is_exporting_flag", False)
    return forward_ad._current_level >= 0 or _are_functorch_transforms_active()


def _call(operands: tuple[Any, ...], traced: bool) -> Tensor:
    path = operands[-1]
    if path == _PLAIN:
        return reference.plain_forward(*operands[:-1])
    if traced or _are_functorch_transforms_active():
        return _TracedLoRALinear.apply(*operands)[0]
    if torch.is_grad_enabled():
        y = _LoRALinear.apply(*operands)
        return y[0] if type(y) is tuple else y
    return _forward(*operands)[0]


def _forward(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    noise: Tensor | None,
    scale: float,
    dropout_p: float,
    path: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, xa, keep_bits)``, the last where the kernels dropped something.

    ``noise`` is what dropout draws from: for the reference the keep mask itself, for the kernels a
    seed, from which they make the packed bits. Without dropout it is None.
    """
    if path == "triton":
        operands = x, weight, lora_a, lora_b, bias, noise
        seen = is_compiling() or ops.watched(*operands)
        call = torch.ops.lora_kernels.forward if seen else ops.forward
        y, xa, bits = call(*operands, scale, dropout_p)
        return y, xa, None if noise is None else bits
    forward = reference.widened_forward if path == _WIDENED else reference.forward
    y, xa = forward(x, weight, lora_a, lora_b, bias, scale, noise, dropout_p)
    return y, xa, None


def _save(ctx: Any, inputs: tuple[Any, ...], xa: Tensor, bits: Tensor | None) -> bool:
    """Keep what backward will read, and no more; whether ``xa`` has to be an output.

    It has to where a gradient of db flows on by it alone: where x or A is not kept, from which
    `reference.backward_with_graph` makes it anew.
    """
    x, weight, lora_a, lora_b, _, noise, *ctx.settings = inputs
    mask = noise if bits is None else bits
    need_x, need_weight, need_a, need_b, *_ = ctx.needs_input_grad
    if need_x and need_a and need_b:
        ctx.like = None
        ctx.save_for_backward(x, weight, lora_a, lora_b, xa, mask)
        return False
    ctx.like = tuple((t.shape, t.dtype) for t in (x, weight, lora_a, lora_b, xa))
    need_dxa = need_x or need_a
    x_kept = need_weight or need_a
    ctx.save_for_backward(
        x if x_kept else None,
        weight if need_x else None,
        lora_a if need_x else None,
        lora_b if need_dxa else None,
        xa if need_b else None,
        mask if need_dxa else None,
    )
    return need_b and need_dxa and not (x_kept and need_x)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of `_forward`'s arguments, without a graph of their own."""
    if autocasts(dy):
        with torch.autocast(dy.device.type, enabled=False):
            return _backward(ctx, dy)
    x, weight, lora_a, lora_b, xa, keep = ctx.saved_tensors  # once: checkpointing unpacks no more
    scale, dropout_p, path = ctx.settings
    needs = reference.Needs(*ctx.needs_input_grad[:5])
    if ctx.like is not None:  # what is not read need only have a shape
        x, weight, lora_a, lora_b, xa = (
            dy.new_empty((), dtype=dtype).expand(shape) if tensor is None else tensor
            for tensor, (shape, dtype) in zip(
                (x, weight, lora_a, lora_b, xa), ctx.like, strict=True
            )
        )
    operands = dy, x, weight, lora_a, lora_b, xa
    grads: tuple[Tensor | None, ...]
    if path == "triton" and not (is_compiling() or ops.watched(*operands)):
        grads = ops.backward(*operands, keep, scale, dropout_p, needs)
    elif path == "triton":
        found = iter(
            torch.ops.lora_kernels.backward(*operands, keep, scale, dropout_p, list(needs))
        )
        grads = tuple(next(found) if needed else None for needed in needs)
    else:
        backward = reference.widened_backward if path == _WIDENED else reference.backward
        grads = backward(*operands, scale, keep, dropout_p, needs)
    return (*grads, None, None, None, None)


def _backward_with_graph(
    ctx: Any, dy: Tensor | None, dxa: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The same by products that torch differentiates, with ``dxa`` for the output ``xa``."""
    given = dxa if dy is None else dy
    if given is None:
        return (None,) * 9
    if autocasts(given):
        with torch.autocast(given.device.type, enabled=False):
            return _backward_with_graph(ctx, dy, dxa)
    x, weight, lora_a, lora_b, xa, keep = ctx.saved_tensors
    scale, dropout_p, path = ctx.settings
    like = ctx.like or [(t.shape, t.dtype) for t in (x, weight, lora_a, lora_b)]
    if path == "triton" and keep is not None:
        keep = unpack_bits(keep, like[0][0][1])
    needs = reference.Needs(*ctx.needs_input_grad[:5])
    products = torch.float32 if path == _WIDENED else like[0][1]
    grads = reference.backward_with_graph(
        dy, dxa, x, weight, lora_a, lora_b, xa, scale, keep, dropout_p, needs, products
    )
    dtypes = [dtype for _, dtype in like[:4]] + [like[0][1]]
    cast = (g if g is None else g.to(dtype) for g, dtype in zip(grads, dtypes, strict=True))
    return (*cast, None, None, None, None)


class _LoRALinear(torch.autograd.Function):
    """`_forward` and `_backward` joined; gives y, and ``xa`` where `_save` says so."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Any:
        y, xa, bits = _forward(*inputs)
        if _save(ctx, inputs, xa, bits):
            ctx.set_materialize_grads(False)
            return y, xa
        return y

    @staticmethod
    def backward(ctx: Any, dy: Any, dxa: Any = None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        again = torch.is_grad_enabled() or dxa is not None or dy is None
        # Several dy in a batch come as one that hides it, and has no memory to read.
        if again or _are_functorch_transforms_active() or is_legacy_batchedtensor(dy):
            return _backward_with_graph(ctx, dy, dxa)
        return _backward(ctx, dy)


class _TracedLoRALinear(torch.autograd.Function):
    """The same for torch.compile, which wants what backward needs as outputs.

    For this form torch binds the signature in each call, 30 µs on a CPU of two cores.
    """

    forward = staticmethod(_forward)  # type: ignore[assignment]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        _, xa, bits = output
        ctx.mark_non_differentiable(*(t for t in (xa, bits) if t is not None))
        noise, *ctx.settings = inputs[5:]
        ctx.like = None  # all are kept: the compiler drops what its graph does not read
        ctx.save_for_backward(*inputs[:4], xa, noise if bits is None else bits)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        return (None,) * 9 if dy is None else _backward(ctx, dy)


_NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


def fits(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> bool:
    """Whether `check_operands` passes; it may say no to what does, never yes to what does not."""
    try:
        (n, k), (rank, k_of_a), dtype = weight.shape, lora_a.shape, x.dtype
        return (
            k == k_of_a == x.shape[-1]
            and rank > 0
            and lora_b.shape == (n, rank)
            and weight.dtype is dtype
            and dtype.is_floating_point
            and lora_a.dtype.is_floating_point
            and lora_b.dtype.is_floating_point
            and (
                (x.is_cpu and weight.is_cpu and lora_a.is_cpu and lora_b.is_cpu)
                or (x.device == weight.device == lora_a.device == lora_b.device)
            )
            and (
                bias is None
                or (bias.shape == (n,) and bias.dtype is dtype and bias.device == x.device)
            )
        )
    except (AttributeError, ValueError, IndexError):
        return False


def check_operands(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Raise what `lora_linear` raises for these; A and B may be None, both of them, for no LoRA."""
    bare = lora_a is None and lora_b is None
    tensors = (x, weight, x if bare else lora_a, x if bare else lora_b, x if bias is None else bias)
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            came = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise TypeError(f"{name} must be a floating-point tensor, got {came}")
        if tensor.device != x.device:
            raise ValueError(
                f"{name} is on {tensor.device} but x is on {x.device}; move them to one device"
            )
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {tuple(weight.shape)}")
    n, k = weight.shape
    if x.dim() < 1 or x.shape[-1] != k:
        raise ValueError(
            f"x must be [..., {k}] to fit weight [{n}, {k}], got shape {tuple(x.shape)}"
        )
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], got shape {tuple(bias.shape)}")
    if lora_a is None or lora_b is None:
        return
    if lora_a.dim() != 2 or lora_a.shape[1] != k or lora_a.shape[0] < 1:
        raise ValueError(
            f"lora_a must be [R, {k}] with R at least 1, got shape {tuple(lora_a.shape)}"
        )
    rank = lora_a.shape[0]
    if lora_b.shape != (n, rank):
        raise ValueError(f"lora_b must be [{n}, {rank}], got shape {tuple(lora_b.shape)}")
