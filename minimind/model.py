"""The MiniMind transformer of 2025-02 and nothing but the transformer.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward layer or
a mixture of such layers; the input embedding also serves as the output head. Every projection is a
plain ``nn.Linear``, so LoRA can take the place of any. Shapes: B sequences, S tokens, T tokens with
the cached ones, D width, H query and G key heads, P rotary pairs a head, E experts, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .config import LMConfig

INIT_STD = 0.02
IGNORED_LABEL = -100
Rotary = tuple[Tensor, Tensor]


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` in float32, or in float64 if that is what it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _values_are_cheap(x: Tensor) -> bool:
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


def rotate_pairs(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each neighbouring pair ``(x[2p], x[2p+1])`` of ``x [B, S, heads, 2P]`` by its angle.

    Computed in float32, as a complex product with ``cos + i·sin``; the dtype of ``x`` comes back.
    """
    even, odd = at_least_float32(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return turned.flatten(-2).type_as(x)


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
        if _values_are_cheap(attention_mask) and bool(attention_mask.all()):
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
        self.groups = config.n_heads // config.n_kv_heads
        kv_dim = config.n_kv_heads * config.head_dim
        self.wq = nn.Linear(config.dim, config.dim, bias=False)
        self.wk = nn.Linear(config.dim, kv_dim, bias=False)
        self.wv = nn.Linear(config.dim, kv_dim, bias=False)
        self.wo = _linear_into_residual(config.dim, config)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, is_causal: bool, cache: Cache | None
    ) -> Tensor:
        """Map ``x [B, S, D]`` to the same shape, appending to ``cache`` where one is given."""
        q, k, v = (w(x).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        q, k = rotate_pairs(q, *rotary), rotate_pairs(k, *rotary)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # q [B, H, S, ·], k and v [B, G, S, ·]
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)
        # Repeated here rather than by `enable_gqa`, which shuts out the kernels that take a mask.
        if self.groups > 1:
            k, v = (t.repeat_interleave(self.groups, dim=1) for t in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)
        return self.wo(y.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    """SwiGLU, ``w2(silu(w1 x) · w3 x)`` (arXiv 2002.05202); ``[..., D]`` to ``[..., D]``."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.hidden_dim, bias=False)
        self.w2 = _linear_into_residual(config.hidden_dim, config)
        self.w3 = nn.Linear(config.dim, config.hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MoEGate(nn.Module):
    """Choose experts for each token and say how unevenly they are used."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.top_k, self.norm_topk_prob = config.num_experts_per_tok, config.norm_topk_prob
        self.alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Route ``x [B, S, D]``; while training, also say how unevenly.

        The balancing loss is ``alpha · E · Σ_e (share of assignments to e) · (mean score of e)``
        (Switch Transformer, arXiv 2101.03961, equation 4); with ``seq_aux`` per sequence and then
        averaged (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Padding counts as tokens do.

        Returns:
            Chosen experts ``[B, S, top_k]`` int64, their weights in the same shape in float32, and
            the loss (float32 scalar), None in eval mode or when ``alpha`` is 0.
        """
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would turn near-ties over
            logits = F.linear(at_least_float32(x), at_least_float32(self.weight))
        scores = logits.softmax(dim=-1)  # [B, S, E]
        weights, chosen = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.norm_topk_prob and self.top_k > 1:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if not self.training or self.alpha == 0:
            return chosen, weights, None
        n_experts, over = scores.shape[-1], (1,) if self.seq_aux else (0, 1)
        assigned = F.one_hot(chosen, n_experts).sum(dim=-2).type_as(scores)
        share = assigned.mean(dim=over) / self.top_k
        loss = self.alpha * n_experts * (share * scores.mean(dim=over)).sum(dim=-1).mean()
        return chosen, weights, loss


class MoEFeedForward(nn.Module):
    """A weighted sum of the experts that the gate chose, plus one that every token visits."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.gate = MoEGate(config)
        self.shared_experts = FeedForward(config) if config.n_shared_experts else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map ``x [B, S, D]`` to the same shape; also the balancing loss (or None)."""
        chosen, weights, aux_loss = self.gate(x)
        tokens, chosen, weights = x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            # An expert without tokens still runs, on no rows: its gradients are zeros, not None.
            # No token meets an expert twice, so the order of this sum is fixed on every device.
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            part = expert(tokens[rows]) * weights[rows, slots, None]
            y = y.index_add(0, rows, part.type_as(y))
        shared = 0.0 if self.shared_experts is None else self.shared_experts(x)
        return y.view_as(x) + shared, aux_loss


class Block(GradientCheckpointingLayer):
    """One pre-norm transformer layer: attention, then feed-forward, each added to its input."""

    def __init__(self, config: LMConfig, layer_index: int) -> None:
        super().__init__()
        self.attention = Attention(config, layer_index)
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.feed_forward = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, is_causal: bool, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``x [B, S, D]`` to the same shape, and give the balancing loss (or None)."""
        x = x + self.dropout(self.attention(self.attention_norm(x), rotary, mask, is_causal, cache))
        y = self.feed_forward(self.ffn_norm(x))
        y, aux_loss = y if isinstance(y, tuple) else (y, None)
        return x + self.dropout(y), aux_loss


class MiniMindLM(PreTrainedModel, GenerationMixin):
    """MiniMind as a causal language model that transformers can load, save and generate with.

    Weights start as normal noise of standard deviation 0.02, divided by ``sqrt(2 · n_layers)`` for
    the projections that write into the residual stream, as in GPT-2; norms start at 1.
    """

    config: LMConfig
    config_class = LMConfig
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False  # the loss here is a mean; Trainer must do its own accumulation
    _supports_sdpa = True
    _input_embed_layer = "tok_embeddings"
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}

    def __init__(self, config: LMConfig) -> None:
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output: nn.Module = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.output.weight = self.tok_embeddings.weight
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        # Only through nn.init: transformers guards those functions against touching loaded weights.
        if isinstance(module, (nn.Linear, nn.Embedding, MoEGate)):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", INIT_STD))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> MiniMindLM:
        # `to_empty` and moves off the meta device make a new tensor for each module.
        tied = getattr(self.output, "weight", None) is self.tok_embeddings.weight
        super()._apply(fn, recurse)
        if tied:
            self.output.weight = self.tok_embeddings.weight
        return self

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.output = new_embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model on one batch.

        Args:
            input_ids: ``[B, S]`` int64; or else ``inputs_embeds``, ``[B, S, D]``.
            attention_mask: ``[B, T]``, 0 at padding, or a ready ``[B, 1, S, T]`` mask (see
                :func:`attention_pattern`). Rows padded only on the right can do without.
            position_ids: ``[B, S]`` or ``[1, S]``; None counts the tokens that are not padding.
            past_key_values: cache of the tokens before these; it is extended in place.
            inputs_embeds: in place of ``input_ids``.
            labels: ``[B, S]``, aligned with the input (not shifted); -100 is ignored.
            loss_mask: ``[B, S]``, aligned with ``labels``; 1 where that token is to be learnt. The
                head, over a third of a small model's FLOPs, then runs only where the *next* token
                is to be learnt, and ``.logits`` is None.
            use_cache: make a cache where none is given. Off while checkpointing gradients.
            logits_to_keep: without ``labels``, the last so many positions (0: all), or an index.
            return_dict: False gives a tuple.
            **kwargs: ignored.

        Returns:
            ``logits [B, S, V]``, ``past_key_values``, ``loss`` (mean cross entropy of the next
            token in float32; 0 if nothing is supervised) and ``aux_loss``, the sum of the layers'
            balancing losses: 0 for a dense model and in eval mode. ``loss`` does *not* contain
            ``aux_loss``; the training loop adds the two.

        Raises:
            ValueError: inputs missing, of the wrong shape, too long or outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, got both or neither")
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.tok_embeddings(input_ids)
        assert inputs_embeds is not None
        length, device = inputs_embeds.shape[1], inputs_embeds.device
        for name, target in (("labels", labels), ("loss_mask", loss_mask)):
            if target is not None and target.shape != inputs_embeds.shape[:2]:
                raise ValueError(
                    f"{name} must have the input's shape {list(inputs_embeds.shape[:2])}, got "
                    f"{list(target.shape)}; align it with the input, unshifted"
                )
        if loss_mask is not None and labels is None:
            raise ValueError("loss_mask needs labels, got None; pass labels=input_ids")
        if self.training and any(block.gradient_checkpointing for block in self.layers):
            use_cache, past_key_values = False, None  # a replayed layer would fill the cache twice
            if not inputs_embeds.requires_grad:  # or reentrant checkpoints lose the gradient
                inputs_embeds = inputs_embeds.detach().requires_grad_()
        past_length = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_length + length > self.config.max_seq_len:
            raise ValueError(
                f"the sequence must have at most max_seq_len = {self.config.max_seq_len} tokens, "
                f"got {past_length + length}; shorten it or raise max_seq_len in the config"
            )
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            if attention_mask is not None and attention_mask.ndim == 2:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            else:
                position_ids = torch.arange(length, device=device)[None] + past_length
        rotary = rotary_angles(position_ids, self.config.head_dim, self.config.rope_theta)
        mask, is_causal = attention_pattern(attention_mask, length, past_length, device)
        x = self.dropout(inputs_embeds)
        aux_loss = torch.zeros((), device=device)
        for block in self.layers:
            x, layer_aux_loss = block(x, rotary, mask, is_causal, past_key_values)
            aux_loss = aux_loss if layer_aux_loss is None else aux_loss + layer_aux_loss
        x = self.norm(x)
        logits, loss = None, None
        if labels is None:
            kept = logits_to_keep
            logits = self.output(x[:, slice(-kept, None) if isinstance(kept, int) else kept])
        elif loss_mask is None:
            logits = self.output(x)
            loss = _mean_cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            supervised = loss_mask[:, 1:].bool()
            scored = self.output(x[:, :-1][supervised])
            loss = _mean_cross_entropy(scored, labels[:, 1:][supervised])
        result = MoeCausalLMOutputWithPast(
            loss=loss, aux_loss=aux_loss, logits=logits, past_key_values=past_key_values
        )
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def _check_ids(self, input_ids: Tensor) -> None:
        if not _values_are_cheap(input_ids) or not input_ids.numel():
            return
        lowest, highest = (int(end) for end in input_ids.aminmax())
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"input_ids must lie between 0 and vocab_size - 1 = {self.config.vocab_size - 1}, "
                f"got {lowest} to {highest}; tokenise with the tokenizer of this model"
            )


def _mean_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean over the targets that are not ignored, in float32; 0 with a graph where none is."""
    logits = at_least_float32(logits)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return total / (targets != IGNORED_LABEL).sum().clamp(min=1)
