"""The MiniMind transformer, of every era, and nothing but the transformer.

Pre-norm blocks of grouped-query attention with rotary positions and a SwiGLU feed-forward layer or
a mixture of such layers; the input embedding also serves as the output head. The eras differ in
three details of the computation and in what they call the parts; modules are made under the names
of the configuration's era. Shapes: B sequences, S tokens, T tokens with the cached ones, D width,
V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_compiling
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import MoeCausalLMOutputWithPast

from .config import LMConfig
from .cross_entropy import chunked_cross_entropy, fits_whole, is_plain
from .layers import (
    INIT_STD,
    Attention,
    FeedForward,
    RMSNorm,
    Rotary,
    at_least_float32,
    attention_pattern,
    rotary_angles,
    values_are_cheap,
)
from .moe import MoEFeedForward, MoEGate

IGNORED_LABEL = -100
# What transformers' outputs call the cache: `past_key_values` before 5.24.
_CACHE_FIELD = (
    "cache" if "cache" in MoeCausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
)


class Block(GradientCheckpointingLayer):
    """One pre-norm transformer layer: attention, then feed-forward, each added to its input."""

    def __init__(self, config: LMConfig, layer_index: int) -> None:
        super().__init__()
        self.names = names = config.structure.names
        self.add_module(names.attention, Attention(config, layer_index))
        self.add_module(names.attention_norm, RMSNorm(config.dim, config.norm_eps))
        self.add_module(names.feed_forward_norm, RMSNorm(config.dim, config.norm_eps))
        feed_forward = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.add_module(names.feed_forward, feed_forward)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: Rotary, mask: Tensor | None, is_causal: bool, cache: Cache | None
    ) -> tuple[Tensor, Tensor | None]:
        """Map ``x [B, S, D]`` to the same shape, and give the balancing loss (or None)."""
        n = self.names
        attention, feed_forward = getattr(self, n.attention), getattr(self, n.feed_forward)
        h = getattr(self, n.attention_norm)(x)
        x = x + self.dropout(attention(h, rotary, mask, is_causal, cache))
        y = feed_forward(getattr(self, n.feed_forward_norm)(x))
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
    accepts_loss_kwargs = True  # num_items_in_batch
    _supports_sdpa = True
    _no_split_modules = ["Block"]
    _skip_keys_device_placement = ["past_key_values", "cache"]

    def __init__(self, config: LMConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # so that Trainer leaves first tokens out of its count
        self.names = names = config.structure.names
        self._input_embed_layer = names.path(names.embedding)
        self._tied_weights_keys = {f"{names.head}.weight": f"{names.path(names.embedding)}.weight"}
        body: nn.Module = self
        if names.body:
            body = nn.Module()
            self.add_module(names.body, body)
        body.add_module(names.embedding, nn.Embedding(config.vocab_size, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        body.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layers))
        body.norm = RMSNorm(config.dim, config.norm_eps)
        self.add_module(names.head, nn.Linear(config.dim, config.vocab_size, bias=False))
        if config.tie_word_embeddings:
            self.get_output_embeddings().weight = self.get_input_embeddings().weight
        self.post_init()

    @property
    def _body(self) -> Any:
        return getattr(self, self.names.body) if self.names.body else self

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer layers, wherever this era keeps them."""
        return self._body.layers

    def _init_weights(self, module: nn.Module) -> None:
        # Only through nn.init: transformers guards those functions against touching loaded weights.
        if isinstance(module, (nn.Linear, nn.Embedding, MoEGate)):
            nn.init.normal_(module.weight, std=getattr(module, "init_std", INIT_STD))
        elif isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)

    def _apply(self, fn: Any, recurse: bool = True) -> MiniMindLM:
        # `to_empty` and moves off the meta device make a new tensor for each module.
        head: Any = self.get_output_embeddings()
        tied = getattr(head, "weight", None) is self.get_input_embeddings().weight
        super()._apply(fn, recurse)
        if tied:
            head.weight = self.get_input_embeddings().weight
        return self

    def get_input_embeddings(self) -> nn.Module:
        return getattr(self._body, self.names.embedding)

    def set_input_embeddings(self, value: nn.Module) -> None:
        setattr(self._body, self.names.embedding, value)

    def get_output_embeddings(self) -> nn.Module:
        return getattr(self, self.names.head)

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        setattr(self, self.names.head, new_embeddings)

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
        cache: Cache | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model on one batch.

        Args:
            input_ids: ``[B, S]`` int64; or else ``inputs_embeds``, ``[B, S, D]``.
            attention_mask: ``[B, T]``, 0 at padding, or a ready ``[B, 1, S, T]`` mask (see
                :func:`attention_pattern`). Rows padded only on the right can do without.
            position_ids: ``[B, S]`` or ``[1, S]``; None counts the tokens that are not padding.
            past_key_values, cache: of the tokens before these, extended in place; one thing under
                the names that transformers gives it before and from 5.24.
            inputs_embeds: in place of ``input_ids``.
            labels: ``[B, S]``, aligned with the input (not shifted); -100 is ignored.
            loss_mask: ``[B, S]``, aligned with ``labels``; 1 where that token is to be learnt. The
                head, over a third of a small model's FLOPs, then runs only where the *next* token
                is to be learnt, and ``.logits`` is None.
            use_cache: make a cache where none is given. Off while checkpointing gradients.
            logits_to_keep: without ``labels``, the last so many positions (0: all), or an index.
            return_dict: False gives a tuple.
            num_items_in_batch: what ``loss`` divides the sum by in place of its own count of
                targets: transformers' Trainer counts those of all accumulated batches, so that
                each token weighs the same in a step.
            **kwargs: ignored.

        Returns:
            ``logits [B, S, V]``, ``past_key_values`` (``cache``), ``loss`` (mean cross entropy of
            the next token in float32; 0 if nothing is supervised) and ``aux_loss``, the sum of the
            layers' balancing losses: 0 for a dense model and in eval mode. ``loss`` does *not*
            contain ``aux_loss``; the training loop adds the two.

        Raises:
            ValueError: inputs missing, of the wrong shape, too long or outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass either input_ids or inputs_embeds, got both or neither")
        if input_ids is not None:
            self._check_ids(input_ids)
            inputs_embeds = self.get_input_embeddings()(input_ids)
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
        if cache is not None:
            if past_key_values is not None and past_key_values is not cache:
                raise ValueError("pass either past_key_values or cache, got two different ones")
            past_key_values = cache
        if self.training and any(block.gradient_checkpointing for block in self.blocks):
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
        for block in self.blocks:
            x, layer_aux_loss = block(x, rotary, mask, is_causal, past_key_values)
            aux_loss = aux_loss if layer_aux_loss is None else aux_loss + layer_aux_loss
        x = self._body.norm(x)
        head: Any = self.get_output_embeddings()
        logits, loss = None, None
        if labels is None:
            kept = logits_to_keep
            logits = head(x[:, slice(-kept, None) if isinstance(kept, int) else kept])
        elif loss_mask is None:
            logits = head(x)
            targets = labels[:, 1:].flatten()
            loss = _mean_cross_entropy(logits[:, :-1].flatten(0, 1), targets, num_items_in_batch)
        else:
            supervised = loss_mask[:, 1:].bool()
            hidden, targets = x[:, :-1][supervised], labels[:, 1:][supervised]
            if is_compiling() or not is_plain(head) or fits_whole(len(hidden), head.out_features):
                loss = _mean_cross_entropy(head(hidden), targets, num_items_in_batch)
            else:
                total = chunked_cross_entropy(
                    hidden, head.weight, head.bias, targets, IGNORED_LABEL
                )
                loss = _mean(total, targets, num_items_in_batch)
        cached: dict[str, Any] = {_CACHE_FIELD: past_key_values}
        result = MoeCausalLMOutputWithPast(loss=loss, aux_loss=aux_loss, logits=logits, **cached)
        as_dict = self.config.return_dict if return_dict is None else return_dict
        return result if as_dict else result.to_tuple()

    def _check_ids(self, input_ids: Tensor) -> None:
        if not values_are_cheap(input_ids) or not input_ids.numel():
            return
        lowest, highest = (int(end) for end in input_ids.aminmax())
        if lowest < 0 or highest >= self.config.vocab_size:
            raise ValueError(
                f"input_ids must lie between 0 and vocab_size - 1 = {self.config.vocab_size - 1}, "
                f"got {lowest} to {highest}; tokenise with the tokenizer of this model"
            )


def _mean_cross_entropy(
    logits: Tensor, targets: Tensor, count: int | Tensor | None = None
) -> Tensor:
    """The sum over the targets that are not ignored, in float32, by ``count`` or their number.

    0 with a graph where there is none.
    """
    logits = at_least_float32(logits)
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED_LABEL, reduction="sum")
    return _mean(total, targets, count)


def _mean(total: Tensor, targets: Tensor, count: int | Tensor | None) -> Tensor:
    if count is None:
        count = (targets != IGNORED_LABEL).sum()
    return total / torch.as_tensor(count, device=total.device).clamp(min=1)
