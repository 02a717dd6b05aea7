"""`lora_feed_forward` through autograd: gradcheck in float64, and the statement it stands for."""

from __future__ import annotations

import itertools

import pytest
import torch
from closeness import assert_close
from feed_forwards import KINDS, FeedForward
from kernel_cases import PATHS
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_feed_forward, use_backend
from lora_kernels.group import feed_forward_reference
from lora_kernels.kernels.activations import ACTIVATIONS

SORTS = ("x", "weight", "lora_a", "lora_b", "bias")
SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(SORTS, size)]
SINGLE = [f"{sort}{i}" for sort in SORTS[1:] for i in range(3) if (sort, i) != ("bias", 0)]


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request, monkeypatch):
    """Rows all at once, and three or fewer at a time."""
    if request.param == "in pieces":
        monkeypatch.setattr(feed_forward_reference, "MOST_ROWS", 3)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, dropout_p, pieces):
    made = FeedForward(kind).train()
    assert torch.autograd.gradcheck(
        lambda *inputs: made.ours(*inputs, dropout_p=dropout_p), made.inputs
    )


def compare(made, dropout_p, **options):
    """y and every gradient with the statement's."""
    y = made.ours(dropout_p=dropout_p, **options)
    truth = made.statement(masks=made.masks(dropout_p), dropout_p=dropout_p, **options)
    torch.testing.assert_close(y, truth)
    dy = torch.randn_like(y)
    ours, wanted = made.gradients(y, dy), made.gradients(truth, dy)
    for name in wanted:
        torch.testing.assert_close(ours[name], wanted[name], msg=lambda m, n=name: f"d{n}: {m}")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation, pieces):
    compare(FeedForward("all three", m=8).train(), 0.4, activation=activation)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(subset, dropout_p, pieces):
    made = FeedForward("all three")
    made.train(*(name for name in made.names if name.rstrip("012") in subset))
    compare(made, dropout_p)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("name", SINGLE)
def test_one_tensor_alone_is_trained(name, dropout_p, pieces):
    compare(FeedForward("all three").train(name), dropout_p)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (0,), (2, 0, 3)], ids=str)
def test_ranks_of_x(lead):
    made = FeedForward("all three", lead=lead).train()
    y = made.ours(dropout_p=0.4)
    assert y.shape == (*lead, 6) and y.is_contiguous()
    if 0 in lead:
        grads = made.gradients(y, torch.ones_like(y))
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads.values())
    else:
        compare(made, 0.4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "hidden", "n"),
    [
        (64, 32, 64, 32),  # round
        (1, 17, 43, 30),  # a single token
        (37, 29, 67, 33),  # multiples of nothing
        (40, 16, 24, 48),
    ],
    ids=str,
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_error_budget(device, backend, dtype, m, k, hidden, n, dropout_p, poisoned, monkeypatch):
    monkeypatch.setattr(feed_forward_reference, "MOST_ROWS", 30)
    made = FeedForward("all three", m, k, hidden, n, torch.float32).to(dtype, device).train()
    budget(made, backend, dropout_p)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_error_budget_of_kinds(device, backend, activation, kind, poisoned):
    made = FeedForward(kind, 20, 24, 40, 16, torch.float32).to(torch.float32, device).train()
    budget(made, backend, 0.3, activation=activation)


def budget(made, backend, dropout_p, dy=None, **options):
    """y and every gradient within the error budget."""
    masks = made.masks(dropout_p, backend)
    with use_backend(backend):
        y = made.ours(dropout_p=dropout_p, **options)
        dy = torch.randn_like(y) if dy is None else dy
        ours = made.gradients(y, dy)
    dtype = y.dtype
    wide, plain = made.to(torch.float64), made.to(dtype)
    options = {"masks": masks, "dropout_p": dropout_p, **options}
    y_of_plain, truth = plain.statement(**options), wide.statement(**options)
    assert_close(y, y_of_plain, truth, "y", products=2)
    of_plain, of_truth = plain.gradients(y_of_plain, dy), wide.gradients(truth, dy.double())
    for name in ours:
        three = ours[name].to(dtype), of_plain[name], of_truth[name]
        assert_close(*three, f"d{name}", products=3)  # gate, dh, and its own
        assert ours[name].dtype == made.tensors[name].dtype
    return ours


