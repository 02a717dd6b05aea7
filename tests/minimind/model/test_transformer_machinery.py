"""MiniMind in transformers' and torch's machinery, its configuration, and what users get wrong."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from tiny_minimind import (
    SIZES,
    assert_same_gradients,
    gradients,
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)

from lora_kernels import apply_lora, lora_parameters, mark_only_lora_as_trainable
from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_checkpointing_gives_identical_gradients(use_moe, reentrant, frozen):
    model, tokens = tiny(use_moe=use_moe, dropout=0.1).train(), ids(2, 8)
    if frozen:
        model.requires_grad_(False)
        model.layers[1].attention.wq.requires_grad_(True)
    calls = []
    model.layers[0].ffn_norm.register_forward_hook(lambda *_: calls.append(1))

    def step():
        torch.manual_seed(7)
        model.zero_grad()
        calls.clear()
        out = model(input_ids=tokens, labels=tokens, use_cache=True)
        (out.loss + out.aux_loss).backward()
        return out, gradients(model), len(calls)

    plain, expected, once = step()
    assert plain.past_key_values is not None and once == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 renames the call
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out, ours, calls_with = step()
    assert out.past_key_values is None
    assert calls_with == 2
    assert torch.equal(out.loss, plain.loss)
    assert_same_gradients(ours, expected, atol=0, rtol=0)


@pytest.mark.parametrize("use_moe", [False, True])
def test_generate_is_the_same_with_and_without_cache_and_with_left_padding(use_moe):
    model, short, long = tiny(use_moe=use_moe), ids(1, 4), ids(1, 7, seed=2)
    greedy = {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 0, "eos_token_id": None}
    expected = []
    for prompt in (short, long):
        tokens = prompt
        for _ in range(12):
            tokens = torch.cat([tokens, model(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
        expected.append(tokens[0, prompt.shape[1] :])
    batch = torch.cat([F.pad(short, (3, 0)), long])
    mask = (batch != 0).long()
    for use_cache in (True, False):
        out = model.generate(input_ids=batch, attention_mask=mask, use_cache=use_cache, **greedy)
        assert torch.equal(out[:, 7:], torch.stack(expected)), f"use_cache={use_cache}"


def test_generate_samples_and_stops_at_the_end_token():
    model, prompt = tiny(vocab_size=8), ids(1, 3, vocab=8)

    def sample(seed):
        torch.manual_seed(seed)
        mask = torch.ones_like(prompt)
        return model.generate(prompt, attention_mask=mask, do_sample=True, max_new_tokens=20)

    assert torch.equal(sample(0), sample(0))
    drawn = [sample(seed)[0] for seed in range(10)]
    assert len({tuple(row.tolist()) for row in drawn}) > 3
    stopped = [row for row in drawn if len(row) < 23]
    assert stopped and all(row[-1] == model.config.eos_token_id for row in stopped)


def test_head_and_embedding_stay_one_parameter():
    model = tiny()
    with torch.device("meta"):
        empty = MiniMindLM(LMConfig(**SIZES))
    for other in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16), empty):
        assert other.output.weight is other.tok_embeddings.weight
    filled = empty.to_empty(device="cpu")
    assert filled.output.weight is filled.tok_embeddings.weight
    assert copy.deepcopy(model).output.weight is not model.output.weight
    assert model.get_input_embeddings() is model.tok_embeddings
    assert model.get_output_embeddings() is model.output
    apart = tiny(tie_word_embeddings=False)
    assert apart.output.weight is not apart.tok_embeddings.weight


@pytest.mark.parametrize("use_moe", [False, True])
def test_initial_weights(use_moe):
    model = MiniMindLM(LMConfig(dim=128, n_layers=2, use_moe=use_moe))
    for name, p in model.named_parameters():
        if p.ndim == 1:
            assert torch.equal(p, torch.ones_like(p)), name
            continue
        std = 0.01 if name.endswith(("wo.weight", "w2.weight")) else 0.02
        assert abs(p.std().item() / std - 1) < 0.1, name
        assert abs(p.mean().item()) < 0.1 * std, name


def test_autocast_keeps_norms_router_and_loss_in_float32():
    model, tokens = tiny(use_moe=True).train(), ids(2, 8)
    seen = {}
    model.layers[0].feed_forward.gate.register_forward_hook(
        lambda module, args, out: seen.update(weights=out[1].dtype)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(input_ids=tokens, labels=tokens)
    assert out.logits.dtype == torch.bfloat16 and out.loss.dtype == torch.float32
    assert seen["weights"] == out.aux_loss.dtype == torch.float32
    (out.loss + out.aux_loss).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_dropout_acts_in_training_only():
    model, tokens = tiny(dropout=0.5), ids(1, 6)
    assert torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)
    model.train()
    assert not torch.equal(model(input_ids=tokens).logits, model(input_ids=tokens).logits)


def test_compiled_forward_gives_the_same_logits():
    model, tokens = tiny(), ids(2, 9)
    compiled = torch.compile(model, backend="eager")
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, :2] = 0
    for extra in ({}, {"attention_mask": mask}, {"labels": tokens}):
        ours = compiled(input_ids=tokens, **extra).logits
        torch.testing.assert_close(ours, model(input_ids=tokens, **extra).logits)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": torch.tensor([[1, 61]])}, r"vocab_size - 1 = 60, got 1 to 61"),
        ({"input_ids": torch.tensor([[-1, 3]])}, r"between 0 .* got -1 to 3"),
        ({"input_ids": ids(1, 49)}, "max_seq_len = 48 .* got 49"),
        ({"input_ids": ids(1, 4), "labels": ids(1, 5)}, r"labels .* \[1, 4\], got \[1, 5\]"),
        ({"input_ids": ids(1, 4), "loss_mask": ids(1, 4)}, "loss_mask needs labels"),
        (
            {"input_ids": ids(1, 4), "labels": ids(1, 4), "loss_mask": ids(1, 3)},
            r"loss_mask .* \[1, 4\], got \[1, 3\]",
        ),
        (
            {"input_ids": ids(1, 4), "attention_mask": torch.ones(1, 3)},
            r"attention_mask .* 0 \+ 4 .* \[1, 3\]",
        ),
    ],
)
def test_bad_input_is_named(arguments, words):
    with pytest.raises(ValueError, match=words):
        tiny()(**arguments)


def test_the_cache_counts_towards_the_longest_sequence():
    model = tiny()
    cache = model(input_ids=ids(1, 48), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="max_seq_len = 48 .* got 49"):
        model(input_ids=ids(1, 1), past_key_values=cache)


def test_nothing_is_kept_below_the_lowest_adapted_layer():
    """Backward stops there: what comes before needs no gradient, and keeps no activation."""
    model = tiny(n_layers=3)
    apply_lora(model, 2, target_modules=["layers.2.attention.wq"], verbose=False)
    mark_only_lora_as_trainable(model)
    kept: list[str] = []
    for index, block in enumerate(model.layers):
        block.register_forward_hook(
            lambda module, args, y, i=index: kept.append(f"{i}:{y[0].requires_grad}")
        )
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: saved.append((len(kept), t.numel())) or t, lambda t: t
    ):
        loss = model(ids(2, 9), labels=ids(2, 9)).loss
    assert kept == ["0:False", "1:False", "2:True"]
    assert saved and min(done for done, _ in saved) == 2  # none before the third layer
    loss.backward()
    assert all(p.grad is not None for p in lora_parameters(model))
