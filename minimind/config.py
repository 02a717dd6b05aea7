"""What a MiniMind model is: its sizes, its rotary base, its mixture of experts."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

SCORING_FUNCTIONS = ("softmax",)


class LMConfig(PretrainedConfig):
    """The shape of a 2025-02 MiniMind; ``LMConfig()`` is the 26-million-parameter model.

    The argument names are those of that time. The names that transformers' generation and caches
    look up (``hidden_size``, ``num_hidden_layers``, ...) read and write the same values; they are
    not accepted as arguments, because they would bypass the checks made here.

    Args:
        dim: width of the residual stream.
        n_layers: number of transformer blocks.
        n_heads: query heads; ``dim / n_heads`` must be a whole, even number.
        n_kv_heads: key and value heads, shared by groups of query heads (grouped-query attention,
            arXiv 2305.13245); None means ``n_heads``.
        vocab_size: rows of the embedding table.
        hidden_dim: inner width of the feed-forward layers; None means ``dim * 8 / 3`` rounded up
            to a multiple of ``multiple_of``, which keeps three SwiGLU matrices at about the size of
            two plain ones (arXiv 2002.05202).
        multiple_of: the rounding of a computed ``hidden_dim``.
        norm_eps: epsilon under the root of every RMSNorm.
        max_seq_len: the longest sequence, cache included, that the model accepts, in tokens.
        rope_theta: base of the rotary frequencies.
        dropout: probability on the embedding and on both residual branches while training.
        use_moe: replace each feed-forward layer by a mixture of experts.
        num_experts_per_tok: routed experts that each token visits.
        n_routed_experts: routed experts per layer.
        n_shared_experts: 1 (or True) adds one expert that every token visits, 0 (or False) none.
        scoring_func: how router logits become scores; ``"softmax"`` is the only one.
        aux_loss_alpha: weight of the load-balancing loss; 0 switches it off.
        seq_aux: balance the load within each sequence (True) or over the whole batch.
        norm_topk_prob: rescale the chosen experts' scores to sum to 1.
        bos_token_id: id of ``<s>``.
        eos_token_id: id of ``</s>``, which ends generation.
        pad_token_id: id used to fill rows up.
        tie_word_embeddings: share one matrix between the embedding and the output head.
        **kwargs: kept as attributes, as transformers does; unknown ones (``flash_attn`` of old
            files, say) change nothing.

    Raises:
        ValueError: a value out of range; the text names the argument and the remedy.
        TypeError: a size that is not an integer.
    """

    model_type = "minimind-2025-02"
    attribute_map = {
        "hidden_size": "dim",
        "intermediate_size": "hidden_dim",
        "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads",
        "num_key_value_heads": "n_kv_heads",
        "max_position_embeddings": "max_seq_len",
        "rms_norm_eps": "norm_eps",
    }

    def __init__(
        self,
        dim: int = 512,
        n_layers: int = 8,
        n_heads: int = 8,
        n_kv_heads: int | None = 2,
        vocab_size: int = 6400,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        norm_eps: float = 1e-5,
        max_seq_len: int = 8192,
        rope_theta: float = 1e6,
        dropout: float = 0.0,
        use_moe: bool = False,
        num_experts_per_tok: int = 2,
        n_routed_experts: int = 4,
        n_shared_experts: int | bool | None = 1,
        scoring_func: str = "softmax",
        aux_loss_alpha: float = 0.1,
        seq_aux: bool = True,
        norm_topk_prob: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        for other, ours in self.attribute_map.items():
            if other in kwargs:
                raise ValueError(
                    f"{other}: LMConfig calls this {ours!r}, got {other}={kwargs[other]!r}; "
                    f"pass {ours}={kwargs[other]!r} (a configuration written with {other} is "
                    "usually of a later MiniMind)"
                )
        self.dim = _size("dim", dim)
        self.n_layers = _size("n_layers", n_layers)
        self.n_heads = _size("n_heads", n_heads)
        self.n_kv_heads = self.n_heads if n_kv_heads is None else _size("n_kv_heads", n_kv_heads)
        self.vocab_size = _size("vocab_size", vocab_size)
        self.multiple_of = _size("multiple_of", multiple_of)
        if hidden_dim is None:
            hidden_dim = -(-int(4 * dim * 2 / 3) // multiple_of) * multiple_of
        self.hidden_dim = _size("hidden_dim", hidden_dim)
        self.norm_eps = norm_eps
        self.max_seq_len = _size("max_seq_len", max_seq_len)
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.use_moe = bool(use_moe)
        self.num_experts_per_tok = _size("num_experts_per_tok", num_experts_per_tok)
        self.n_routed_experts = _size("n_routed_experts", n_routed_experts)
        self.n_shared_experts = int(n_shared_experts or 0)
        self.scoring_func = scoring_func
        self.aux_loss_alpha = aux_loss_alpha
        self.seq_aux = bool(seq_aux)
        self.norm_topk_prob = bool(norm_topk_prob)
        self._check_relations()
        kwargs.update(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
        )
        super().__init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.dim // self.n_heads

    def _check_relations(self) -> None:
        if self.dim % self.n_heads:
            raise ValueError(
                f"dim must be divisible by n_heads, got dim={self.dim} and n_heads={self.n_heads}; "
                "choose n_heads among the divisors of dim"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"dim / n_heads must be even, because rotary embeddings turn pairs, got "
                f"{self.dim} / {self.n_heads} = {self.head_dim}; choose another n_heads"
            )
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads must be divisible by n_kv_heads, got n_heads={self.n_heads} and "
                f"n_kv_heads={self.n_kv_heads}; choose n_kv_heads among the divisors of n_heads"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok must be at most n_routed_experts, got "
                f"{self.num_experts_per_tok} of {self.n_routed_experts}; lower the first or "
                "raise the second"
            )
        if self.n_shared_experts not in (0, 1):
            raise ValueError(
                f"n_shared_experts must be 0 or 1, got {self.n_shared_experts}; the weights of "
                "this era hold at most one shared expert"
            )
        if self.scoring_func not in SCORING_FUNCTIONS:
            raise ValueError(
                f"scoring_func must be one of {', '.join(SCORING_FUNCTIONS)}, got "
                f"{self.scoring_func!r}; use 'softmax'"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"dropout must be at least 0 and below 1, got {self.dropout}; 0 switches it off"
            )
        if not self.aux_loss_alpha >= 0.0:
            raise ValueError(
                f"aux_loss_alpha must be at least 0, got {self.aux_loss_alpha}; 0 switches it off"
            )
        for name in ("norm_eps", "rope_theta"):
            if not getattr(self, name) > 0.0:
                raise ValueError(
                    f"{name} must be above 0, got {getattr(self, name)}; leave it out for the usual"
                )


def _size(name: str, value: Any) -> int:
    """Return ``value`` if it is an integer of at least 1, else raise naming the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}; write it as a whole number")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}; leave it out for the usual")
    return value
