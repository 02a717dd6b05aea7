"""What a MiniMind model is: its sizes, its rotary base, its mixture of experts."""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig

from .eras import ERAS, USUAL_HEADS, Era

SCORING_FUNCTIONS = ("softmax",)
_USUAL: Any = object()  # where None already means something else


class LMConfig(PretrainedConfig):
    """The shape of a MiniMind; ``LMConfig()`` is the 26-million-parameter model of 2025-02.

    The argument names are those of that time, whatever the era. The names that transformers'
    generation and caches look up (``hidden_size``, ``num_hidden_layers``, ...) read and write the
    same values; they are not accepted as arguments, because they would bypass the checks made here.

    Args:
        era: ``"2025-02"``, ``"2025-04"`` or ``"2026-03"``: what the modules are called, which
            values turn together in the rotary embedding, and whether query and key heads have a
            norm (see `eras`). Arguments that are left out take the era's usual values,
            below in this order where they differ.
        dim: width of the residual stream; 512, 512, 768.
        n_layers: number of transformer blocks.
        n_heads: query heads.
        n_kv_heads: key and value heads, shared by groups of query heads (grouped-query attention,
            arXiv 2305.13245); 2, 2, 4. None means ``n_heads``.
        head_dim: width of a head, even; None means ``dim / n_heads``, which must be whole then.
        vocab_size: rows of the embedding table.
        hidden_dim: inner width of the feed-forward layers; None means ``dim * 8 / 3`` rounded up
            to a multiple of ``multiple_of``, which keeps three SwiGLU matrices at about the size of
            two plain ones (arXiv 2002.05202); in 2026-03 ``dim * π``.
        multiple_of: the rounding of a computed ``hidden_dim``.
        norm_eps: epsilon under the root of every RMSNorm; 1e-5, 1e-5, 1e-6.
        max_seq_len: the longest sequence, cache included, that the model accepts, in tokens;
            8192, 32768, 32768.
        rope_theta: base of the rotary frequencies.
        dropout: probability on the embedding and on both residual branches while training.
        use_moe: replace each feed-forward layer by a mixture of experts.
        num_experts_per_tok: routed experts that each token visits; 2, 2, 1.
        n_routed_experts: routed experts per layer.
        n_shared_experts: experts that every token visits, True for one, None for none; 1, 1,
            0. At most one in 2025-02, none in 2026-03.
        scoring_func: how router logits become scores; ``"softmax"`` is the only one.
        aux_loss_alpha: weight of the load-balancing loss, 0 switches it off; 0.1, 0.1, 5e-4.
        seq_aux: balance the load within each sequence (True) or over the whole batch; True, True,
            False.
        norm_topk_prob: rescale the chosen experts' scores to sum to 1; the score of a single one
            is left as it is before 2026-03.
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

    model_type = "minimind"
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
        dim: int | None = None,
        n_layers: int = 8,
        n_heads: int = USUAL_HEADS,
        n_kv_heads: int | None = _USUAL,
        vocab_size: int = 6400,
        hidden_dim: int | None = None,
        multiple_of: int = 64,
        norm_eps: float | None = None,
        max_seq_len: int | None = None,
        rope_theta: float = 1e6,
        dropout: float = 0.0,
        use_moe: bool = False,
        num_experts_per_tok: int | None = None,
        n_routed_experts: int = 4,
        n_shared_experts: int | bool | None = _USUAL,
        scoring_func: str = "softmax",
        aux_loss_alpha: float | None = None,
        seq_aux: bool | None = None,
        norm_topk_prob: bool = True,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        era: str = "2025-02",
        head_dim: int | None = None,
        **kwargs: Any,
    ) -> None:
        for other, ours in self.attribute_map.items():
            if other in kwargs:
                raise ValueError(
                    f"{other}: LMConfig calls this {ours!r}, got {other}={kwargs[other]!r}; "
                    f"pass {ours}={kwargs[other]!r} (a configuration written with {other} is "
                    "usually of a later MiniMind)"
                )
        if era not in ERAS:
            raise ValueError(f"era must be one of {', '.join(ERAS)}, got {era!r}")
        self.era = era
        usual = ERAS[era].usual

        def chosen(name: str, value: Any) -> Any:
            return usual[name] if value is None else value

        self.dim = _size("dim", chosen("dim", dim))
        self.n_layers = _size("n_layers", n_layers)
        self.n_heads = _size("n_heads", n_heads)
        n_kv_heads = usual["n_kv_heads"] if n_kv_heads is _USUAL else n_kv_heads
        self.n_kv_heads = self.n_heads if n_kv_heads is None else _size("n_kv_heads", n_kv_heads)
        self.vocab_size = _size("vocab_size", vocab_size)
        self.multiple_of = _size("multiple_of", multiple_of)
        if hidden_dim is None:
            hidden_dim = ERAS[era].inner_width(self.dim, self.multiple_of)
        self.hidden_dim = _size("hidden_dim", hidden_dim)
        self.norm_eps = chosen("norm_eps", norm_eps)
        self.max_seq_len = _size("max_seq_len", chosen("max_seq_len", max_seq_len))
        self.rope_theta = rope_theta
        self.dropout = dropout
        self.use_moe = bool(use_moe)
        self.num_experts_per_tok = _size(
            "num_experts_per_tok", chosen("num_experts_per_tok", num_experts_per_tok)
        )
        self.n_routed_experts = _size("n_routed_experts", n_routed_experts)
        if n_shared_experts is _USUAL:
            n_shared_experts = usual["n_shared_experts"]
        self.n_shared_experts = int(n_shared_experts or 0)
        self.scoring_func = scoring_func
        self.aux_loss_alpha = chosen("aux_loss_alpha", aux_loss_alpha)
        self.seq_aux = bool(chosen("seq_aux", seq_aux))
        self.norm_topk_prob = bool(norm_topk_prob)
        if head_dim is None and self.dim % self.n_heads:
            raise ValueError(
                f"dim must be divisible by n_heads, got dim={self.dim} and n_heads={self.n_heads}; "
                "choose n_heads among the divisors of dim"
            )
        self.head_dim = (
            self.dim // self.n_heads if head_dim is None else _size("head_dim", head_dim)
        )
        self._check_relations()
        kwargs.update(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
        )
        super().__init__(**kwargs)

    @property
    def structure(self) -> Era:
        """How the model of this era is built."""
        return ERAS[self.era]

    def _check_relations(self) -> None:
        if self.head_dim % 2:
            raise ValueError(
                f"head_dim (dim / n_heads) must be even, because rotary embeddings turn pairs, got "
                f"{self.head_dim}; choose another n_heads or head_dim"
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
        most = self.structure.most_shared
        if not 0 <= self.n_shared_experts <= (math.inf if most is None else most):
            wanted = {None: "at least 0", 0: "0", 1: "0 or 1"}[most]
            raise ValueError(
                f"n_shared_experts must be {wanted}, got {self.n_shared_experts}; the weights of "
                f"{self.era} have no room for others"
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
