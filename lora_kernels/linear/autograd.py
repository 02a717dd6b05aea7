"""The wiring: `lora_linear`, and the autograd Function that joins a forward to its backward."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..config import check_dropout
from ..dispatch import choose
from ..dropout import draw_keep_mask, draw_seed
from . import ops, reference  # noqa: F401  ops registers torch.ops.lora_kernels


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
    """``x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ + bias``, differentiable once in every tensor.

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
        RuntimeError: `use_backend` asked for what cannot serve this call, or on differentiating
            twice.

    Source: LoRA, arXiv 2106.09685, equation 3.
    """
    _check(x, weight, lora_a, lora_b, bias)
    check_dropout(dropout_p, "dropout_p")
    device_type = x.device.type
    if _autocasts(device_type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device_type)
        x, weight = x.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        # Kept wide, A and B would be rounded inside and their gradients widened: the same values.
        lora_a, lora_b = lora_a.to(dtype), lora_b.to(dtype)
    elif x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"x, weight and bias must share a dtype, got {x.dtype}, {weight.dtype} and "
            f"{None if bias is None else bias.dtype}; cast them, or run under torch.autocast"
        )
    backend = choose(x, weight, lora_a, lora_b, bias).backend
    rows = x if x.dim() == 2 else x[None] if x.dim() == 1 else x.flatten(0, -2)
    noise = None
    if training and dropout_p:
        noise = draw_seed(x.device) if backend == "triton" else draw_keep_mask(rows, dropout_p)
    plain = not (torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active())
    function = _PlainLoRALinear if plain else _LoRALinear
    y, _, _ = function.apply(
        rows, weight, lora_a, lora_b, bias, noise, float(scale), dropout_p, backend
    )
    if x.dim() == 2:
        return y
    # As nn.Linear does it: to autograd no view, which in-place operations and FSDP would mind.
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], weight.shape[0]))


def _autocasts(device_type: str) -> bool:
    # The meta device has no autocast and raises; torch.amp's own question breaks the graph on 2.11.
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def _no_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The dtypes are settled: autocast would change some of the products and not others."""
    if _autocasts(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


class _LoRALinear(torch.autograd.Function):
    """``(y, xa, keep_bits)``, of which y is differentiable.

    ``noise`` is what dropout draws from: for the reference the keep mask itself, for the kernels a
    seed, from which forward makes the packed bits. Without dropout it is None.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        lora_a: Tensor,
        lora_b: Tensor,
        bias: Tensor | None,
        noise: Tensor | None,
        scale: float,
        dropout_p: float,
        backend: str,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        with _no_autocast(x.device.type):
            if backend == "triton":
                return torch.ops.lora_kernels.forward(
                    x, weight, lora_a, lora_b, bias, noise, scale, dropout_p
                )
            y, xa = reference.forward(x, weight, lora_a, lora_b, bias, scale, noise, dropout_p)
            return y, xa, None

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        x, weight, lora_a, lora_b, _, noise, ctx.scale, ctx.dropout_p, ctx.backend = inputs
        _, xa, bits = output
        mask = noise
        if ctx.backend == "triton":
            mask = None if noise is None else bits
            ctx.mark_non_differentiable(xa, bits)
        else:
            ctx.mark_non_differentiable(xa)
        ctx.save_for_backward(x, weight, lora_a, lora_b, xa, mask)
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 9
        x, weight, lora_a, lora_b, xa, mask = ctx.saved_tensors
        needs = reference.Needs(*ctx.needs_input_grad[:5])
        saved = (dy, x, weight, lora_a, lora_b, xa)
        with _no_autocast(x.device.type):
            if ctx.backend == "triton":
                found = iter(
                    torch.ops.lora_kernels.backward(
                        *saved, mask, ctx.scale, ctx.dropout_p, list(needs)
                    )
                )
                grads = tuple(next(found) if needed else None for needed in needs)
            else:
                grads = reference.backward(*saved, ctx.scale, mask, ctx.dropout_p, needs)
        return (*grads, None, None, None, None)


class _PlainLoRALinear(torch.autograd.Function):
    """`_LoRALinear` outside of torch.func, where torch need not bind its signature in each call.

    That costs about 30 µs on a CPU of 2 cores, as much as the three products of a small layer.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        output = _LoRALinear.forward(*inputs)
        _LoRALinear.setup_context(ctx, inputs, output)
        return output

    backward = _LoRALinear.backward  # type: ignore[assignment]


_NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


def _check(x: Tensor, weight: Tensor, lora_a: Tensor, lora_b: Tensor, bias: Tensor | None) -> None:
    tensors = (x, weight, lora_a, lora_b, x if bias is None else bias)
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
    if lora_a.dim() != 2 or lora_a.shape[1] != k or lora_a.shape[0] < 1:
        raise ValueError(
            f"lora_a must be [R, {k}] with R at least 1, got shape {tuple(lora_a.shape)}"
        )
    rank = lora_a.shape[0]
    if lora_b.shape != (n, rank):
        raise ValueError(f"lora_b must be [{n}, {rank}], got shape {tuple(lora_b.shape)}")
    if bias is not None and bias.shape != (n,):
        raise ValueError(f"bias must be [{n}], got shape {tuple(bias.shape)}")
