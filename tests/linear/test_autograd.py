"""`lora_linear` through autograd: gradcheck in float64, and the error budget in every dtype."""

from __future__ import annotations

import itertools

import oracle
import pytest
import torch
from closeness import assert_close
from kernel_cases import PATHS, drawn_mask
from torch.utils.checkpoint import checkpoint

from lora_kernels import lora_linear, use_backend
from lora_kernels.kernels.dropout import draw_keep_mask
from lora_kernels.linear import reference

NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


def make(m=4, k=5, n=3, r=2, dtype=torch.float64, lead=None):
    shape = (m, k) if lead is None else (*lead, k)
    return {
        "x": torch.randn(shape, dtype=dtype),
        "weight": torch.randn(n, k, dtype=dtype),
        "lora_a": torch.randn(r, k, dtype=dtype),
        "lora_b": torch.randn(n, r, dtype=dtype),
        "bias": torch.randn(n, dtype=dtype),
    }


def seeded(scale, dropout_p, seed=8):
    """`lora_linear` of its five tensors, drawing the same mask at every call."""

    def function(*tensors):
        torch.manual_seed(seed)
        return lora_linear(*tensors, scale=scale, dropout_p=dropout_p, training=True)

    return function


SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(NAMES, size)]


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_gradcheck_every_subset(subset, dropout_p):
    tensors = make()
    for name in subset:
        tensors[name].requires_grad_()
    assert torch.autograd.gradcheck(seeded(0.7, dropout_p), tuple(tensors.values()))


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_only_what_is_needed_is_computed(subset):
    tensors = make()
    for name in subset:
        tensors[name].requires_grad_()
    lora_linear(**tensors).sum().backward()
    assert {name for name in NAMES if tensors[name].grad is not None} == set(subset)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("lead", [(), (3,), (2, 3), (2, 1, 3), (0,), (2, 0, 3)], ids=str)
def test_gradcheck_ranks_of_x(lead, dropout_p):
    tensors = make(lead=lead)
    y = seeded(0.7, dropout_p)(*tensors.values())
    assert y.shape == (*lead, 3) and y.is_contiguous()
    for name in ("x", "lora_a", "lora_b", "bias"):
        tensors[name].requires_grad_()
    if 0 in lead:  # gradcheck has nothing to vary in an empty x; the sums must be exact zeros
        grads = oracle.gradients(seeded(0.7, dropout_p), tuple(tensors.values()), y)
        assert grads[0].shape == tensors["x"].shape
        assert all(torch.equal(g, torch.zeros_like(g)) for g in grads[1:])
    else:
        assert torch.autograd.gradcheck(seeded(0.7, dropout_p), tuple(tensors.values()))


