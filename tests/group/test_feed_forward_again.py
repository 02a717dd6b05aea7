"""`lora_feed_forward` differentiated twice, forwards, in a batch, compiled and exported."""

from __future__ import annotations

import itertools

import pytest
import torch
from feed_forwards import KINDS, SCALES, FeedForward
from kernel_cases import PATHS

from lora_kernels import lora_feed_forward, use_backend
from lora_kernels.kernels.activations import ACTIVATIONS

# torch's own forward mode compiles its decompositions by it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`")

SORTS = ("x", "weight", "lora_a", "lora_b", "bias")
SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(SORTS, size)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_gradgradcheck_every_subset(subset, dropout_p):
    made = FeedForward("all three", 2, 3, 4, 2)
    made.train(*(name for name in made.names if name.rstrip("012") in subset))
    assert torch.autograd.gradgradcheck(
        lambda *inputs: made.ours(*inputs, dropout_p=dropout_p), made.inputs
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradgradcheck_every_kind(kind, activation):
    made = FeedForward(kind, 2, 3, 4, 2).train()
    assert torch.autograd.gradgradcheck(
        lambda *inputs: made.ours(*inputs, activation=activation), made.inputs
    )


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_penalty_on_the_gradient_on_every_path(dropout_p, device, backend):
    """The masks are the forward's own, in the gradient and in its gradient."""
    made = FeedForward("all three", 12, 16, 24, 8, torch.float32).to(torch.float32, device).train()
    masks = made.masks(dropout_p, backend)
    with use_backend(backend):
        y = made.ours(dropout_p=dropout_p)
    found = []
    for each in (y, made.statement(masks=masks, dropout_p=dropout_p)):
        grads = torch.autograd.grad(each.square().sum(), made.inputs, create_graph=True)
        penalty = sum(grad.square().sum() for grad in grads)
        found.append((*grads, *torch.autograd.grad(penalty, made.inputs)))
    for ours, truth in zip(*found, strict=True):
        size = truth.abs().max().item()
        torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5 * size)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_several_dy_in_a_batch(dropout_p, device, backend):
    made = FeedForward("all three", dtype=torch.float32).to(torch.float32, device).train()
    with use_backend(backend):
        y = made.ours(dropout_p=dropout_p)
        dys = torch.randn(3, *y.shape, device=device)
        batched = torch.autograd.grad(y, made.inputs, dys, is_grads_batched=True, retain_graph=True)
        singles = [torch.autograd.grad(y, made.inputs, dy, retain_graph=True) for dy in dys]
    for batch, each in zip(batched, zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(batch, torch.stack(each), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_forward_mode(activation, dropout_p):
    made = FeedForward("all three")
    tangents = tuple(torch.randn_like(t) for t in made.inputs)
    options = {"activation": activation, "dropout_p": dropout_p}
    masks = made.masks(dropout_p)
    found = [
        torch.func.jvp(call, made.inputs, tangents)
        for call in (
            lambda *inputs: made.ours(*inputs, **options),
            lambda *inputs: made.statement(*inputs, masks=masks, **options),
        )
    ]
    torch.testing.assert_close(*found)


def test_in_a_batch():
    made = FeedForward("all three", m=3)
    x = torch.randn(4, 3, 5, dtype=torch.float64)

    def call(one):
        return lora_feed_forward(one, *made.kinds((one, *made.inputs[1:])), scales=SCALES)

    torch.testing.assert_close(torch.vmap(call)(x), torch.stack([call(one) for one in x]))
    ours = torch.func.jacrev(lambda one: call(one).square().sum())(x[0])
    one = x[0].requires_grad_()
    torch.testing.assert_close(ours, torch.autograd.grad(call(one).square().sum(), one)[0])


def test_export():
    made = FeedForward("all three", dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(self, *inputs):
            return lora_feed_forward(inputs[0], *made.kinds(inputs), scales=SCALES)

    program = torch.export.export(Module(), made.inputs)
    assert "lora_kernels" not in str(program.graph)
    torch.testing.assert_close(program.module()(*made.inputs), made.statement())


# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", ["all three", "down alone"])
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_compiles_whole(device, backend, kind, activation):
    made = FeedForward(kind, 8, 16, 24, 16, torch.float32).to(torch.float32, device).train()

    def call(*inputs):
        options = {"scales": SCALES, "activation": activation}
        return lora_feed_forward(inputs[0], *made.kinds(inputs), **options)

    torch.compiler.reset()
    with use_backend(backend):
        y = torch.compile(call, fullgraph=True, backend="aot_eager")(*made.inputs)
        dy = torch.randn_like(y)
        ours = made.gradients(y, dy)
    expected = made.statement(activation=activation)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    for name, gradient in made.gradients(expected, dy).items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_a_compiled_call_drops_what_it_says(device, backend):
    """Gradients go where the mask of the compiled forward let values through, and no further."""
    made = FeedForward("down alone", 200, 4, 64, 1, torch.float32).to(torch.float32, device)
    made.train("lora_a2")
    with torch.no_grad():
        made.tensors["lora_b2"].fill_(1.0)

    def call(*inputs):
        options = {"scales": SCALES, "dropout_p": 0.25, "training": True}
        return lora_feed_forward(inputs[0], *made.kinds(inputs), **options)

    torch.compiler.reset()
    with use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        y, other = compiled(*made.inputs), compiled(*made.inputs)
        assert not torch.equal(y, other)
        gradient = made.gradients(y, torch.ones_like(y))["lora_a2"]
    # y is linear in A: its gradient says what the branch with this mask has added.
    bare = made.without_lora().statement()
    branch = (gradient * made.tensors["lora_a2"]).sum()
    torch.testing.assert_close((y - bare).sum(), branch, rtol=1e-4, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_one_graph_serves_every_number_of_rows(device, backend):
    made = FeedForward("all three", 8, 16, 24, 16, torch.float32).to(torch.float32, device)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    def call(x):
        return lora_feed_forward(x, *made.kinds(), scales=SCALES)

    torch.compiler.reset()
    with use_backend(backend):
        compiled = torch.compile(call, fullgraph=True, dynamic=True, backend=count)
        for rows in (5, 70, 2, 1025):
            x = torch.randn(rows, 16, device=device)
            torch.testing.assert_close(compiled(x), call(x), rtol=1e-4, atol=1e-4)
    assert len(graphs) == 1
