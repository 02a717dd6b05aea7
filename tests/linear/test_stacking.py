"""`stack_adapters`: the sum of several adapters as one of a wider rank."""

import pytest
import torch

from lora_kernels import lora_linear
from lora_kernels.linear.stacking import stack_adapters


def _pairs(ranks=(2, 3, 1), dtype=torch.float64):
    return [
        (
            torch.randn(r, 5, dtype=dtype, requires_grad=True),
            torch.randn(4, r, dtype=dtype, requires_grad=True),
            scale,
        )
        for r, scale in zip(ranks, (0.5, -2.0, 1.0), strict=True)
    ]


def test_the_product_is_the_sum_of_all():
    pairs = _pairs()
    lora_a, lora_b = stack_adapters(pairs)
    assert lora_a.shape == (6, 5) and lora_b.shape == (4, 6)
    torch.testing.assert_close(lora_b @ lora_a, sum(s * (b @ a) for a, b, s in pairs))


def test_every_factor_gets_the_gradient_of_its_own_branch():
    pairs, x, weight = _pairs(), torch.randn(7, 5).double(), torch.randn(4, 5).double()
    factors = [f for a, b, _ in pairs for f in (a, b)]
    dy = torch.randn(7, 4).double()
    got = torch.autograd.grad(lora_linear(x, weight, *stack_adapters(pairs)), factors, dy)
    plain = x @ weight.t() + sum(s * (x @ a.t() @ b.t()) for a, b, s in pairs)
    for one, other in zip(got, torch.autograd.grad(plain, factors, dy), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("other", [torch.float32, torch.float64])
def test_factors_of_two_dtypes_come_out_in_the_wider(other):
    narrow, wide = _pairs((2, 3, 1), torch.bfloat16), _pairs((2, 3, 1), other)
    lora_a, lora_b = stack_adapters([narrow[0], wide[1]])
    assert lora_a.dtype == lora_b.dtype == other
    torch.testing.assert_close(lora_a[2:], wide[1][0])
