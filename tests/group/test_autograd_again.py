"""`lora_linear_group` differentiated twice, forwards, in a batch, and exported."""

from __future__ import annotations

import itertools

import pytest
import torch
from groups import MEMBERS, Group
from kernel_cases import PATHS

from lora_kernels import lora_linear_group, use_backend
from lora_kernels.kernels.dropout import draw_keep_mask

# torch's own forward mode compiles its decompositions by it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`")

QKV = MEMBERS["q, k, v"]
KINDS = ("x", "weight", "lora_a", "lora_b", "bias")
SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(KINDS, size)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_gradgradcheck_every_subset(subset, dropout_p):
    group = Group(QKV[:2])
    group.train(*(name for name in group.names if name.rstrip("0123456789") in subset))
    assert torch.autograd.gradgradcheck(
        lambda *inputs: group.ours(*inputs, dropout_p=dropout_p), group.inputs
    )


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_penalty_on_the_gradient_on_every_path(dropout_p, device, backend):
    """The mask is the forward's own, in the gradient and in its gradient."""
    group = Group(MEMBERS["one without LoRA"], 12, 16, torch.float32)
    group = group.to(torch.float32, device).train()
    results = []
    with use_backend(backend):
        for seed in (8, 8, 9):
            ys = group.ours(dropout_p=dropout_p, seed=seed)
            total = sum(y.square().sum() for y in ys)
            grads = torch.autograd.grad(total, group.inputs, create_graph=True)
            plain = torch.autograd.grad(
                sum(y.square().sum() for y in group.ours(dropout_p=dropout_p, seed=seed)),
                group.inputs,
            )
            for a, b in zip(grads, plain, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            penalty = sum(g.square().sum() for g in grads)
            results.append(torch.autograd.grad(penalty, group.inputs))
    for first, second in zip(*results[:2], strict=True):
        torch.testing.assert_close(first, second)
    changed = any(not torch.equal(a, b) for a, b in zip(*results[1:], strict=True))
    assert changed == (dropout_p > 0)


def test_forward_mode():
    group = Group(QKV)
    tangents = tuple(torch.randn_like(t) for t in group.inputs)
    _, ours = torch.func.jvp(lambda *inputs: group.ours(*inputs), group.inputs, tangents)
    _, truth = torch.func.jvp(lambda *inputs: group.statement(*inputs), group.inputs, tangents)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b)


def test_in_a_batch():
    group = Group(QKV, m=3)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    rest = group.inputs[1:]

    def call(one):
        return lora_linear_group(one, *group.kinds((one, *rest)), scales=group.scales)

    for ours, looped in zip(
        torch.vmap(call)(x), zip(*(call(one) for one in x), strict=True), strict=True
    ):
        torch.testing.assert_close(ours, torch.stack(looped))


def test_export():
    group = Group(QKV, 3, 5, torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return lora_linear_group(inputs[0], *group.kinds(inputs), scales=group.scales)

    program = torch.export.export(Module(), group.inputs)
    assert "lora_kernels" not in str(program.graph)
    for a, b in zip(program.module()(*group.inputs), group.statement(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_several_dy_in_a_batch(device, backend):
    group = Group(QKV, 12, 16, torch.float32).to(torch.float32, device).train()
    with use_backend(backend):
        ys = group.ours()
        dys = [torch.randn(3, *y.shape, device=device) for y in ys]
        options = {"retain_graph": True}
        together = torch.autograd.grad(ys, group.inputs, dys, is_grads_batched=True, **options)
        apart = [
            torch.autograd.grad(ys, group.inputs, [dy[i] for dy in dys], **options)
            for i in range(3)
        ]
    for ours, each in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(each), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_what_a_gradient_does_not_depend_on_is_none(subset, dropout_p):
    """As in plain torch: missing where there is no dependence, of an unused member above all."""
    for used in ((0, 1), (0,)):
        group = Group(QKV[:2])
        group.train(*(name for name in group.names if name.rstrip("0123456789") in subset))
        wanted = {name: t for name, t in group.tensors.items() if t.requires_grad}
        torch.manual_seed(8)
        keep = draw_keep_mask(group.inputs[0].detach(), dropout_p) if dropout_p else None
        found = []
        for ys in (
            group.ours(dropout_p=dropout_p),
            group.statement(keep=keep, dropout_p=dropout_p),
        ):
            total = sum(ys[i].square().sum() for i in used)
            if not total.requires_grad:
                continue
            grads = torch.autograd.grad(
                total, list(wanted.values()), create_graph=True, allow_unused=True
            )
            squares = [g.square().sum() for g in grads if g is not None and g.requires_grad]
            again = [None] * len(wanted)
            if squares:
                again = torch.autograd.grad(sum(squares), list(wanted.values()), allow_unused=True)
            found.append((*grads, *again))
        if len(found) < 2:
            continue
        for name, ours, truth in zip([*wanted, *wanted], *found, strict=True):
            if truth is None and "x" not in subset:
                assert ours is None or not ours.any(), name  # xa is one output for all members
                continue
            assert (ours is None) == (truth is None), name
            if truth is not None:
                torch.testing.assert_close(ours, truth)
