"""The one-line statements that the package must equal, left to torch's own autograd."""

from __future__ import annotations

import torch


def lora_linear(x, weight, lora_a, lora_b, bias=None, *, scale=1.0, keep=None, dropout_p=0.0):
    """``x·Wᵀ + scale·(drop(x)·Aᵀ)·Bᵀ + bias`` with a given keep mask."""
    dropped = x if keep is None else x * keep / (1.0 - dropout_p)
    y = x @ weight.t() + scale * ((dropped @ lora_a.t()) @ lora_b.t())
    return y if bias is None else y + bias


def gradients(function, inputs, dy):
    """Gradients of ``(function(*inputs) * dy).sum()`` for the inputs that require one."""
    wanted = [t for t in inputs if isinstance(t, torch.Tensor) and t.requires_grad]
    return torch.autograd.grad(function(*inputs), wanted, dy)
