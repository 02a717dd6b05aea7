"""`lora_grouped_linear` through autograd: gradcheck in float64, and every group by itself."""

from __future__ import annotations

import itertools

import pytest
import torch
from closeness import assert_close
from routed import NAMES, ROUTINGS, Routed
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import lora_grouped_linear, lora_linear, use_backend
from lora_kernels.experts import ops
from lora_kernels.kernels.dropout import draw_keep_mask

SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(NAMES, size)]
DROPOUTS = pytest.mark.parametrize("dropout_p", [0.0, 0.4])


def mask_of(routed, dropout_p):
    torch.manual_seed(8)
    return draw_keep_mask(routed.tensors["x"], dropout_p) if dropout_p else None


@DROPOUTS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_gradcheck(routing, bias, dropout_p):
    routed = Routed(*ROUTINGS[routing], bias=bias).train()
    assert torch.autograd.gradcheck(
        lambda *inputs: routed.ours(*inputs, dropout_p=dropout_p), routed.inputs
    )


@DROPOUTS
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_every_subset_of_gradients(subset, dropout_p):
    routed = Routed((2, 0, 3), 1).train(*subset)
    keep = mask_of(routed, dropout_p)
    y = routed.ours(dropout_p=dropout_p)
    expected = routed.statement(keep=keep, dropout_p=dropout_p)
    torch.testing.assert_close(y, expected)
    dy = torch.randn_like(y)
    ours, truth = routed.gradients(y, dy), routed.gradients(expected, dy)
    for name in subset:
        torch.testing.assert_close(ours[name], truth[name], msg=lambda m, n=name: f"d{n}: {m}")


@DROPOUTS
@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("sizes", "n", "k", "r"),
    [
        ((20, 0, 1, 43), 96, 128, 16),  # round
        ((5, 9, 0, 0, 2), 33, 17, 3),  # multiples of nothing
        ((300, 2), 66, 130, 5),  # rows enough to take the rank part first, and too few
        ((257, 3), 20, 16, 12),  # and a rank too high for that
    ],
    ids=str,
)
def test_error_budget(sizes, n, k, r, dtype, transposed, dropout_p, poisoned):
    routed = Routed(sizes, 3, n, k, r, dtype, transposed=transposed).train()
    keep = mask_of(routed, dropout_p)
    wide = routed.to(torch.float64)
    plain = routed.statement(keep=keep, dropout_p=dropout_p)
    truth = wide.statement(keep=keep, dropout_p=dropout_p)
    dy = torch.randn_like(plain)
    y = routed.ours(dropout_p=dropout_p)
    assert y.is_contiguous()
    assert_close(y, plain, truth, "y")
    ours = routed.gradients(y, dy)
    of_plain, of_truth = routed.gradients(plain, dy), wide.gradients(truth, dy.double())
    for name, gradient in ours.items():
        assert_close(gradient, of_plain[name], of_truth[name], f"d{name}")


@pytest.mark.parametrize("path", [ops.LOOP, ops.WIDENED])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_wide_factors_over_a_narrow_base(dtype, path, monkeypatch):
    monkeypatch.setattr("lora_kernels.experts.autograd._path_of", lambda *_: path)
    routed = Routed((33, 0, 2), 1, 24, 40, 3, dtype, wide=torch.float32).train()
    narrow, wide = routed.to(dtype), routed.to(dtype).to(torch.float64)
    plain, truth = narrow.statement(), wide.statement()
    dy = torch.randn_like(plain)
    y = routed.ours()
    assert_close(y, plain, truth, "y")
    ours = routed.gradients(y, dy)
    of_plain, of_truth = narrow.gradients(plain, dy), wide.gradients(truth, dy.double())
    for name, gradient in ours.items():
        assert gradient.dtype == routed.tensors[name].dtype
        assert_close(gradient.to(dtype), of_plain[name], of_truth[name], f"d{name}")


def test_each_group_is_the_single_linear():
    """So that a mixture of linears can be stacked, and gives what it gave."""
    routed = Routed((40, 0, 7), dtype=torch.float32, n=24, k=16)
    x, *others = routed.inputs
    keep_seed = {"scale": 0.7, "training": True}
    y = routed.ours()
    for g, rows in ((0, slice(0, 40)), (2, slice(40, 47))):
        alone = lora_linear(x[rows], *(t[g] for t in others), **keep_seed)
        torch.testing.assert_close(y[rows], alone)


def test_groups_without_rows_get_exactly_nothing(poisoned):
    routed = Routed((0, 3, 0), 2, dtype=torch.float32).train()
    y = routed.ours()
    assert y[3:].count_nonzero() == 0
    grads = routed.gradients(y, torch.randn_like(y))
    assert grads["x"][3:].count_nonzero() == 0
    for name in ("weight", "lora_a", "lora_b", "bias"):
        assert [t.count_nonzero() > 0 for t in grads[name]] == [False, True, False], name


def test_flops_are_the_frozen_products_and_the_branchs_own():
    routed = Routed((30, 0, 12, 22), dtype=torch.float32, n=64, k=48, r=4, bias=False)
    routed.train("x", "lora_a", "lora_b")
    m, n, k, r = 64, 64, 48, 4
    with FlopCounterMode(display=False) as counter:
        routed.ours().sum().backward()
    frozen = 2 * m * n * k * 2  # y and dx
    branch = 2 * m * r * (n + k) * 3  # of each of its products: once forward, twice backward
    assert counter.get_total_flops() == frozen + branch


def test_a_frozen_weight_gets_no_gradient_and_x_is_not_kept_for_nothing():
    routed = Routed((3, 2), dtype=torch.float32).train("x")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        routed.ours()
    assert routed.tensors["x"].shape not in kept


