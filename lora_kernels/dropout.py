"""The keep mask of the LoRA branch's dropout.

It is drawn from torch's generator of the device, so `torch.manual_seed` fixes it and activation
checkpointing, which restores that generator, replays it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def draw_keep_mask(x: Tensor, dropout_p: float) -> Tensor:
    """Boolean of x's shape: true with probability ``1 - dropout_p``, independently per element."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout_p)


def apply_keep_mask(x: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """Inverted dropout with a given mask: ``x`` where kept, over ``1 - dropout_p``; else 0."""
    return torch.where(keep, x * (1.0 / (1.0 - dropout_p)), 0.0)
