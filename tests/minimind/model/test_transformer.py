"""The transformer against written-out oracles and the original's logits."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torch.nn.functional as F
from places import GOLDEN
from safetensors.torch import load_file
from tiny_minimind import (
    assert_same_gradients,
    gradients,
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)
from torch import nn
from transformers import DynamicCache

from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_logits_and_loss_are_those_of_the_original(kind):
    config = json.loads((GOLDEN / f"minimind-2025-02-{kind}.config.json").read_text())
    expected = load_file(GOLDEN / f"minimind-2025-02-{kind}.expected.safetensors")
    model = MiniMindLM(LMConfig(**config)).eval()
    model.load_state_dict(load_file(GOLDEN / f"minimind-2025-02-{kind}.weights.safetensors"))
    with torch.no_grad():
        out = model(input_ids=expected["input_ids"], labels=expected["input_ids"])
    torch.testing.assert_close(out.logits, expected["logits"], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.loss[None], expected["next_token_loss"], atol=1e-5, rtol=0)


def test_size_and_square_linears_of_the_walk_through():
    model = MiniMindLM(LMConfig(n_layers=2))
    assert sum(p.numel() for p in model.parameters()) == 8_915_456
    square = [
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and module.in_features == module.out_features
    ]
    assert square == [f"layers.{n}.attention.{w}" for n in (0, 1) for w in ("wq", "wo")]


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_state_dict_has_the_names_of_2025_02_and_nothing_but_parameters(kind):
    model = tiny(use_moe=kind == "moe", hidden_dim=16)
    attention = {f"attention.{w}.weight" for w in ("wq", "wk", "wv", "wo")}
    norms = {"attention_norm.weight", "ffn_norm.weight"}
    swiglu = {f"{w}.weight" for w in ("w1", "w2", "w3")}
    if kind == "moe":
        inner = [f"experts.{e}." for e in range(4)] + ["shared_experts."]
        swiglu = {prefix + w for prefix in inner for w in swiglu} | {"gate.weight"}
    layer = attention | norms | {f"feed_forward.{w}" for w in swiglu}
    outside = {"tok_embeddings.weight", "norm.weight", "output.weight"}
    assert set(model.state_dict()) == outside | {f"layers.{n}.{w}" for n in (0, 1) for w in layer}
    assert not list(model.buffers())


def plain_logits(model, tokens):
    """The dense model for one sequence, written out in float64 with explicit loops over heads."""
    c, w = model.config, {name: t.double() for name, t in model.state_dict().items()}

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + c.norm_eps).sqrt() * w[name]

    def turned(x):  # [S, heads * width]
        x = torch.view_as_complex(x.view(len(tokens), -1, c.head_dim // 2, 2))
        p = torch.arange(c.head_dim // 2).double()
        angle = torch.arange(len(tokens))[:, None].double() * c.rope_theta ** (-2 * p / c.head_dim)
        turn = torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.view_as_real(x * turn).flatten(-2)

    x = w["tok_embeddings.weight"][tokens]
    for n in range(c.n_layers):
        at, ff = f"layers.{n}.attention.", f"layers.{n}.feed_forward."
        h = norm(x, f"layers.{n}.attention_norm.weight")
        q, k = turned(h @ w[at + "wq.weight"].T), turned(h @ w[at + "wk.weight"].T)
        v = (h @ w[at + "wv.weight"].T).view(len(tokens), -1, c.head_dim)
        heads = []
        for head in range(c.n_heads):
            group = head * c.n_kv_heads // c.n_heads
            scores = q[:, head] @ k[:, group].T / math.sqrt(c.head_dim)
            scores = scores + torch.full_like(scores, -torch.inf).triu(1)
            heads.append(scores.softmax(-1) @ v[:, group])
        x = x + torch.cat(heads, -1) @ w[at + "wo.weight"].T
        h = norm(x, f"layers.{n}.ffn_norm.weight")
        gate = h @ w[ff + "w1.weight"].T
        x = x + (gate * gate.sigmoid() * (h @ w[ff + "w3.weight"].T)) @ w[ff + "w2.weight"].T
    return norm(x, "norm.weight") @ w["output.weight"].T


@pytest.mark.parametrize("n_kv_heads", [1, 2, 4])
def test_dense_model_equals_the_written_out_one(n_kv_heads):
    model, tokens = tiny(n_kv_heads=n_kv_heads), ids(2, 13)
    logits = model(input_ids=tokens).logits
    for row, sequence in zip(logits, tokens, strict=True):
        torch.testing.assert_close(
            row.double(), plain_logits(model, sequence), atol=2e-4, rtol=1e-4
        )


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_the_real_tokens(side, use_moe):
    model, tokens = tiny(use_moe=use_moe), ids(1, 9)
    alone = model(input_ids=tokens).logits[0]
    filler, kept = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
    parts = [(filler, filler), (tokens, kept)]
    parts = parts if side == "left" else parts[::-1]
    row, mask = (torch.cat(pieces, 1) for pieces in zip(*parts, strict=True))
    batch = torch.cat([row, ids(1, 13, seed=5)])
    logits = model(input_ids=batch, attention_mask=torch.cat([mask, torch.ones_like(mask)])).logits
    assert logits.isfinite().all()
    real = logits[0, 4:] if side == "left" else logits[0, :9]
    torch.testing.assert_close(real, alone, atol=1e-5, rtol=1e-4)
    other = model(input_ids=batch[1:]).logits[0]
    torch.testing.assert_close(logits[1], other, atol=1e-5, rtol=1e-4)


def test_a_row_of_nothing_but_padding_gives_no_nan_forward_or_backward():
    model = tiny().train()
    mask = torch.tensor([[0] * 5, [1] * 5])
    model(input_ids=ids(2, 5), attention_mask=mask, labels=ids(2, 5)).loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("chunks", [[1] * 10, [4, 6], [7, 1, 2]])
@pytest.mark.parametrize("masked", ["no mask", "all ones", "padded"])
@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_cache_gives_the_same_logits_as_no_cache(chunks, masked, name):
    model, tokens = tiny(), ids(2, 10)
    mask = torch.ones(2, 10, dtype=torch.long)
    if masked == "padded":
        mask[0, :3] = 0
    whole = model(input_ids=tokens, attention_mask=mask).logits
    cache, start, pieces = None, 0, []
    for size in chunks:
        out = model(
            input_ids=tokens[:, start : start + size],
            attention_mask=None if masked == "no mask" else mask[:, : start + size],
            use_cache=True,
            **{name: cache},
        )
        cache, start = out.past_key_values, start + size
        pieces.append(out.logits)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 10
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=1e-5, rtol=1e-4)


def test_a_cache_under_both_its_names_must_be_one():
    model = tiny()
    cache = DynamicCache(config=model.config)
    model(input_ids=ids(1, 3), past_key_values=cache, cache=cache)
    assert cache.get_seq_length() == 3
    with pytest.raises(ValueError, match="either past_key_values or cache"):
        model(input_ids=ids(1, 3), past_key_values=cache, cache=DynamicCache(config=model.config))


def test_ready_made_mask_keeps_packed_sequences_apart():
    model, first, second = tiny(), ids(1, 4), ids(1, 6, seed=2)
    owner = torch.tensor([0] * 4 + [1] * 6)
    mask = ((owner[:, None] == owner) & torch.ones(10, 10).tril().bool())[None, None]
    positions = torch.tensor([[*range(4), *range(6)]])
    packed = model(
        input_ids=torch.cat([first, second], 1), attention_mask=mask, position_ids=positions
    ).logits
    apart = torch.cat([model(input_ids=x).logits for x in (first, second)], 1)
    torch.testing.assert_close(packed, apart, atol=1e-5, rtol=1e-4)


def test_logits_to_keep():
    model, tokens = tiny(), ids(2, 7)
    whole = model(input_ids=tokens).logits
    torch.testing.assert_close(model(input_ids=tokens, logits_to_keep=2).logits, whole[:, -2:])
    picked = model(input_ids=tokens, logits_to_keep=torch.tensor([0, 5])).logits
    torch.testing.assert_close(picked, whole[:, [0, 5]])
    embedded = model(inputs_embeds=model.tok_embeddings(tokens), return_dict=False)
    assert isinstance(embedded, tuple) and torch.equal(embedded[1], whole)


@pytest.mark.parametrize("use_moe", [False, True])
def test_loss_mask_equals_masking_the_full_logits(use_moe):
    model, tokens = tiny(use_moe=use_moe).train(), ids(3, 11)
    mask = (torch.rand(3, 11, generator=torch.Generator().manual_seed(3)) < 0.4).long()
    mask[:, 0] = 1  # the first token has no predecessor: nothing may come of it
    out = model(input_ids=tokens, labels=tokens, loss_mask=mask)
    assert out.logits is None
    out.loss.backward()
    ours = gradients(model)
    model.zero_grad()
    logits = model(input_ids=tokens).logits
    each = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    loss = (each * mask[:, 1:].flatten()).sum() / mask[:, 1:].sum()
    loss.backward()
    torch.testing.assert_close(out.loss, loss)
    assert_same_gradients(ours, gradients(model), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("how", ["loss_mask", "labels"])
def test_nothing_supervised_is_a_zero_that_can_be_differentiated(how):
    model, tokens = tiny().train(), ids(2, 5)
    if how == "labels":
        out = model(input_ids=tokens, labels=torch.full_like(tokens, -100))
    else:
        out = model(input_ids=tokens, labels=tokens, loss_mask=torch.zeros_like(tokens))
    assert out.loss.item() == 0.0
    out.loss.backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_ignored_labels_and_shift():
    model, tokens = tiny(), ids(1, 6)
    labels = tokens.clone()
    labels[0, 2] = -100
    out = model(input_ids=tokens, labels=labels)
    logp = out.logits.log_softmax(-1)
    picked = [logp[0, t, tokens[0, t + 1]] for t in range(5) if t + 1 != 2]
    torch.testing.assert_close(out.loss, -torch.stack(picked).mean())
    assert out.logits.shape == (1, 6, 61)