def test_autocast_matches_casting_by_hand():
    routed = Routed((9, 0, 4), dtype=torch.float32, n=24, k=16).train()
    cast = routed.to(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = routed.ours(dropout_p=0.3)
    by_hand = cast.ours(dropout_p=0.3)
    assert torch.equal(y, by_hand)
    dy = torch.randn_like(y)
    ours, theirs = routed.gradients(y, dy), cast.gradients(by_hand, dy)
    for name, gradient in ours.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient.bfloat16(), theirs[name]), name


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_the_mask(use_reentrant):
    routed = Routed((20, 0, 7)).train()

    def layer(x, weight, lora_a, lora_b, bias):
        return lora_grouped_linear(
            x, weight, lora_a, lora_b, routed.offsets, bias, dropout_p=0.5, training=True
        )

    torch.manual_seed(3)
    plain = torch.autograd.grad(layer(*routed.inputs).square().sum(), routed.inputs)
    torch.manual_seed(3)
    checkpoint(layer, *routed.inputs, use_reentrant=use_reentrant).square().sum().backward()
    for tensor, gradient in zip(routed.inputs, plain, strict=True):
        assert torch.equal(tensor.grad, gradient)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_values_are_the_same(mode):
    routed = Routed((20, 0, 7), dtype=torch.float32).train()
    y = routed.ours(dropout_p=0.1)
    with mode():
        assert torch.equal(y, routed.ours(dropout_p=0.1))


def test_same_inputs_same_bits():
    routed = Routed((40, 0, 7, 300), n=65, k=70, dtype=torch.float32).train()
    y = routed.ours(dropout_p=0.1)
    dy = torch.randn_like(y)
    first, second = (routed.gradients(routed.ours(dropout_p=0.1), dy) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_and_once_for_every_routing(dropout_p):
    torch._dynamo.reset()
    compiled = torch.compile(lora_grouped_linear, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for sizes in ((3, 0, 5), (0, 8, 0)):
            routed = Routed(sizes, dtype=torch.float32).train()
            torch.manual_seed(8)
            x, weight, lora_a, lora_b, bias = routed.inputs
            y = compiled(
                x,
                weight,
                lora_a,
                lora_b,
                routed.offsets,
                bias,
                scale=0.7,
                dropout_p=dropout_p,
                training=True,
            )
            keep = mask_of(routed, dropout_p)
            if dropout_p:  # compiled, the mask is drawn by other means
                assert y.isfinite().all()
                y.sum().backward()
                continue
            expected = routed.statement(keep=keep, dropout_p=dropout_p)
            torch.testing.assert_close(y, expected)
            dy = torch.randn_like(y)
            ours, truth = routed.gradients(y, dy), routed.gradients(expected, dy)
            for name in truth:
                torch.testing.assert_close(
                    ours[name], truth[name], msg=lambda m, n=name: f"{n} {m}"
                )


def test_on_the_meta_device():
    routed = Routed((3, 0, 5), device="meta").train()
    y = routed.ours()
    y.sum().backward()
    assert y.shape == (8, 6) and routed.tensors["lora_b"].grad.shape == (3, 6, 2)


def test_triton_that_was_asked_for_is_refused():
    with use_backend("triton"), pytest.raises(RuntimeError, match="no Triton kernels"):
        Routed((3, 2), dtype=torch.float32).ours()


BAD = {
    "offsets that decrease": (ValueError, "offsets must be ends", {"offsets": [3, 2, 8]}),
    "offsets beyond": (ValueError, "to the 8 rows of x", {"offsets": [3, 3, 9]}),
    "negative offsets": (ValueError, "offsets must be ends", {"offsets": [-1, 3, 8]}),
    "int64 offsets": (
        TypeError,
        "offsets must be an int32",
        {"offsets": torch.tensor([3, 3, 8])},
    ),
    "offsets too few": (ValueError, r"offsets must be \[3\]", {"offsets": [3, 8]}),
    "no offsets": (TypeError, "offsets must be", {"offsets": None}),
    "x of three dimensions": (ValueError, "sort its rows", {"x": torch.ones(2, 4, 5)}),
    "x of another width": (ValueError, r"x must be \[M, 5\]", {"x": torch.ones(8, 4)}),
    "weight of two dimensions": (ValueError, "weight must be", {"weight": torch.ones(6, 5)}),
    "weight without groups": (ValueError, "G at least 1", {"weight": torch.ones(0, 6, 5)}),
    "A of other groups": (ValueError, r"lora_a must be \[3", {"lora_a": torch.ones(2, 2, 5)}),
    "A of rank 0": (ValueError, "R at least 1", {"lora_a": torch.ones(3, 0, 5)}),
    "B of another rank": (ValueError, "lora_b must be", {"lora_b": torch.ones(3, 6, 1)}),
    "a bias for all": (ValueError, r"bias must be \[3, 6\]", {"bias": torch.ones(6)}),
    "mixed dtypes": (TypeError, "share a dtype", {"x": torch.ones(8, 5).half()}),
    "integers": (TypeError, "weight must be a floating", {"weight": torch.ones(3, 6, 5).int()}),
    "dropout 1": (ValueError, "dropout_p must be in", {"dropout_p": 1.0}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    error, message, change = BAD[case]
    if isinstance(change.get("offsets"), list):
        change = {"offsets": torch.tensor(change["offsets"], dtype=torch.int32)}
    given = {
        "x": torch.ones(8, 5),
        "weight": torch.ones(3, 6, 5),
        "lora_a": torch.ones(3, 2, 5),
        "lora_b": torch.ones(3, 6, 2),
        "offsets": torch.tensor([3, 3, 8], dtype=torch.int32),
        **change,
    }
    with pytest.raises(error, match=message):
        lora_grouped_linear(**given)
