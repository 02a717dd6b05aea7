"""The reference formulas against torch's own autograd of the one-line statement, in float64."""

from __future__ import annotations

import oracle
import pytest
import torch

from lora_kernels import explain, lora_linear
from lora_kernels.kernels.dropout import draw_keep_mask
from lora_kernels.linear import reference

ALL = reference.Needs(True, True, True, True, True)


def make(m, k, n, r):
    shapes = [(m, k), (n, k), (r, k), (n, r), (n,)]
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize(
    ("m", "k", "n", "r"),
    [(16, 8, 12, 4), (1, 3, 1, 1), (17, 129, 5, 48), (300, 20, 33, 4), (0, 4, 3, 2)],
    ids=str,
)
def test_formulas_equal_autograd(m, k, n, r, dropout_p):
    inputs = [t.requires_grad_() for t in make(m, k, n, r)]
    x, weight, lora_a, lora_b, bias = inputs
    keep = draw_keep_mask(x, dropout_p) if dropout_p else None
    dy = torch.randn(m, n, dtype=torch.float64)
    with torch.no_grad():
        y, xa = reference.forward(*inputs, 1.3, keep, dropout_p)
        grads = reference.backward(dy, x, weight, lora_a, lora_b, xa, 1.3, keep, dropout_p, ALL)
    expected = oracle.lora_linear(*inputs, scale=1.3, keep=keep, dropout_p=dropout_p)
    torch.testing.assert_close(y, expected)
    for ours, truth in zip(grads, torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("m", [20, 300])  # few rows, and enough to take the rank part first
def test_without_a_bias(m, dropout_p):
    x, weight, lora_a, lora_b, _ = make(m, 20, 33, 4)
    keep = draw_keep_mask(x, dropout_p) if dropout_p else None
    y, _ = reference.forward(x, weight, lora_a, lora_b, None, 1.3, keep, dropout_p)
    expected = oracle.lora_linear(
        x, weight, lora_a, lora_b, scale=1.3, keep=keep, dropout_p=dropout_p
    )
    torch.testing.assert_close(y, expected)


def test_nothing_unasked_is_computed():
    inputs = make(4, 3, 5, 2)
    _, xa = reference.forward(*inputs, 1.0, None, 0.0)
    for i in range(5):
        needs = reference.Needs(*(j == i for j in range(5)))
        grads = reference.backward(
            torch.randn(4, 5, dtype=torch.float64), *inputs[:4], xa, 1.0, None, 0.0, needs
        )
        assert [g is not None for g in grads] == list(needs)


def test_bias_gradient_of_many_rows_keeps_its_precision():
    dy = torch.full((4096, 2), 1.0, dtype=torch.bfloat16)
    x, weight, lora_a, lora_b, _ = (t.bfloat16() for t in make(4096, 3, 2, 1))
    grads = reference.backward(dy, x, weight, lora_a, lora_b, x @ lora_a.t(), 1.0, None, 0.0, ALL)
    assert grads.dbias.tolist() == [4096.0, 4096.0]


@pytest.mark.parametrize(("draws", "shape"), [(1, (1000, 300)), (100, (10, 300))], ids=str)
def test_keep_mask_has_the_asked_share_and_follows_the_seed(draws, shape):
    x = torch.randn(shape)
    torch.manual_seed(5)
    keep = [draw_keep_mask(x, 0.1) for _ in range(draws)]
    torch.manual_seed(5)
    assert torch.equal(keep[0], draw_keep_mask(x, 0.1))
    assert not torch.equal(keep[-1], draw_keep_mask(x, 0.1))
    assert keep[0].dtype == torch.bool and keep[0].shape == shape
    # 300,000 draws: the standard deviation of the share is 0.00055.
    assert abs(torch.stack(keep).float().mean().item() - 0.9) < 0.003


@pytest.mark.parametrize("threads", [1, 2])
def test_the_gradient_of_b_is_contiguous_and_right_for_tall_and_for_few_rows(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for m in (255, 256, 300):
            x, weight, lora_a, lora_b, _ = make(m, 8, 12, 3)
            dy, xa = torch.randn(m, 12, dtype=torch.float64), x @ lora_a.t()
            needs = reference.Needs(False, False, False, True, False)
            grads = reference.backward(dy, x, weight, lora_a, lora_b, xa, 1.3, None, 0.0, needs)
            torch.testing.assert_close(grads.db, 1.3 * dy.t() @ xa)
            assert grads.db.is_contiguous()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_on_any_device_the_plain_path_is_taken_and_stays_there(dropout_p):
    """On Apple's, say: fake tensors go through every operation but the arithmetic."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), torch.no_grad():
        shapes = (4, 16), (8, 16), (2, 16), (8, 2), (8,)
        inputs = [torch.empty(shape, device="mps") for shape in shapes]
        assert explain(tuple(inputs)).startswith("reference: x is on mps")
        y = lora_linear(*inputs, scale=0.5, dropout_p=dropout_p, training=True)
        keep = draw_keep_mask(inputs[0], dropout_p) if dropout_p else None
        xa = torch.empty(4, 2, device="mps")
        grads = reference.backward(y, *inputs[:4], xa, 0.5, keep, dropout_p, ALL)
    assert y.device.type == "mps" and y.shape == (4, 8)
    assert all(g.device.type == "mps" and g.shape == s for g, s in zip(grads, shapes, strict=True))
