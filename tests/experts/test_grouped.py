"""torch's grouped products, which CUDA takes, against the loop over groups; here on a CPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from closeness import assert_close
from routed import NAMES, Routed

from lora_kernels.experts import grouped, ops, reference
from lora_kernels.kernels.dropout import draw_keep_mask
from lora_kernels.linear.reference import Needs

ALL = Needs(*[True] * 5)
SIZES = {"skewed": (300, 0, 2, 9), "empty ends": (0, 5, 0), "one row each": (1, 1)}


def call(module, routed, dy, dropout_p, needs=ALL):
    x, weight, lora_a, lora_b, bias = routed.inputs
    torch.manual_seed(4)
    keep = draw_keep_mask(x, dropout_p) if dropout_p else None
    tensors = x, weight, lora_a, lora_b, routed.offsets
    with torch.no_grad():
        y, xa = module.forward(*tensors, bias, keep, routed.scale, dropout_p)
        grads = module.backward(dy, *tensors, xa, keep, routed.scale, dropout_p, needs)
    return y, grads


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
@pytest.mark.parametrize("beyond", [0, 3])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rank", "transposed"), [(8, False), (3, True)])
def test_equals_the_loop(rank, transposed, dtype, sizes, beyond, dropout_p):
    """Ranks of a whole 16 bytes and others; rows that no group has are NaN."""
    routed = Routed(SIZES[sizes], beyond, 24, 32, rank, dtype, transposed=transposed)
    wide = routed.to(torch.float64)
    dy = torch.randn(len(routed.tensors["x"]), 24).to(dtype)
    count = sum(SIZES[sizes])
    truth, of_truth = call(reference, wide, dy.double(), dropout_p)
    plain, of_plain = call(reference, routed, dy, dropout_p)
    # A product's sums are in another order than sum()'s, and farther off.
    rows = dy[:count].split(SIZES[sizes])
    of_plain = of_plain._replace(
        dbias=torch.stack([(each.new_ones(1, len(each)) @ each)[0] for each in rows])
    )
    routed.tensors["x"][count:] = torch.nan
    y, grads = call(grouped, routed, dy, dropout_p)
    assert_close(y, plain, truth, "y")
    for name, *three in zip(NAMES, grads, of_plain, of_truth, strict=True):
        assert_close(*three, f"d{name}")


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=5)), ids=str)
def test_only_what_is_asked_for(needs):
    routed = Routed((5, 0, 3), dtype=torch.float32, n=8, k=8)
    dy = torch.randn(8, 8)
    _, grads = call(grouped, routed, dy, 0.0, Needs(*needs))
    _, expected = call(reference, routed, dy, 0.0, Needs(*needs))
    assert [grad is not None for grad in grads] == list(needs)
    for a, b in zip(grads, expected, strict=True):
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", [ops.LOOP, ops.GROUPED, ops.WIDENED])
@pytest.mark.parametrize("rank", [2, 4])
def test_operators_say_rightly_what_they_give(path, rank):
    """Their fakes' shapes, strides and dtypes are those of the real ones."""
    dtype = torch.bfloat16 if path == ops.WIDENED else torch.float32
    routed = Routed((5, 0, 3), dtype=dtype, n=8, k=8, r=rank, transposed=True)
    x, weight, lora_a, lora_b, bias = routed.inputs
    tensors = x, weight, lora_a, lora_b, routed.offsets
    forward = torch.ops.lora_kernels.grouped_forward
    torch.library.opcheck(forward, (*tensors, bias, None, 0.7, 0.0, path))
    _, xa = forward(*tensors, bias, None, 0.7, 0.0, path)
    dy = torch.randn(8, 8).to(dtype)
    backward = torch.ops.lora_kernels.grouped_backward
    torch.library.opcheck(backward, (dy, *tensors, xa, None, 0.7, 0.0, [True] * 5, path))
