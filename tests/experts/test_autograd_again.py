"""`lora_grouped_linear` differentiated twice, forwards, in a batch, and exported."""

from __future__ import annotations

import itertools

import pytest
import torch
from routed import NAMES, ROUTINGS, Routed

# torch's own forward mode compiles its decompositions by it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`")

SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_gradgradcheck_every_subset(subset, dropout_p):
    routed = Routed((2, 0, 1), 1, n=3, k=4).train(*subset)
    assert torch.autograd.gradgradcheck(
        lambda *inputs: routed.ours(*inputs, dropout_p=dropout_p), routed.inputs
    )


def test_gradgradcheck_of_nobody():
    routed = Routed(*ROUTINGS["nobody"], n=3, k=4).train()
    assert torch.autograd.gradgradcheck(lambda *inputs: routed.ours(*inputs), routed.inputs)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_penalty_on_the_gradient(dropout_p):
    """The mask is the forward's own, in the gradient and in its gradient."""
    routed = Routed((12, 0, 4), dtype=torch.float32).train()
    y = routed.ours(dropout_p=dropout_p)
    again = torch.autograd.grad(y.square().sum(), routed.inputs, create_graph=True)
    once = torch.autograd.grad(routed.ours(dropout_p=dropout_p).square().sum(), routed.inputs)
    for a, b in zip(again, once, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    penalty = sum(g.square().sum() for g in again)
    assert all(g.isfinite().all() for g in torch.autograd.grad(penalty, routed.inputs))


def test_forward_mode():
    routed = Routed((2, 0, 3), 1)
    tangents = tuple(torch.randn_like(t) for t in routed.inputs)
    _, ours = torch.func.jvp(lambda *inputs: routed.ours(*inputs), routed.inputs, tangents)
    _, truth = torch.func.jvp(lambda *inputs: routed.statement(*inputs), routed.inputs, tangents)
    torch.testing.assert_close(ours, truth)


def test_in_a_batch():
    routed = Routed((2, 0, 1), 1)
    x, *others = torch.randn(4, 4, 5, dtype=torch.float64), *routed.inputs[1:]
    found = torch.vmap(lambda one: routed.ours(one, *others))(x)
    torch.testing.assert_close(found, torch.stack([routed.ours(one, *others) for one in x]))


def test_export():
    """The rows of each group are data, so the operator itself is in the graph."""
    routed = Routed((2, 0, 3), dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return routed.ours(*inputs, training=False)

    program = torch.export.export(Module(), routed.inputs)
    torch.testing.assert_close(program.module()(*routed.inputs), routed.statement())
