"""The mixture of experts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_minimind import (
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)

from minimind.model.moe import MoEFeedForward


def plain_mixture(layer, x):
    """Token by token: the mixture's output and its balancing loss, in the layer's dtype."""
    config_k, n = layer.gate.top_k, layer.gate.weight.shape[0]
    y, share, mean_score = torch.zeros_like(x), torch.zeros(len(x), n), torch.zeros(len(x), n)
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            score = (layer.gate.weight @ x[b, s]).softmax(-1)
            best = score.argsort(descending=True)[:config_k]
            total = score[best].sum() if layer.gate.normalises else 1.0
            for e in best:
                y[b, s] += score[e] / total * layer.experts[e](x[b, s])
                share[b, e] += 1 / (config_k * x.shape[1])
            if layer.shared_experts is not None:
                y[b, s] += layer.shared_experts(x[b, s])
            mean_score[b] = mean_score[b] + score / x.shape[1]
    if not layer.gate.seq_aux:
        share, mean_score = share.mean(0, keepdim=True), mean_score.mean(0, keepdim=True)
    return y, layer.gate.alpha * n * (share * mean_score).sum(-1).mean()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"seq_aux": False},
        {"norm_topk_prob": False},
        {"num_experts_per_tok": 1, "n_shared_experts": 0},
        {"n_routed_experts": 7, "num_experts_per_tok": 3, "aux_loss_alpha": 0.7},
    ],
    ids=["default", "token-aux", "raw-scores", "top1-no-shared", "top3-of-7"],
)
def test_mixture_equals_the_loop_over_tokens(changes):
    layer = tiny(use_moe=True, **changes).layers[0].feed_forward.train()
    assert isinstance(layer, MoEFeedForward)
    x = torch.randn(3, 9, 32)
    y, aux = layer(x)
    expected_y, expected_aux = plain_mixture(layer, x)
    torch.testing.assert_close(y, expected_y, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(aux, expected_aux, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(aux, layer.gate.weight)
    (expected,) = torch.autograd.grad(expected_aux, layer.gate.weight)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-4)
    assert torch.equal(layer.eval()(x)[0], y)  # one path: eval differs only in the loss
    assert layer(x)[1] is None


def test_aux_loss_is_the_layers_sum_while_training_and_zero_otherwise():
    model, seen = tiny(use_moe=True), []
    for block in model.layers:
        block.feed_forward.register_forward_hook(lambda *args: seen.append(args[2][1]))
    out = model.train()(input_ids=ids(2, 6), labels=ids(2, 6))
    torch.testing.assert_close(out.aux_loss, seen[0] + seen[1])
    assert out.aux_loss > 0.19  # 2 layers, alpha 0.1, at least about 1 each
    scores = out.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(out.loss, F.cross_entropy(scores, ids(2, 6)[:, 1:].flatten()))
    for other in (model.eval(), tiny().train()):
        aux = other(input_ids=ids(2, 6)).aux_loss
        assert isinstance(aux, torch.Tensor) and aux.item() == 0.0


def test_experts_without_tokens_get_zero_gradients():
    model = tiny(use_moe=True, n_routed_experts=8, num_experts_per_tok=1).train()
    model(input_ids=ids(1, 2), labels=ids(1, 2)).loss.backward()
    experts = model.layers[0].feed_forward.experts
    idle = [e for e in experts if e.w1.weight.grad is not None and not e.w1.weight.grad.any()]
    assert len(idle) >= 6 and all(p.grad is not None for p in model.parameters())
