"""The loss by chunks of tokens: the same value and gradients, and never all the logits."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_minimind import tiny
from torch.utils._python_dispatch import TorchDispatchMode

from minimind.model import cross_entropy as room
from minimind.model.cross_entropy import chunked_cross_entropy, fits_whole, is_plain


def make(tokens=7, width=5, vocabulary=11, dtype=torch.float64):
    targets = torch.randint(vocabulary, (tokens,))
    targets[2] = -100
    return (
        torch.randn(tokens, width, dtype=dtype, requires_grad=True),
        torch.randn(vocabulary, width, dtype=dtype, requires_grad=True),
        torch.randn(vocabulary, dtype=dtype, requires_grad=True),
        targets,
    )


def plainly(hidden, weight, bias, targets):
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.float(), targets, ignore_index=-100, reduction="sum")


@pytest.fixture(params=[1, 3, 7, 100])
def rows(request, monkeypatch):
    """So many tokens a chunk."""
    monkeypatch.setattr(room, "_MOST", 11 * request.param)
    return request.param


@pytest.mark.parametrize("trained", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_gradcheck(rows, trained):
    tensors = make()
    for i in range(3):
        tensors[i].requires_grad_(i in trained)
    assert torch.autograd.gradcheck(lambda *t: chunked_cross_entropy(*t, -100), tensors)
    found = torch.autograd.grad(
        3.0 * chunked_cross_entropy(*tensors, -100), [tensors[i] for i in trained]
    )
    logits = F.linear(*tensors[:3])
    total = F.cross_entropy(logits, tensors[3], ignore_index=-100, reduction="sum")
    for a, b in zip(
        found, torch.autograd.grad(3.0 * total, [tensors[i] for i in trained]), strict=True
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("casting", [False, True])
def test_as_plain_torch_in_every_dtype(rows, dtype, casting):
    tensors = make(dtype=dtype)
    grads, totals = [], []
    for function in (lambda *t: chunked_cross_entropy(*t, -100), plainly):
        with torch.autocast("cpu", torch.bfloat16, enabled=casting):
            total = function(*tensors)
        assert total.dtype == torch.float32
        totals.append(total.detach())
        grads.append(torch.autograd.grad(total, tensors[:3]))
    eps = torch.finfo(torch.bfloat16 if casting else dtype).eps
    assert (totals[0] - totals[1]).abs() < 4 * eps * totals[1]
    for ours, theirs in zip(*grads, strict=True):
        assert ours.dtype == theirs.dtype
        assert (ours.double() - theirs.double()).norm() < 8 * eps * theirs.double().norm()


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.most = max(self.most, out.numel())
        return out


def test_the_logits_are_never_whole(monkeypatch):
    monkeypatch.setattr(room, "_MOST", 50 * 10)
    hidden, weight, bias, targets = make(tokens=200, width=2, vocabulary=50)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    with Largest() as largest:
        chunked_cross_entropy(hidden, weight, bias, targets, -100).backward()
    assert largest.most <= 500 < 200 * 50


@pytest.mark.parametrize("hooked", [False, True])
def test_the_models_loss(monkeypatch, hooked):
    model = tiny()
    ids = torch.randint(model.config.vocab_size, (3, 12))
    mask = torch.ones_like(ids)
    mask[0, 4:] = 0
    wanted = [p for p in model.parameters() if p.requires_grad]
    whole = model(ids, labels=ids, loss_mask=mask).loss
    of_whole = torch.autograd.grad(whole, wanted)
    monkeypatch.setattr(room, "_MOST", 4 * model.config.vocab_size)
    calls = []
    real = room._Chunked.apply
    monkeypatch.setattr(room._Chunked, "apply", lambda *a: calls.append(1) or real(*a))
    if hooked:
        model.get_output_embeddings().register_forward_hook(lambda *_: None)
    loss = model(ids, labels=ids, loss_mask=mask).loss
    assert len(calls) == (not hooked)
    torch.testing.assert_close(loss, whole)
    for a, b in zip(torch.autograd.grad(loss, wanted), of_whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_which_heads_and_sizes():
    assert fits_whole(2**12, 2**12) and not fits_whole(2**12 + 1, 2**12)
    linear = torch.nn.Linear(2, 3)
    assert is_plain(linear) and not is_plain(torch.nn.Sequential(linear))
    linear.forward = lambda x: x
    assert not is_plain(linear)
