"""`FastLinear` against PEFT's own forward: the same results, gradients and dtypes."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from closeness import assert_close
from torch import nn

from lora_kernels import dispatch, use_backend

pytest.importorskip("peft")

from tiny_peft_layer import K, N, count_served, pair, results


@pytest.fixture
def served(monkeypatch):
    return count_served(monkeypatch)


# name: dtype of base and x, dtype of A and B (None: the base's), autocast
DTYPES = {
    "float32": (torch.float32, None, None),
    "bfloat16": (torch.bfloat16, None, None),
    "float16": (torch.float16, None, None),
    "float32 over bfloat16": (torch.bfloat16, torch.float32, None),
    "float32 over float16": (torch.float16, torch.float32, None),
    "bfloat16 over float32": (torch.float32, torch.bfloat16, None),
    "float32 under autocast": (torch.float32, None, torch.bfloat16),
    "float32 over bfloat16 under autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize("more", [{}, {"base_bias": False, "use_rslora": True}], ids=str)
@pytest.mark.parametrize("case", DTYPES)
def test_equals_peft(served, case, more):
    dtype, adapters, autocast = DTYPES[case]
    stock, ours = pair(dtype, autocast_adapter_dtype=False, **more)
    if adapters:
        for layer in (stock, ours):
            layer.lora_A.to(adapters), layer.lora_B.to(adapters)
    truth = copy.deepcopy(stock).double()
    x = torch.randn(2, 7, K, dtype=dtype)
    inside = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with inside:
        expected, got = results(stock, x), results(ours, x)
    exact = results(truth, x.double())
    assert len(served) == 1
    assert got.keys() == expected.keys() and len(got) == 4
    for name, value in got.items():
        assert value.dtype == expected[name].dtype
        # The products of a mixed layer are those of the dtype that x has: that sets the budget.
        product = dtype if autocast is None else autocast
        assert_close(value.to(product), expected[name].to(product), exact[name], name)


def test_peft_keeps_float32_factors_over_a_narrow_base_and_so_do_we(served):
    stock, ours = pair(torch.bfloat16)
    assert ours.lora_A["default"].weight.dtype == torch.float32
    expected, got = (results(layer, torch.randn(5, K).bfloat16()) for layer in (stock, ours))
    assert len(served) == 1
    assert {n: v.dtype for n, v in got.items()} == {n: v.dtype for n, v in expected.items()}
    assert got["lora_A.default.weight"].dtype == torch.float32


def test_equals_peft_in_float64(served):
    stock, ours = pair(torch.float64)
    x = torch.randn(5, K, dtype=torch.float64)
    expected, got = results(stock, x), results(ours, x)
    assert len(served) == 1
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-13, atol=1e-13)


def test_a_trained_base_gets_its_gradients(served):
    stock, ours = pair()
    for layer in (stock, ours):
        layer.base_layer.requires_grad_()
    x = torch.randn(6, K)
    expected, got = results(stock, x), results(ours, x)
    assert len(served) == 1 and {"base_layer.weight", "base_layer.bias"} < got.keys()
    for name in got:
        torch.testing.assert_close(got[name], expected[name])


def test_what_is_read_anew_in_each_call(served):
    stock, ours = pair()
    x = torch.randn(3, K)
    before = ours(x)
    for layer in (stock, ours):
        layer.scale_layer(3.0)
    assert not torch.allclose(ours(x), before)
    torch.testing.assert_close(ours(x), stock(x))
    for layer in (stock, ours):
        layer.set_scale("default", 0.25)
    torch.testing.assert_close(ours(x), stock(x))
    first = ours(x)
    for layer in (stock, ours):
        layer.set_adapter("second")
    assert not torch.allclose(ours(x), first)
    torch.testing.assert_close(ours(x), stock(x))
    assert len(served) == 7
    # Active in the model and absent here: PEFT passes it over.
    for layer in (stock, ours):
        layer.set_adapter(["elsewhere", "default"])
    torch.testing.assert_close(ours(x), stock(x))
    assert len(served) == 8


def test_dropout_acts_in_training_alone(served):
    stock, ours = pair(lora_dropout=0.5)
    x = torch.randn(1, K).expand(8192, K)
    base = ours.base_layer(x[:1])
    for layer in (stock, ours):
        layer.eval()
    torch.testing.assert_close(ours(x[:2]), stock(x[:2]))
    still = ours(x[:1])
    for layer in (stock, ours):
        layer.train()
    drawn, theirs = ours(x), stock(x)
    assert [call["training"] for call in served] == [False, False, True]
    error = theirs.std(0) / 8192**0.5
    assert ((drawn.mean(0) - still).abs() < 5 * error).all()
    torch.testing.assert_close(drawn.std(0), theirs.std(0), rtol=0.1, atol=0)
    assert not torch.allclose(still, base)
    torch.manual_seed(5)
    again = ours(x)
    torch.manual_seed(5)
    assert torch.equal(ours(x), again)
    # The dropout module decides, not the layer: somebody may have put it to eval by itself.
    ours.lora_dropout.eval()
    torch.testing.assert_close(ours(x[:1]), still)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_the_kernels_serve_it(served, device):
    if device == "cpu" and not dispatch._interpreting():
        pytest.skip("Triton's interpreter is off")
    stock, ours = (layer.to(device) for layer in pair())
    x = torch.randn(5, K, device=device)
    truth = results(copy.deepcopy(stock).double(), x.double())
    with use_backend("triton"):
        got = results(ours, x)
    expected = results(stock, x)
    assert len(served) == 1
    for name, value in got.items():
        assert_close(value, expected[name], truth[name], name)


@pytest.mark.parametrize("wrapper", ["DDP", "fully_shard"])
def test_wrapped_for_several_processes_afterwards(served, wrapper):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    stock, ours = pair()
    x, dy = torch.randn(4, K), torch.randn(4, N)
    stock, block = nn.Sequential(stock, nn.Tanh()), nn.Sequential(ours, nn.Tanh())
    (expected,) = torch.autograd.grad(stock(x), stock[0].lora_A["default"].weight, dy)
    factor = ours.lora_A["default"]
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        if wrapper == "DDP":
            wrapped = torch.nn.parallel.DistributedDataParallel(block)
        else:
            wrapped = fully_shard(block, mesh=dist.init_device_mesh("cpu", (1,)))
            assert isinstance(ours.parts(), str)  # DTensors, between the calls
        y = wrapped(x)
        y.backward(dy)
        gradient = factor.weight.grad
        gradient = gradient.full_tensor() if wrapper == "fully_shard" else gradient
        torch.testing.assert_close(y, stock(x))
        torch.testing.assert_close(gradient, expected)
    finally:
        dist.destroy_process_group()
    assert len(served) == 1
