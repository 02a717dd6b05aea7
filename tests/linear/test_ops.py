"""The Triton path through torch: operators, tracers, autocast, checkpointing, graphs."""

from __future__ import annotations

import copy

import oracle
import pytest
import torch
from closeness import assert_close
from kernel_cases import DEVICES, Case, drawn_mask, make
from torch.profiler import profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, explain, lora_linear, use_backend

# dynamo itself makes an instance of the Function, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _triton():
    with use_backend("triton"):
        yield


SMALL = Case(12, 8, 16, 4)


def inputs_of(device, dtype=torch.float32, case=SMALL):
    tensors = make(case, dtype, device)
    return [t.requires_grad_() for t in tensors[:5]], tensors.dy


def gradients(function, inputs, dy):
    torch.manual_seed(3)
    return oracle.gradients(function, inputs, dy)


def dropped(*tensors):
    return lora_linear(*tensors, scale=0.7, dropout_p=0.3, training=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dropout_p, bias, device):
    t = make(SMALL, torch.float32, device)
    seed = torch.tensor([5], device=device) if dropout_p else None
    arguments = (*t[:4], t.bias if bias else None, seed, 0.7, dropout_p)
    torch.library.opcheck(torch.ops.lora_kernels.forward.default, arguments)
    _, xa, bits = torch.ops.lora_kernels.forward(*arguments)
    for needs in ([True] * 5, [True, False, True, True, False]):
        torch.library.opcheck(
            torch.ops.lora_kernels.backward.default,
            (t.dy, *t[:4], xa, bits if dropout_p else None, 0.7, dropout_p, needs),
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("empty", ["m", "n", "k"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_empty_dimensions(empty, dropout_p, device):
    case = SMALL._replace(**{empty: 0})
    inputs, dy = inputs_of(device, case=case)

    def call(*tensors):
        return lora_linear(*tensors, scale=0.7, dropout_p=dropout_p, training=True)

    y = call(*inputs)
    expected = torch.zeros(case.m, case.n, device=device) + inputs[4].detach()
    assert torch.equal(y, expected)
    grads = gradients(call, inputs, dy)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    torch.testing.assert_close(grads[4], dy.sum(0))
    assert not any(g.any() for g in grads[:4] if empty != "n" or g is not grads[0])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lead", [(16,), (2, 3, 16)], ids=str)
def test_the_call_equals_the_statement(lead, device):
    (_, *others), _ = inputs_of(device)
    inputs = [torch.randn(lead, device=device).requires_grad_(), *others]
    dy = torch.randn(*lead[:-1], 8, device=device)
    torch.manual_seed(3)
    keep = drawn_mask(inputs[0].detach().view(-1, 16), 0.3, "triton").view(lead)

    def statement(*tensors):
        return oracle.lora_linear(*tensors, scale=0.7, keep=keep, dropout_p=0.3)

    wide = [t.detach().double().requires_grad_() for t in inputs]
    for ours, plain, truth in zip(
        gradients(dropped, inputs, dy),
        gradients(statement, inputs, dy),
        gradients(statement, wide, dy.double()),
        strict=True,
    ):
        assert_close(ours, plain, truth)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("function", [lora_linear, dropped], ids=["plain", "dropout"])
def test_compiles_whole(function, device):
    inputs, dy = inputs_of(device)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, inputs, dy), gradients(function, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)
        assert a.any()


@pytest.mark.parametrize("device", DEVICES)
def test_one_graph_serves_every_number_of_rows(device):
    layer = LoRALinear(16, 8, rank=4, device=device)
    torch.nn.init.normal_(layer.lora.B.weight)
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
    for rows in (5, 70, 2, 129):
        x = torch.randn(rows, 16, device=device)
        torch.testing.assert_close(compiled(x), layer(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strict", [True, False], ids=["strict", "non-strict"])
def test_exports_with_dynamic_rows(strict, device):
    layer = LoRALinear(16, 8, rank=4, device=device).eval()
    torch.nn.init.normal_(layer.lora.B.weight)
    example = torch.randn(6, 16, device=device)
    rows = torch.export.Dim("rows", min=2, max=512)
    with torch.no_grad():
        program = torch.export.export(layer, (example,), dynamic_shapes=({0: rows},), strict=strict)
        names = [str(node.target) for node in program.graph.nodes]
        assert any("lora_kernels.forward" in name for name in names)
        x = torch.randn(40, 16, device=device)
        torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_casting_by_hand(dtype, device):
    inputs, dy = inputs_of(device)
    cast = [t.detach().to(dtype).requires_grad_() for t in inputs]
    with torch.autocast(device, dtype=dtype):
        y = lora_linear(*inputs)
        assert y.dtype == dtype
    grads = torch.autograd.grad(y, inputs, dy.to(dtype))
    expected = torch.autograd.grad(lora_linear(*cast), cast, dy.to(dtype))
    for a, b in zip(grads, expected, strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_mask_bit_for_bit(reentrant, device):
    inputs, dy = inputs_of(device)

    def stored(*tensors):
        return dropped(*tensors).relu()

    def recomputed(*tensors):
        return checkpoint(stored, *tensors, use_reentrant=reentrant)

    results = []
    for function in (stored, recomputed):
        torch.manual_seed(3)
        copies = [t.detach().clone().requires_grad_() for t in inputs]
        function(*copies).backward(dy)
        results.append([t.grad for t in copies])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.any()


@pytest.mark.parametrize("device", DEVICES)
def test_the_same_call_gives_the_same_bits(device):
    case = Case(130, 72, 136, 16)
    inputs, dy = inputs_of(device, torch.bfloat16, case)
    first, *others = (gradients(dropped, inputs, dy) for _ in range(3))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("device", DEVICES)
def test_the_functional_gradient(device):
    inputs, dy = inputs_of(device)
    plain = [t.detach() for t in inputs]

    def loss(*tensors):
        return (lora_linear(*tensors) * dy).sum()

    ours = torch.func.grad(loss, argnums=(0, 2, 3))(*plain)
    expected = gradients(lora_linear, inputs, dy)
    for a, b in zip(ours, (expected[0], expected[2], expected[3]), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_kernels_do_not_take_is_refused_by_name(device):
    layer = LoRALinear(16, 8, rank=4, device=device, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="float64, the kernels take float32"):
        layer(torch.randn(2, 16, device=device, dtype=torch.float64))
    assert explain(LoRALinear(2048, 2048, rank=513, device=device)).endswith(
        "the rank is 513, the kernels take up to 512. Leave the `with`, or ask for 'reference'."
    )
    assert explain(layer).startswith("none:")
    assert explain(copy.deepcopy(layer).float()) == "triton: asked for by use_backend"


class Seen(TorchDispatchMode):
    """Notes the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_who_watches_operators_sees_ours_and_the_same_results(dropout_p, device):
    inputs, dy = inputs_of(device)

    def call(*tensors):
        return lora_linear(*tensors, scale=0.7, dropout_p=dropout_p, training=True)

    alone = gradients(call, inputs, dy)
    with Seen() as seen:
        watched = gradients(call, inputs, dy)
    assert {"lora_kernels.forward.default", "lora_kernels.backward.default"} <= set(seen.names)
    with profile(acc_events=True) as profiled:  # torch 2.11 warns without
        gradients(call, inputs, dy)
    assert {"lora_kernels::forward", "lora_kernels::backward"} <= {
        e.name for e in profiled.events()
    }
    for one, other in zip(alone, watched, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("device", DEVICES)
def test_where_nobody_watches_the_dispatcher_is_not_asked(device, monkeypatch):
    inputs, dy = inputs_of(device)

    def never(*_):
        raise AssertionError("torch's dispatcher was asked")

    monkeypatch.setattr(torch.ops.lora_kernels, "forward", never)
    monkeypatch.setattr(torch.ops.lora_kernels, "backward", never)
    gradients(dropped, inputs, dy)
