"""The product for Hopper against float64, and which tensors it can read."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES, SHAPES, Case, make
from products import check_product

from lora_kernels.kernels import hopper, tuning
from lora_kernels.kernels.hopper import hopper_gemm
from lora_kernels.kernels.launching import Layout, recording
from lora_kernels.kernels.tuning import Config
from lora_kernels.linear.forward import forward


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [s for s in SHAPES if s.n % 8 == 0 == s.k % 8], ids=str)
@pytest.mark.parametrize("role", ["forward", "dx", "dx without a mask"])
@pytest.mark.parametrize("scale", [0.7, -2.0, 1.0])
def test_hopper_gemm(scale, role, case, dtype, device, poisoned):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    t = make(case, dtype, device, factors=torch.float32)
    dxa = torch.randn(case.m, case.r).to(device, dtype)
    options = {"config": Config(64, 64, 64, group=2), "scale": scale}
    if role == "forward":
        check_product(hopper_gemm, t.x, t.weight.t(), dxa, t.lora_b.t(), t.bias, **options)
    else:
        dropout_p = 0.3 if role == "dx" else 0.0
        check_product(hopper_gemm, t.dy, t.weight, dxa, t.lora_a, None, dropout_p, **options)


@pytest.mark.parametrize(
    ("changed", "last"),
    [
        ({}, True),
        ({"scale": -0.25}, True),
        ({"scale": 0.7}, False),
        ({"scale": 0.0}, False),
        ({"scale": 2.0, "dtype": torch.float16}, False),  # might leave its range
        ({"scale": 1.0, "dtype": torch.float16}, True),
        ({"masked": True}, False),
        ({"rank": 33}, False),
        ({"rank": 32}, True),
        ({"per_sm": 2}, False),  # there is no room for buffers of its own
    ],
    ids=str,
)
def test_the_rank_part_comes_last_where_that_changes_nothing(changed, last):
    given = {"scale": 2.0, "dtype": torch.bfloat16, "masked": False, "rank": 16, "per_sm": 1}
    scale, dtype, masked, rank, per_sm = (given | changed).values()
    p, q, u, v = (
        torch.empty(shape, dtype=dtype, device="meta")
        for shape in ((64, 128), (128, 96), (64, rank), (rank, 96))
    )
    bits = torch.empty(64, 12, dtype=torch.uint8, device="meta") if masked else None
    options = {"config": Config(64, 64, 64, per_sm=per_sm), "keep_bits": bits, "dropout_p": 0.1}
    with recording() as launches:
        hopper_gemm(p, q, u, v, scale=scale, **options)
    assert launches[0].arguments["RANK_LAST"] is last


@pytest.mark.parametrize("exponent", range(-126, 128, 23))
def test_a_power_of_two_changes_no_digit_of_bfloat16(exponent):
    assert hopper.scales_exactly(2.0**exponent, torch.bfloat16)
    u = torch.randn(1000).bfloat16()
    scaled = u.double() * 2.0**exponent
    inside = (scaled.abs() >= 2.0**-126) & (scaled.abs() <= 2.0**127)
    assert inside.any() and torch.equal(scaled.bfloat16().double()[inside], scaled[inside])


@pytest.mark.interpreted
@pytest.mark.parametrize("transposed", ["x", "weight", "both"])
def test_a_transposed_operand_goes_where_it_can_be_read(transposed):
    t = make(Case(64, 64, 64, 16), torch.float16, "cpu")
    x, weight = t.x, t.weight
    if transposed != "weight":
        x = x.t().contiguous().t()
    if transposed != "x":
        weight = weight.t().contiguous().t()
    with tuning.use_strategy(forward="hopper"):
        if transposed == "weight":
            y, *_ = forward(x, weight, *t[2:5], 1.0, None, 0.0, (9, 0))
            same, *_ = forward(*t[:5], 1.0, None, 0.0, (9, 0))
            assert torch.equal(y, same)
        else:
            with pytest.raises(RuntimeError, match="do not suit TMA"):
                forward(x, weight, *t[2:5], 1.0, None, 0.0, (9, 0))


@pytest.mark.interpreted
@pytest.mark.parametrize("moved", ["x", "weight"])
def test_an_address_off_16_bytes_does_not_suit_tma_even_after_one_that_does(moved):
    t = make(Case(64, 64, 64, 16), torch.float16, "cpu")
    aligned = t.x, t.weight
    off = [torch.empty(64 * 64 + 1, dtype=torch.float16)[1:].view(64, 64) for _ in aligned]
    for whole, shifted in zip(aligned, off, strict=True):
        shifted.copy_(whole)
    x, weight = (off[0], t.weight) if moved == "x" else (t.x, off[1])
    with tuning.use_strategy(forward="hopper"):
        forward(*aligned, *t[2:5], 1.0, None, 0.0, (9, 0))
        with pytest.raises(RuntimeError, match="do not suit TMA"):
            forward(x, weight, *t[2:5], 1.0, None, 0.0, (9, 0))


def suits_tma(tensor):
    return hopper.suits_tma(Layout.of(tensor))


def test_what_suits_tma():
    whole = torch.empty(8, 64, dtype=torch.float16)
    assert suits_tma(whole) and suits_tma(whole.t())
    assert not suits_tma(whole[:, ::2])  # no stride of 1
    assert not suits_tma(torch.empty(8, 60, dtype=torch.float16))  # rows of 120 bytes
    assert not suits_tma(torch.empty(1, 64, dtype=torch.float16).expand(8, 64))
    assert hopper.rows_suit_tma(Layout.of(whole))
    assert not hopper.rows_suit_tma(Layout.of(whole.t()))


@pytest.mark.parametrize(("stride", "suits"), [(56, False), (64, True), (72, True)])
def test_rows_that_overlap_do_not_suit_tma(stride, suits):
    rows = torch.empty(8 * 72, dtype=torch.float16).as_strided((8, 64), (stride, 1))
    assert suits_tma(rows) is suits_tma(rows.t()) is suits
    assert suits_tma(rows[:1]) is suits  # CUDA's rule is about strides, however many rows there are
