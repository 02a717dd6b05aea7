"""LMConfig: defaults, aliases, and what is refused."""

from __future__ import annotations

import pytest
from tiny_minimind import (
    SIZES,
    one_thread,  # noqa: F401 - acts by itself
)

from minimind.model.config import LMConfig


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dim": 0}, "dim must be at least 1, got 0"),
        ({"n_layers": -1}, "n_layers must be at least 1, got -1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"hidden_dim": 0}, "hidden_dim must be at least 1"),
        ({"multiple_of": 0}, "multiple_of must be at least 1"),
        ({"max_seq_len": 0}, "max_seq_len must be at least 1"),
        ({"dim": 30}, "dim must be divisible by n_heads, got dim=30 and n_heads=4"),
        ({"dim": 12}, "must be even"),
        ({"n_kv_heads": 3}, "n_heads must be divisible by n_kv_heads"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok must be at most n_routed_experts"),
        ({"n_shared_experts": 2}, "n_shared_experts must be 0 or 1, got 2"),
        ({"dropout": 1.0}, "dropout must be .* below 1, got 1.0"),
        ({"dropout": -0.1}, "dropout must be at least 0"),
        ({"scoring_func": "sigmoid"}, "scoring_func must be one of softmax, got 'sigmoid'"),
        ({"aux_loss_alpha": -1.0}, "aux_loss_alpha must be at least 0"),
        ({"norm_eps": 0.0}, "norm_eps must be above 0"),
        ({"hidden_size": 64}, "hidden_size: LMConfig calls this 'dim'"),
    ],
)
def test_bad_configuration_is_named(changes, words):
    with pytest.raises(ValueError, match=words):
        LMConfig(**{**SIZES, **changes})


def test_a_size_must_be_an_integer():
    with pytest.raises(TypeError, match="dim must be an integer, got 64.0"):
        LMConfig(dim=64.0)


def test_configuration_defaults_and_aliases():
    config = LMConfig(flash_attn=True, n_shared_experts=True)
    assert (config.hidden_dim, config.n_shared_experts, config.head_dim) == (1408, 1, 64)
    assert (config.hidden_size, config.num_hidden_layers) == (512, 8)
    assert (config.num_attention_heads, config.num_key_value_heads) == (8, 2)
    assert config.max_position_embeddings == 8192
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, 2, 0)
    assert LMConfig(dim=768).hidden_dim == 2048 and LMConfig(dim=64).hidden_dim == 192
    assert LMConfig(n_kv_heads=None).n_kv_heads == 8