@pytest.mark.parametrize("name", ["lora_a0", "lora_b1", "lora_a2", "bias1"])
def test_sums_of_many_pieces_are_taken_in_float32(name, monkeypatch):
    """In bfloat16 the sum of so many like numbers would stop growing."""
    monkeypatch.setattr(feed_forward_reference, "MOST_ROWS", 1)
    made = FeedForward("all three", 600, 3, 5, 2, torch.bfloat16)
    for tensor in made.inputs:
        tensor.fill_(0.3)
    made.train(name)
    budget(made, "reference", 0.0, dy=torch.ones(600, 2, dtype=torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_wide_factors_over_a_narrow_base(device, backend, dtype):
    made = FeedForward("all three", 33, 40, 24, 16, dtype, wide=torch.float32)
    made.tensors = {name: t.to(device) for name, t in made.tensors.items()}
    made.inputs = tuple(made.tensors.values())
    budget(made.train(), backend, 0.3)


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("single", SINGLE)
def test_the_gradients_are_those_of_all(single, device, backend):
    """Alone as with others, whatever is then kept or left out."""
    found = []
    for trained in ((single,), ()):
        torch.manual_seed(3)
        made = FeedForward("all three", dtype=torch.float32).to(torch.float32, device)
        with use_backend(backend):
            y = made.train(*trained).ours(dropout_p=0.3)
        found.append(made.gradients(y, torch.ones_like(y))[single])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("dy", ["expanded", "transposed", "strided"])
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_any_strides(dy, device, backend):
    made = FeedForward("all three", 8, 6, 10, 8, torch.float32).to(torch.float32, device).train()
    dy = {
        "expanded": torch.ones((), device=device).expand(8, 8),
        "transposed": torch.randn(8, 8, device=device).t(),
        "strided": torch.randn(8, 16, device=device)[:, ::2],
    }[dy]
    x = torch.randn(6, 8, device=device).t().requires_grad_()
    with use_backend(backend):
        inputs = x, *made.inputs[1:]
        ours = torch.autograd.grad(made.ours(*inputs), inputs, dy)
    truth = torch.autograd.grad(made.statement(*inputs), inputs, dy)
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wide", [None, torch.float32])
def test_autocast_matches_casting_by_hand(wide):
    made = FeedForward("all three", 16, 24, 32, 24, torch.float32).train()
    cast = made.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = made.ours(dropout_p=0.2)
    by_hand = cast.ours(dropout_p=0.2)
    dy = torch.randn_like(y)
    ours, theirs = made.gradients(y, dy), cast.gradients(by_hand, dy)
    assert torch.equal(y, by_hand)
    for name in made.names:
        assert ours[name].dtype == torch.float32
        assert torch.equal(ours[name].bfloat16(), theirs[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_checkpointing_replays_the_masks(use_reentrant, device, backend):
    made = FeedForward("all three", 40, 30, dtype=torch.float32).to(torch.float32, device).train()

    def layer(*inputs):
        options = {"dropout_p": 0.5, "training": True}
        return lora_feed_forward(inputs[0], *made.kinds(inputs), **options)

    with use_backend(backend):
        torch.manual_seed(3)
        plain = torch.autograd.grad(layer(*made.inputs).square().sum(), made.inputs)
        torch.manual_seed(3)
        checkpoint(layer, *made.inputs, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip(made.inputs, plain, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_without_gradients_the_values_are_the_same(mode, device, backend):
    made = FeedForward("all three", 65, 70, dtype=torch.float32).to(torch.float32, device).train()
    with use_backend(backend):
        y = made.ours(dropout_p=0.1)
        with mode():
            bare = made.ours(dropout_p=0.1)
    assert y.requires_grad and not bare.requires_grad and torch.equal(y, bare)


@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_a_graph_that_is_kept_gives_the_same_again(device, backend):
    """Backward writes over nothing that it has kept."""
    made = FeedForward("all three", 20, 24, dtype=torch.float32).to(torch.float32, device).train()
    with use_backend(backend):
        y = made.ours(dropout_p=0.3)
        dy = torch.randn_like(y)
        first = torch.autograd.grad(y, made.inputs, dy, retain_graph=True)
        again = torch.autograd.grad(y, made.inputs, dy)
        anew = torch.autograd.grad(made.ours(dropout_p=0.3), made.inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(first, anew, strict=True))


def test_y_can_be_written_to():
    made = FeedForward("all three").train()
    y = made.ours()
    y.mul_(2.0)
    twice = made.gradients(made.statement(), torch.full_like(y, 2.0))
    for name, gradient in made.gradients(y, torch.ones_like(y)).items():
        torch.testing.assert_close(gradient, twice[name])


def test_a_tensor_given_twice_gets_both_gradients():
    made = FeedForward("all three")
    x, weight = made.inputs[0], made.tensors["weight0"]
    a, b = torch.randn(2, 5, dtype=x.dtype), torch.randn(9, 2, dtype=x.dtype)
    down = made.tensors["weight2"], made.tensors["lora_a2"], made.tensors["lora_b2"]
    for t in (a, b, weight):
        t.requires_grad_()

    def call(a, b, weight):
        return lora_feed_forward(x, (weight, weight, down[0]), (a, a, down[1]), (b, b, down[2]))

    assert torch.autograd.gradcheck(call, (a, b, weight))
    assert torch.autograd.gradgradcheck(call, (a, b, weight))


BAD = {
    "two weights": (ValueError, "weights must have three entries", {"weights": [1, 2]}),
    "four A's": (ValueError, "lora_as must have three entries", {"lora_as": [None] * 4}),
    "a scale too few": (ValueError, "scales must have three entries", {"scales": (1.0, 2.0)}),
    "A without B": (
        ValueError,
        "down: .*both be given",
        {"lora_bs": [torch.ones(3, 2)] * 2 + [None]},
    ),
    "up is narrower": (
        ValueError,
        r"up: weight must be \[3, 5\] as gate's, got shape \(2, 5\)",
        {
            "weights": [torch.ones(3, 5), torch.ones(2, 5), torch.ones(4, 3)],
            "lora_as": [None] * 3,
            "lora_bs": [None] * 3,
        },
    ),
    "down is narrower": (
        ValueError,
        r"down: x must be \[..., 2\] to fit weight \[4, 2\], got shape \(3,\)",
        {"weights": [torch.ones(3, 5), torch.ones(3, 5), torch.ones(4, 2)]},
    ),
    "gate does not fit x": (ValueError, r"gate: x must be \[..., 5\]", {"x": torch.ones(2, 4)}),
    "no tensor": (TypeError, "gate: .*must be a floating", {"weights": [1.0, 2.0, 3.0]}),
    "mixed dtypes": (TypeError, "gate: .*share a dtype", {"x": torch.ones(2, 5).half()}),
    "a wide bias": (TypeError, "down: .*share a", {"biases": [None, None, torch.ones(4).double()]}),
    "dropout 1": (ValueError, "dropout_p must be in", {"dropout_p": 1.0}),
    "an activation": (ValueError, "activation must be one of silu, gelu", {"activation": "relu"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    error, message, change = BAD[case]
    given = {
        "x": torch.ones(2, 5),
        "weights": [torch.ones(3, 5), torch.ones(3, 5), torch.ones(4, 3)],
        "lora_as": [torch.ones(2, 5), torch.ones(2, 5), torch.ones(1, 3)],
        "lora_bs": [torch.ones(3, 2), torch.ones(3, 2), torch.ones(4, 1)],
    }
    with pytest.raises(error, match=message):
        lora_feed_forward(**{**given, **change})
