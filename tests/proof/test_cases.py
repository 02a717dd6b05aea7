"""What the cases ask of torch while they run."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch

from lora_kernels.kernels.tiles import precision
from lora_kernels.proof.cases import products_in


@pytest.fixture
def matmul():
    """Torch's setting for float32 products on CUDA, put back afterwards."""
    before = torch.backends.cuda.matmul.fp32_precision
    yield torch.backends.cuda.matmul
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("set_before", ["none", "ieee", "tf32", "older"])
def test_products_are_taken_as_said_whichever_way_they_were_set_before(set_before, matmul):
    if set_before == "older":
        torch.set_float32_matmul_precision("high")
    else:
        matmul.fp32_precision = set_before
    before = matmul.fp32_precision
    for tf32, asked in ((True, "tf32"), (False, "ieee")):
        with products_in(tf32):
            assert precision(torch.float32) == matmul.fp32_precision == asked
        assert matmul.fp32_precision == before


def test_the_setting_is_put_back_after_an_error(matmul):
    matmul.fp32_precision = "tf32"
    with pytest.raises(ZeroDivisionError), products_in(False):
        raise ZeroDivisionError
    assert matmul.fp32_precision == "tf32"