STRIDED_X = {
    "transposed": lambda: torch.randn(5, 4, dtype=torch.float64).t(),
    "every other column": lambda: torch.randn(4, 10, dtype=torch.float64)[:, ::2],
    "expanded rows": lambda: torch.randn(1, 5, dtype=torch.float64).expand(4, 5),
    "expanded columns": lambda: torch.randn(4, 1, dtype=torch.float64).expand(4, 5),
    "permuted 3-D": lambda: torch.randn(5, 2, 3, dtype=torch.float64).permute(2, 1, 0),
}


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("layout", STRIDED_X)
def test_any_strides_of_x_and_dy(layout, dropout_p):
    tensors = make()
    tensors["x"] = STRIDED_X[layout]()
    rows = tensors["x"].shape[:-1]
    dys = {
        "expanded": torch.randn((), dtype=torch.float64).expand(*rows, 3),
        "transposed": torch.randn(3, *rows, dtype=torch.float64).movedim(0, -1),
        "strided": torch.randn(*rows, 6, dtype=torch.float64)[..., ::2],
    }
    for tensor in tensors.values():
        tensor.requires_grad_()
    inputs = tuple(tensors.values())
    torch.manual_seed(8)
    keep = draw_keep_mask(tensors["x"].reshape(-1, 5), dropout_p).view(*rows, 5)
    for kind, dy in dys.items():
        ours = oracle.gradients(seeded(0.7, dropout_p), inputs, dy)
        truth = oracle.gradients(
            lambda *t: oracle.lora_linear(*t, scale=0.7, keep=keep, dropout_p=dropout_p),
            inputs,
            dy,
        )
        for name, a, b in zip(NAMES, ours, truth, strict=True):
            torch.testing.assert_close(a, b, msg=lambda m, k=kind, n=name: f"{k} dy, d{n}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [
        (64, 128, 96, 16),  # round
        (1, 17, 1, 1),  # a single token, rank and output 1
        (127, 129, 33, 5),  # multiples of nothing
        (3, 8, 200, 48),  # rank above K
        (257, 130, 66, 5),  # rows enough to take the rank part first
        (300, 8, 200, 48),  # and a rank too high for that
    ],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_error_budget(device, backend, dtype, m, k, n, r, dropout_p, poisoned):
    tensors = {name: t.to(device) for name, t in make(m, k, n, r, dtype).items()}
    dy = torch.randn(m, n, dtype=dtype).to(device)
    torch.manual_seed(8)
    keep = drawn_mask(tensors["x"], dropout_p, backend)

    def statement(*inputs):
        return oracle.lora_linear(*inputs, scale=0.7, keep=keep, dropout_p=dropout_p)

    inputs = tuple(t.requires_grad_() for t in tensors.values())
    wide = tuple(t.detach().double().requires_grad_() for t in inputs)
    with use_backend(backend):
        assert_close(seeded(0.7, dropout_p)(*inputs), statement(*inputs), statement(*wide), "y")
        ours = oracle.gradients(seeded(0.7, dropout_p), inputs, dy)
    plain = oracle.gradients(statement, inputs, dy)
    truth = oracle.gradients(statement, wide, dy.double())
    for name, *three in zip(NAMES, ours, plain, truth, strict=True):
        assert_close(*three, f"d{name}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_wide_factors_over_a_narrow_base(device, backend, dtype):
    tensors = {name: t.to(device) for name, t in make(33, 40, 24, 4, torch.float32).items()}
    dy = torch.randn(33, 24, dtype=dtype).to(device)
    for name in ("x", "weight", "bias"):
        tensors[name] = tensors[name].to(dtype)
    inputs = tuple(t.requires_grad_() for t in tensors.values())
    narrow = tuple(t.detach().to(dtype).requires_grad_() for t in inputs)
    wide = tuple(t.detach().double().requires_grad_() for t in narrow)
    with use_backend(backend):
        y = lora_linear(*inputs)
        ours = oracle.gradients(lora_linear, inputs, dy)
    assert y.dtype == dtype
    assert_close(y, oracle.lora_linear(*narrow), oracle.lora_linear(*wide), "y")
    plain = oracle.gradients(oracle.lora_linear, narrow, dy)
    truth = oracle.gradients(oracle.lora_linear, wide, dy.double())
    assert [g.dtype for g in ours] == [dtype, dtype, torch.float32, torch.float32, dtype]
    for name, a, b, c in zip(NAMES, ours, plain, truth, strict=True):
        assert_close(a.to(dtype), b, c, f"d{name}")


def test_autocast_matches_casting_by_hand():
    tensors = make(16, 24, 8, 4, torch.float32)
    inputs = tuple(t.requires_grad_() for t in tensors.values())
    cast = tuple(t.detach().bfloat16().requires_grad_() for t in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        y = lora_linear(*inputs, scale=0.5)
    by_hand = lora_linear(*cast, scale=0.5)
    assert torch.equal(y, by_hand)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, inputs, dy)
    assert all(g.dtype == torch.float32 for g in ours)
    for a, b in zip(ours, torch.autograd.grad(by_hand, cast, dy), strict=True):
        assert torch.equal(a.bfloat16(), b)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_autocast_around_the_backward_alone_changes_nothing(dropout_p):
    inputs = tuple(t.requires_grad_() for t in make(16, 24, 8, 4, torch.float32).values())
    plain = torch.autograd.grad(seeded(1.0, dropout_p)(*inputs).sum(), inputs)
    y = seeded(1.0, dropout_p)(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = torch.autograd.grad(y.sum(), inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_dropout_only_in_training_and_only_on_the_lora_branch():
    tensors = make(200, 30, 8, 4)
    base = torch.nn.functional.linear(tensors["x"], tensors["weight"], tensors["bias"])
    still = lora_linear(**tensors, dropout_p=0.5, training=False)
    assert torch.equal(still, lora_linear(**tensors))
    dropped = lora_linear(**tensors, dropout_p=0.5, training=True)
    assert not torch.equal(still, dropped)
    tensors["lora_b"].zero_()
    assert torch.equal(lora_linear(**tensors, dropout_p=0.5, training=True), base)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant):
    tensors = {name: t.requires_grad_() for name, t in make(40, 30, 8, 4).items()}
    inputs = tuple(tensors.values())

    def layer(*t):
        return lora_linear(*t, dropout_p=0.5, training=True)

    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(*inputs).square().sum(), inputs)
    torch.manual_seed(3)
    y = checkpoint(layer, *inputs, use_reentrant=use_reentrant)
    y.square().sum().backward()
    for tensor, gradient in zip(inputs, plain, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("autocast", [False, True])
def test_without_gradients_the_values_are_the_same(mode, autocast):
    inputs = tuple(t.requires_grad_() for t in make(65, 70, 33, 5, torch.float32).values())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = seeded(1.0, 0.1)(*inputs)
        with mode():
            bare = seeded(1.0, 0.1)(*inputs)
    assert y.requires_grad and not bare.requires_grad and torch.equal(y, bare)


def test_same_inputs_same_bits():
    tensors = {name: t.requires_grad_() for name, t in make(65, 70, 33, 5, torch.float32).items()}
    inputs, dy = tuple(tensors.values()), torch.randn(65, 33)
    first = oracle.gradients(seeded(1.0, 0.1), inputs, dy)
    second = oracle.gradients(seeded(1.0, 0.1), inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole():
    tensors = {name: t.requires_grad_() for name, t in make(8, 16, 4, 2, torch.float32).items()}
    inputs, dy = tuple(tensors.values()), torch.randn(8, 4)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), lora_linear(*inputs))
    for a, b in zip(
        oracle.gradients(compiled, inputs, dy),
        oracle.gradients(lora_linear, inputs, dy),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_call_is_not_taken_for_an_exported_one(monkeypatch):
    """It would lose the kernels, and the products in float32 where a CPU needs them."""

    def plainly(*operands):
        raise AssertionError("as for torch.export")

    monkeypatch.setattr(reference, "plain_forward", plainly)
    inputs = tuple(make(8, 16, 4, 2, torch.float32).values())
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*inputs), lora_linear(*inputs))


