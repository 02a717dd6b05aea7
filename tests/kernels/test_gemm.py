"""The product that takes in the rank part, against float64 within plain torch's own error."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES, DTYPES, SHAPES, make
from products import check_product

from lora_kernels.kernels.gemm import expand, pointer_gemm
from lora_kernels.kernels.tuning import Config

CONFIG = Config(32, 32, 32, group=2)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("role", ["forward", "dx"])
def test_pointer_gemm_and_expand(role, case, dtype, device, poisoned):
    t = make(case, dtype, device, factors=torch.float32)
    dxa = torch.randn(case.m, case.r).to(device, dtype)
    if role == "forward":
        check_product(pointer_gemm, t.x, t.weight.t(), dxa, t.lora_b.t(), t.bias, config=CONFIG)
        check_product(expand, None, None, dxa, t.lora_b.t(), t.bias, config=CONFIG)
    else:
        check_product(pointer_gemm, t.dy, t.weight, dxa, t.lora_a, None, 0.3, config=CONFIG)
        check_product(expand, None, None, dxa, t.lora_a, None, 0.3, config=CONFIG)


STRIDED = {
    "transposed": lambda m, k: torch.randn(k, m).t(),
    "every other column": lambda m, k: torch.randn(m, 2 * k)[:, ::2],
    "rows of a wider one": lambda m, k: torch.randn(m, k + 3)[:, 1 : k + 1],
    "one row expanded": lambda m, k: torch.randn(1, k).expand(m, k),
    "one number expanded": lambda m, k: torch.randn(()).expand(m, k),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", STRIDED)
def test_any_strides(kind, device, poisoned):
    m, k, n, r = 33, 40, 24, 5
    p, q, u, v = (STRIDED[kind](*shape).to(device) for shape in ((m, k), (k, n), (m, r), (r, n)))
    bias = torch.randn(2 * n, device=device)[::2]
    check_product(pointer_gemm, p, q, u, v, bias, config=CONFIG)


@pytest.mark.interpreted
def test_offsets_beyond_31_bits():
    # Memory that is never touched is never taken: three rows, 2³⁰ elements apart.
    wide = torch.empty(2**31 + 64, dtype=torch.float16).as_strided((3, 64), (2**30, 1))
    values = torch.randn(3, 64).half()
    wide.copy_(values)
    q, u, v = torch.randn(64, 16).half(), torch.randn(3, 4).half(), torch.randn(4, 16).half()
    options = {"config": Config(16, 16, 16)}
    assert torch.equal(
        pointer_gemm(wide, q, u, v, **options), pointer_gemm(values, q, u, v, **options)
    )
