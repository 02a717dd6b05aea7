"""What only a GPU can show: graphs, inductor, sizes beyond 2³¹ elements, other devices."""

from __future__ import annotations

import threading

import needs_triton  # noqa: F401 - skips this file without it
import oracle
import pytest
import torch
from closeness import assert_close
from kernel_cases import Case, make
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, explain, lora_linear, use_backend
from lora_kernels.kernels import tuning
from lora_kernels.linear import backward, forward, reference
from lora_kernels.linear.xa import compute_xa

pytestmark = [
    pytest.mark.gpu,
    # dynamo itself makes an instance of the Function, which torch deprecates.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]
LARGE = [
    Case(8192, 4096, 4096, 16),
    Case(8192, 1024, 4096, 16),
    Case(8192, 14336, 4096, 64),
    Case(4000, 4096, 14336, 16),  # a number of rows that is a multiple of few
    Case(512, 512, 512, 16),
    Case(1, 4096, 4096, 16),
]


def test_a_gpu_takes_the_kernels_by_itself():
    layer = LoRALinear(64, 64, device="cuda", dtype=torch.bfloat16)
    assert explain(layer).startswith("triton: ")


@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_sizes_as_dispatched(case, dropout_p, dtype):
    t = make(case, dtype, "cuda")
    t = t._replace(weight=t.weight / case.k**0.5, lora_a=t.lora_a / case.k**0.5)
    inputs = [one.requires_grad_() for one in t[:5]]
    torch.manual_seed(3)
    seed = torch.randint(0, 2**63 - 1, (1,), device="cuda")
    keep = None
    if dropout_p:
        _, bits = compute_xa(
            t.x.detach(), t.lora_a.detach(), seed, dropout_p, config=tuning.Config(32, 0, 64)
        )
        lanes = torch.arange(8, device="cuda", dtype=torch.uint8)
        keep = ((bits[:, :, None] >> lanes) & 1).bool().flatten(1)[:, : case.k]

    def ours(*tensors):
        torch.manual_seed(3)
        return lora_linear(*tensors, scale=2.0, dropout_p=dropout_p, training=True)

    def statement(*tensors):
        return oracle.lora_linear(*tensors, scale=2.0, keep=keep, dropout_p=dropout_p)

    wide = [one.detach().double().requires_grad_() for one in inputs]
    with use_backend("triton"):
        assert_close(ours(*inputs), statement(*inputs), statement(*wide), "y")
        first = oracle.gradients(ours, inputs, t.dy)
        again = oracle.gradients(ours, inputs, t.dy)
    plain = oracle.gradients(statement, inputs, t.dy)
    truth = oracle.gradients(statement, wide, t.dy.double())
    for name, a, b, c, d in zip(reference.Grads._fields, first, plain, truth, again, strict=True):
        assert_close(a, b, c, name)
        assert torch.equal(a, d), f"{name} differs from run to run"


def test_more_than_31_bits_of_elements():
    m, k, n, r = 2**20 + 40, 2048, 64, 16
    x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
    weight, lora_a = (torch.randn(s, k, device="cuda").bfloat16() / 45 for s in (n, r))
    lora_b = torch.randn(n, r, device="cuda").bfloat16()
    capability = torch.cuda.get_device_capability()
    assert x.numel() > 2**31
    for name in ("fused", "beta1", "one_kernel") + (("hopper",) if capability[0] == 9 else ()):
        with tuning.use_strategy(forward=name):
            y, _, _ = forward.forward(x, weight, lora_a, lora_b, None, 1.0, None, 0.0, capability)
        tail = [one.double() for one in (x[-100:], weight, lora_a, lora_b)]
        truth, _ = reference.forward(*tail, None, 1.0, None, 0.0)
        plain, _ = reference.forward(x[-100:], weight, lora_a, lora_b, None, 1.0, None, 0.0)
        assert_close(y[-100:], plain, truth, name)
    # The same size on the other side: dy is wide, x is narrow.
    xa = torch.randn(m, r, device="cuda", dtype=torch.bfloat16)
    needs = reference.Needs(True, False, True, True, False)
    wide_b, narrow_a = torch.randn(k, r, device="cuda").bfloat16(), lora_a[:, :n].contiguous()
    narrow_x, back = x[:, :n], weight.t().contiguous()
    for name in ("fused", "beta1") + (("hopper",) if capability[0] == 9 else ()):
        with tuning.use_strategy(dx=name):
            grads = backward.backward(
                x, narrow_x, back, narrow_a, wide_b, xa, 1.0, None, 0.0, needs, capability
            )
        tail = (x[-100:], narrow_x[-100:], back, narrow_a, wide_b, xa[-100:])
        only_x = reference.Needs(True, False, False, False, False)
        truth = reference.backward(*(one.double() for one in tail), 1.0, None, 0.0, only_x).dx
        plain = reference.backward(*tail, 1.0, None, 0.0, only_x).dx
        assert_close(grads.dx[-100:], plain, truth, name)
    db = torch.zeros(k, r, device="cuda", dtype=torch.float64)
    for start in range(0, m, 2**17):
        rows = slice(start, start + 2**17)
        db += x[rows].double().t() @ xa[rows].double()
    assert_close(grads.db, x.t() @ xa, db, "db")


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_a_cuda_graph_replays_and_draws_anew(dropout_p):
    layer = LoRALinear(256, 128, rank=8, dropout=dropout_p, device="cuda", dtype=torch.bfloat16)
    torch.nn.init.normal_(layer.lora.B.weight)
    x = torch.randn(64, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    def step():
        y = layer(x)
        grads = torch.autograd.grad(y.float().square().sum(), (x, *layer.lora.parameters()))
        return y.detach(), *grads  # a graph kept from the recording would meet other streams

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    first = [t.clone() for t in captured]
    graph.replay()
    if dropout_p:
        assert not torch.equal(first[0], captured[0]), "every replay drew the same mask"
    else:
        for a, b, c in zip(first, captured, step(), strict=True):
            assert torch.equal(a, b) and torch.equal(a, c)
    with torch.no_grad():
        x.mul_(2)
    graph.replay()
    if not dropout_p:
        for a, b in zip(captured, step(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # inductor's own
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "reentrant", [None, False, True], ids=["stored", "non-reentrant", "reentrant"]
)
def test_inductor_autocast_and_checkpointing_together(autocast, reentrant, dropout_p):
    layer = LoRALinear(256, 256, rank=8, dropout=dropout_p, device="cuda")
    torch.nn.init.normal_(layer.lora.B.weight)
    x = torch.randn(96, 256, device="cuda", requires_grad=True)

    def block(inputs):
        with torch.autocast("cuda", autocast or torch.bfloat16, enabled=autocast is not None):
            return torch.nn.functional.silu(layer(inputs)) + inputs

    def run(function):
        torch.manual_seed(3)
        if reentrant is None:
            y = function(x)
        else:
            y = torch.utils.checkpoint.checkpoint(function, x, use_reentrant=reentrant)
        layer.zero_grad(set_to_none=True)
        x.grad = None
        y.float().square().sum().backward()
        return [y.detach(), x.grad, *(p.grad for p in layer.lora.parameters())]

    eager = run(block)
    assert all(torch.equal(a, b) for a, b in zip(eager, run(block), strict=True))
    if dropout_p:
        return  # inductor draws its random numbers in another way than eager torch
    compiled = run(torch.compile(block, fullgraph=True))
    # silu is fused and rounded otherwise; the LoRA products are the same kernels.
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2 * float(b.abs().max()))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_current():
    torch.cuda.set_device(0)
    layer = LoRALinear(64, 64, device="cuda:1", dtype=torch.bfloat16)
    y = layer(torch.randn(8, 64, device="cuda:1", dtype=torch.bfloat16))
    y.sum().backward()
    assert y.device.index == 1 and torch.isfinite(layer.lora.B.weight.grad).all()


def test_autograds_thread_is_asked_for_what_the_caller_asked_for(monkeypatch):
    """A backward, and a forward that checkpointing runs again, are in a thread of autograd's."""
    seen = []
    real = tuning.strategy

    def strategy(role, *args, **kwargs):
        seen.append((role, threading.get_ident() == caller, real(role, *args, **kwargs)))
        return seen[-1][-1]

    monkeypatch.setattr(tuning, "strategy", strategy)
    caller = threading.get_ident()
    layer = LoRALinear(256, 256, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with tuning.use_strategy(forward="fused", dx="fused"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert ("dx", False, "fused") in seen
    seen.clear()
    with use_backend("reference"):
        checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert not seen