BAD = {
    "x of another width": (ValueError, r"x must be \[\.\.\., 5\]", {"x": torch.randn(4, 6)}),
    "scalar x": (ValueError, "x must be", {"x": torch.randn(())}),
    "integer x": (TypeError, "x must be a floating", {"x": torch.ones(4, 5, dtype=torch.long)}),
    "no tensor": (TypeError, "lora_a must be a floating", {"lora_a": [1.0]}),
    "1-D weight": (ValueError, r"weight must be \[N, K\]", {"weight": torch.randn(5)}),
    "A of another width": (ValueError, r"lora_a must be \[R, 5\]", {"lora_a": torch.randn(2, 4)}),
    "rank 0": (ValueError, "R at least 1", {"lora_a": torch.randn(0, 5)}),
    "B of another rank": (ValueError, r"lora_b must be \[3, 2\]", {"lora_b": torch.randn(3, 4)}),
    "bias of another size": (ValueError, r"bias must be \[3\]", {"bias": torch.randn(4)}),
    "bias that would broadcast": (ValueError, r"bias must be \[3\]", {"bias": torch.randn(1)}),
    "bias of another dtype": (TypeError, "share a dtype", {"bias": torch.randn(3).half()}),
    "integer B": (TypeError, "lora_b must be a floating", {"lora_b": torch.ones(3, 2).int()}),
    "bias elsewhere": (ValueError, "bias is on meta", {"bias": torch.empty(3, device="meta")}),
    "mixed dtypes": (TypeError, "share a dtype", {"x": torch.randn(4, 5).bfloat16()}),
    "another device": (
        ValueError,
        "lora_b is on meta",
        {"lora_b": torch.empty(3, 2, device="meta")},
    ),
    "dropout 1": (ValueError, "dropout_p must be in", {"dropout_p": 1.0}),
    "dropout negative": (ValueError, "dropout_p must be in", {"dropout_p": -0.1}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    error, message, change = BAD[case]
    with pytest.raises(error, match=message):
        lora_linear(**{**make(dtype=torch.float32), **change})
