"""The parts of a MiniMind layer: norm, rotary positions, attention and SwiGLU.

Every projection is a plain ``nn.Linear``, so LoRA can take the place of any. What a module calls
its children is the era's matter (`eras`), so that weights and adapters of each era fit as
they are. Shapes: B sequences, S tokens, T tokens with the cached ones, D width, H query and G key
heads, P rotary pairs a head.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import Cache

from .config import LMConfig

INIT_STD = 0.02
Rotary = tuple[Tensor, Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def values_are_cheap(x: Tensor) -> bool:
    """Whether looking at values neither makes the host wait nor breaks a compiled graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _linear_into_residual(in_features: int, config: LMConfig) -> nn.Linear:
    """A projection that adds to the residual stream, marked for its smaller initial noise."""
    linear = nn.Linear(in_features, config.dim, bias=False)
    linear.init_std = INIT_STD / math.sqrt(2 * config.n_layers)  # type: ignore[assignment]
    return linear


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x²) + eps) · weight``, the quotient in float32 (arXiv 1910.07467)."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        normed = F.rms_norm(at_least_float32(x), (x.shape[-1],), None, self.eps)
        return normed.type_as(x) * self.weight


def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> Rotary:
    """Cosine and sine of each position's angles (RoFormer, arXiv 2104.09864, equation 15).

    Pair p turns at ``theta ** (-2p / head_dim)`` per position. ``position_ids`` are integers
    ``[B, S]`` or ``[1, S]``; the results are float32 ``[B, S, 1, P]``, to broadcast over heads.
    """
    pairs = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    angles = position_ids[..., None, None].float() * (1.0 / theta ** (pairs / head_dim))
    return angles.cos(), angles.sin()


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = True) -> Tensor:
    """Turn each pair of ``x [B, S, heads, 2P]`` by its angle.

    Pair p is ``(x[2p], x[2p+1])`` if ``interleaved``, else ``(x[p], x[p+P])``. Computed in float32,
    as a complex product with ``cos + i·sin``; the dtype of ``x`` comes back.
    """
    wide = at_least_float32(x)
    real, imaginary = wide.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else wide.chunk(2, -1)
    turned = real * cos - imaginary * sin, real * sin + imaginary * cos
    joined = torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)
    return joined.type_as(x)


def attention_pattern(
    attention_mask: Tensor | None, length: int, past_length: int, device: torch.device
) -> tuple[Tensor | None, bool]:
    """Decide once per forward what each query may look at.

    ``attention_mask`` is None, ``[B, T]`` with 0 at padding on either side, or a ready
    ``[B, 1, S, T]`` that is used as it is (boolean: True where a query may look; floating: added to
    the scores). ``length`` is S; the cache holds ``past_length`` keys already. Returns
    ``(mask, is_causal)`` for ``scaled_dot_product_attention``, which is faster without a mask.

    Raises:
        ValueError: the mask does not cover the cached tokens and this call's.
    """
    if attention_mask is not None:
        if attention_mask.ndim == 4:
            return attention_mask, False
        if attention_mask.shape[-1] != past_length + length:
            raise ValueError(
                f"attention_mask must cover the cache and the input, {past_length} + {length} "
                f"tokens, got shape {list(attention_mask.shape)}; add a 1 for each new token"
            )
        if values_are_cheap(attention_mask) and bool(attention_mask.all()):
            attention_mask = None
    if attention_mask is None and (past_length == 0 or length == 1):
        return None, length > 1
    keys = torch.arange(past_length + length, device=device)
    queries = torch.arange(length, device=device)[:, None] + past_length
    allowed = keys <= queries
    if attention_mask is not None:
        # A token may always see itself: padding rows would be empty otherwise, and softmax over
        # nothing is NaN on some backends. Real tokens see themselves anyway.
        allowed = allowed & (attention_mask[:, None, None, :].bool() | (keys == queries))
    return allowed, False


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LMConfig, layer_index: int) -> None:
        super().__init__()
        self.layer_index, self.head_dim = layer_index, config.head_dim
        self.names, self.interleaved = config.structure.names, config.structure.interleaved
        self.groups = config.n_heads // config.n_kv_heads
        q_dim, kv_dim = (heads * config.head_dim for heads in (config.n_heads, config.n_kv_heads))
        self.add_module(self.names.q, nn.Linear(config.dim, q_dim, bias=False))
        self.add_module(self.names.k, nn.Linear(config.dim, kv_dim, bias=False))
        self.add_module(self.names.v, nn.Linear(config.dim, kv_dim, bias=False))
        self.add_module(self.names.o, _linear_into_residual(q_dim, config))
        if config.structure.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.norm_eps)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, is_causal: bool, cache: Cache | None
    ) -> Tensor:
        """Map ``x [B, S, D]`` to the same shape, appending to ``cache`` where one is given."""
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (-1, self.head_dim))
            for name in (self.names.q, self.names.k, self.names.v)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = (rotate_pairs(t, *rotary, self.interleaved) for t in (q, k))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # q [B, H, S, ·], k and v [B, G, S, ·]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        # Repeated here rather than by `enable_gqa`, which shuts out the kernels that take a mask.
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return getattr(self, self.names.o)(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU, ``down(silu(gate x) · up x)`` (arXiv 2002.05202); ``[..., D]`` to ``[..., D]``."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.names = config.structure.names
        self.add_module(self.names.gate, nn.Linear(config.dim, config.hidden_dim, bias=False))
        self.add_module(self.names.down, _linear_into_residual(config.hidden_dim, config))
        self.add_module(self.names.up, nn.Linear(config.dim, config.hidden_dim, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        gate, down, up = (
            getattr(self, name) for name in (self.names.gate, self.names.down, self.names.up)
        )
        return down(F.silu(gate(x)) * up(x))
