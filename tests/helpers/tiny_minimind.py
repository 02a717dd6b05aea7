"""A small MiniMind for tests: cheap to run, and every part of it matters to the result."""

from __future__ import annotations

import pytest
import torch

from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM

SIZES = {
    "dim": 32,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "vocab_size": 61,
    "multiple_of": 16,
    "max_seq_len": 48,
}


@pytest.fixture(autouse=True)
def one_thread():
    """Such small tensors run several times faster on one thread, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed=0, **changes):
    """A small model in eval mode whose weights are large enough for every part to matter."""
    torch.manual_seed(seed)
    model = MiniMindLM(LMConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3 + (parameter.ndim == 1))
    return model.eval()


def ids(*shape, seed=1, vocab=61):
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(ours, theirs, **tolerance):
    assert ours.keys() == theirs.keys() and ours
    for name, gradient in ours.items():
        torch.testing.assert_close(
            gradient, theirs[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )
