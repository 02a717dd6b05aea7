"""Gated activations in plain torch: ``h = act(gate)·up`` and its backward, the twin of `gated`.

All of ``gate``, ``up``, ``h``, ``dh`` are ``[M, I]`` of one dtype. What is made on the way is
written over what is not read again, so that backward makes no matrix besides its operands.

Source: GLU variants, arXiv 2002.05202; SiLU and GELU, arXiv 1606.08415.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.compiler import is_compiling

ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
GATE_KERNELS = ("gate_forward", "gate_backward")  # of `gated`
_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh"}


def activate(gate: Tensor, activation: str) -> Tensor:
    """``act(gate)`` in gate's dtype, differentiable; ``activation`` is one of `ACTIVATIONS`."""
    if activation == "silu":
        return F.silu(gate)
    return F.gelu(gate, approximate=_APPROXIMATE[activation])


def slope_times(dact: Tensor, gate: Tensor, activation: str) -> Tensor:
    """``act'(gate)·dact`` in gate's dtype, differentiable."""
    if activation == "silu":
        share = gate.sigmoid()
        return dact * share * (1 + gate * (1 - share))
    return torch.ops.aten.gelu_backward(dact, gate, approximate=_APPROXIMATE[activation])


def gate_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """``h = act(gate)·up``, without a graph."""
    if is_compiling():
        return activate(gate, activation) * up
    return activate(gate, activation).mul_(up)


def gate_backward(
    dh: Tensor, act: Tensor, gate: Tensor, up: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """``dgate = dh·up·act'(gate)`` and ``dup = dh·act``, without a graph.

    ``act`` is `activate` of gate. dgate comes to lie where dh did, and dup where act did.
    """
    if is_compiling() or not (dh.is_cpu or dh.is_cuda):  # of others who knows what may be in place
        return slope_times(dh * up, gate, activation), dh * act
    dup = act.mul_(dh)
    dh.mul_(up)
    if activation == "silu":
        torch.ops.aten.silu_backward.grad_input(dh, gate, grad_input=dh)
    else:
        torch.ops.aten.gelu_backward.grad_input(
            dh, gate, approximate=_APPROXIMATE[activation], grad_input=dh
        )
    return dh, dup
