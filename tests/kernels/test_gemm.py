"""The product that takes in the rank part, against float64 within plain torch's own error."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, DTYPES, SHAPES, Case, make

from lora_kernels.kernels import tuning
from lora_kernels.kernels.dropout import pack_bits
from lora_kernels.kernels.gemm import expand, hopper_gemm, pointer_gemm, suits_tma
from lora_kernels.kernels.tuning import Config
from lora_kernels.linear.forward import forward

CONFIG = Config(32, 32, 32, group=2)


def statement(p, q, u, v, bias, scale, keep, dropout_p):
    branch = scale * (u @ v)
    if keep is not None:
        branch = branch * keep / (1 - dropout_p)
    out = branch if p is None else p @ q + branch
    return out if bias is None else out + bias


def check(kernel, p, q, u, v, bias, dropout_p=0.0, config=CONFIG):
    shape = u.shape[0], v.shape[1]
    keep = torch.rand(shape, device=u.device) >= dropout_p if dropout_p else None
    bits = None if keep is None else pack_bits(keep)
    options = {"bias": bias, "scale": 0.7, "keep_bits": bits, "dropout_p": dropout_p}
    tensors = [u, v] if p is None else [p, q, u, v]
    ours = kernel(*tensors, **options, config=config)
    rounded = [None if t is None else t.to(u.dtype) for t in (p, q, u, v, bias)]
    wide = [None if t is None else t.double() for t in rounded]
    plain = statement(*rounded, 0.7, keep, dropout_p)
    assert_close(ours, plain, statement(*wide, 0.7, keep, dropout_p), kernel.__name__)
    assert ours.is_contiguous()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SHAPES, ids=str)
@pytest.mark.parametrize("role", ["forward", "dx"])
def test_pointer_gemm_and_expand(role, case, dtype, device, poisoned):
    t = make(case, dtype, device, factors=torch.float32)
    dxa = torch.randn(case.m, case.r).to(device, dtype)
    if role == "forward":
        check(pointer_gemm, t.x, t.weight.t(), dxa, t.lora_b.t(), t.bias)
        check(expand, None, None, dxa, t.lora_b.t(), t.bias)
    else:
        check(pointer_gemm, t.dy, t.weight, dxa, t.lora_a, None, 0.3)
        check(expand, None, None, dxa, t.lora_a, None, 0.3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [s for s in SHAPES if s.n % 8 == 0 == s.k % 8], ids=str)
@pytest.mark.parametrize("role", ["forward", "dx"])
def test_hopper_gemm(role, case, dtype, device, poisoned):
    if device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("TMA needs compute capability 9.0")
    t = make(case, dtype, device, factors=torch.float32)
    dxa = torch.randn(case.m, case.r).to(device, dtype)
    config = Config(64, 64, 64, group=2)
    if role == "forward":
        check(hopper_gemm, t.x, t.weight.t(), dxa, t.lora_b.t(), t.bias, config=config)
    else:
        check(hopper_gemm, t.dy, t.weight, dxa, t.lora_a, None, 0.3, config=config)


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
    check(pointer_gemm, p, q, u, v, bias)


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


def test_what_suits_tma():
    whole = torch.empty(8, 64, dtype=torch.float16)
    assert suits_tma(whole) and suits_tma(whole.t())
    assert not suits_tma(whole[:, 1:])  # an address off 16 bytes
    assert not suits_tma(whole[:, ::2])  # no stride of 1
    assert not suits_tma(torch.empty(8, 60, dtype=torch.float16))  # rows of 120 bytes
    assert not suits_tma(torch.empty(1, 64, dtype=torch.float16).expand(8, 64))


@pytest.mark.parametrize(("stride", "suits"), [(56, False), (64, True), (72, True)])
def test_rows_that_overlap_do_not_suit_tma(stride, suits):
    rows = torch.empty(8 * 72, dtype=torch.float16).as_strided((8, 64), (stride, 1))
    assert suits_tma(rows) is suits_tma(rows.t()) is suits
    assert suits_tma(rows[:1]) is suits  # CUDA's rule is about strides, however many rows there are


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
