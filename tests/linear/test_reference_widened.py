"""16-bit tensors on a CPU without instructions for them: products in float32, nothing else changed.

What the CPU at hand can do is replaced, so that both ways are tested on any machine.
"""

from __future__ import annotations

import oracle
import pytest
import torch
from closeness import assert_close

from lora_kernels import LoRALinear, dispatch, explain, lora_linear, use_backend
from lora_kernels.kernels.dropout import draw_keep_mask
from lora_kernels.linear import reference

NARROW = [torch.bfloat16, torch.float16]
NAMES = ("x", "weight", "lora_a", "lora_b", "bias")


@pytest.fixture(params=[False, True], ids=["slow", "fast"])
def fast(request, monkeypatch):
    """Whether this CPU is taken to multiply 16-bit numbers itself."""
    monkeypatch.setattr(dispatch, "_cpu_multiplies", lambda dtype: request.param)
    return request.param


@pytest.fixture
def slow(monkeypatch):
    monkeypatch.setattr(dispatch, "_cpu_multiplies", lambda dtype: False)


def make(m, k, n, r, dtype, factors=None):
    shapes = [(m, k), (n, k), (r, k), (n, r), (n,)]
    tensors = [torch.randn(shape).to(dtype) for shape in shapes]
    for i in (2, 3):
        tensors[i] = torch.randn(shapes[i]).to(factors or dtype)
    return [t.requires_grad_() for t in tensors]


def call(*tensors, dropout_p=0.0):
    torch.manual_seed(8)
    return lora_linear(*tensors, scale=0.7, dropout_p=dropout_p, training=True)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("m", [1, 15, 16, 40])  # few rows are not widened in forward
def test_values_and_dtypes(dtype, dropout_p, m, fast):
    inputs, dy = make(m, 70, 33, 5, dtype), torch.randn(m, 33).to(dtype)
    torch.manual_seed(8)
    keep = draw_keep_mask(inputs[0], dropout_p) if dropout_p else None

    def statement(*tensors):
        return oracle.lora_linear(*tensors, scale=0.7, keep=keep, dropout_p=dropout_p)

    def ours(*tensors):
        return call(*tensors, dropout_p=dropout_p)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    y = ours(*inputs)
    assert y.dtype == dtype and y.is_contiguous()
    assert_close(y, statement(*inputs), statement(*wide), "y")
    three = (
        oracle.gradients(ours, inputs, dy),
        oracle.gradients(statement, inputs, dy),
        oracle.gradients(statement, wide, dy.double()),
    )
    for name, got, plain, truth in zip(NAMES, *three, strict=True):
        assert_close(got, plain, truth, f"d{name}")


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_one_rounding_is_all_that_is_left(dtype, slow):
    """With every product in float32, what comes out is the truth of the inputs, rounded once."""
    inputs, dy = make(40, 70, 33, 5, dtype), torch.randn(40, 33).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    truth = [call(*wide), *oracle.gradients(call, wide, dy.double())]
    ours = [call(*inputs), *oracle.gradients(call, inputs, dy)]
    for got, exact in zip(ours, truth, strict=True):
        half_a_step = torch.finfo(dtype).eps / 2 * exact.abs()
        assert ((got.double() - exact).abs() <= half_a_step + 1e-3 * half_a_step.max()).all()


@pytest.mark.parametrize("subset", range(1, 32))
def test_every_subset_of_gradients(subset, slow):
    tensors = [t.detach() for t in make(20, 9, 7, 3, torch.bfloat16, torch.float32)]
    wanted = [bool(subset & 1 << i) for i in range(5)]
    for tensor, asked in zip(tensors, wanted, strict=True):
        tensor.requires_grad_(asked)
    call(*tensors, dropout_p=0.4).sum().backward()
    for tensor, asked in zip(tensors, wanted, strict=True):
        assert (tensor.grad is not None) == asked
        assert tensor.grad is None or tensor.grad.dtype == tensor.dtype


def test_factors_in_float32_are_not_rounded(slow):
    inputs = make(40, 70, 33, 5, torch.bfloat16, torch.float32)
    wide = [t.detach().double().requires_grad_() for t in inputs]
    dy = torch.randn(40, 33).bfloat16()
    ours, truth = oracle.gradients(call, inputs, dy), oracle.gradients(call, wide, dy.double())
    for i in (2, 3):
        assert ours[i].dtype == torch.float32
        torch.testing.assert_close(ours[i].double(), truth[i], rtol=1e-4, atol=1e-4)


def test_a_cpu_that_can_takes_the_products_as_they_are(fast):
    inputs = [t.detach() for t in make(40, 70, 33, 5, torch.bfloat16)]
    x, weight, lora_a, lora_b, bias = inputs
    as_they_are, _ = reference.forward(x, weight, lora_a, lora_b, bias, 0.7, None, 0.0)
    widened, _ = reference.widened_forward(x, weight, lora_a, lora_b, bias, 0.7, None, 0.0)
    assert not torch.equal(as_they_are, widened)
    assert torch.equal(call(*inputs), as_they_are if fast else widened)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_wider_dtypes_stay_as_they_are(dtype, slow):
    assert not dispatch.choose(torch.zeros(1, dtype=dtype)).widened
    assert "products" not in explain(torch.zeros(1, dtype=dtype))


def test_only_a_cpu_is_asked(slow):
    with use_backend("reference"):
        assert dispatch.choose(torch.zeros(1, dtype=torch.bfloat16)).widened
        assert not dispatch.choose(torch.zeros(1, dtype=torch.bfloat16, device="meta")).widened


def test_explain_tells(fast):
    said = explain(LoRALinear(4, 4, dtype=torch.bfloat16))
    assert said.startswith("reference: x is on cpu, the kernels run on cuda")
    assert ("products in float32" in said) == (not fast)
    with use_backend("reference"):
        asked = explain(torch.zeros(1, dtype=torch.float16))
    assert asked.startswith("reference: asked for by use_backend")
    assert ("products in float32" in asked) == (not fast)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_torch_is_asked_what_it_asks_itself(dtype):
    dispatch._supported.cache_clear()
    asked = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    assert dispatch._cpu_multiplies(dtype) == getattr(torch.ops.mkldnn, asked[dtype])()


# As the machine at hand answers: the tracer must not follow the question.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_compiles_whole_on_this_cpu(dtype):
    torch._dynamo.reset()
    dispatch._supported.cache_clear()
    inputs, dy = make(20, 70, 33, 5, dtype), torch.randn(20, 33).to(dtype)
    compiled = torch.compile(lora_linear, fullgraph=True, backend="aot_eager")
    ours = oracle.gradients(compiled, inputs, dy)
    for one, other in zip(ours, oracle.gradients(lora_linear, inputs, dy), strict=True):
        torch.testing.assert_close(one, other)


# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_for_any_number_of_rows(slow):
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(lora_linear, fullgraph=True, dynamic=True, backend=count)
    for m in (20, 33, 50):
        inputs, dy = make(m, 70, 33, 5, torch.bfloat16), torch.randn(m, 33).bfloat16()
        expected = oracle.gradients(lora_linear, inputs, dy)
        for one, other in zip(oracle.gradients(compiled, inputs, dy), expected, strict=True):
            torch.testing.assert_close(one, other)
    assert len(graphs) == 1
