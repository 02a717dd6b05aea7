"""Layers that read one tensor: computed together, and each as by itself whatever happens."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from lora_kernels import LoRALinear, use_backend
from lora_kernels.group.siblings import Siblings

SIZES = (8, 4, 6)


def make(dropout=0.0, grouped=True, **options):
    torch.manual_seed(1)
    layers = nn.ModuleList(
        LoRALinear(8, n, bias=n == 4, rank=2, alpha=3.0, dropout=dropout) for n in SIZES
    )
    for layer in layers:
        nn.init.normal_(layer.lora.B.weight)
    if grouped:
        Siblings(list(layers), **options)
    return layers


def an_input(rows=3):
    return torch.randn(rows, 8, requires_grad=True)


def kept_of(layers):
    """What this thread has made ahead."""
    return layers[0]._lora_siblings._kept.get(threading.get_ident())


def is_grouped(*ys):
    """Whether they came of one call."""
    names = {y.grad_fn.name() for y in ys}
    return names == {"_GroupBackward"} and len({y.grad_fn for y in ys}) == 1


def gradients(ys, x, layers):
    return torch.autograd.grad(
        sum(y.square().sum() for y in ys), [x, *layers.parameters()], allow_unused=True
    )


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)], ids=str)
def test_whoever_is_first_computes_for_all(order):
    layers, alone, x = make(), make(grouped=False), an_input()
    ys = [layers[i](x) for i in order]
    assert is_grouped(*ys)
    expected = [alone[i](x) for i in order]
    same(ys, expected)
    same(gradients(ys, x, layers), gradients(expected, x, alone))
    assert not layers[0]._lora_siblings._kept


def test_a_layer_that_comes_with_another_tensor_a_second_time_or_not_at_all():
    layers, alone = make(), make(grouped=False)
    for _ in range(3):
        x, z = an_input(), an_input()
        order = [(0, x), (0, x), (1, z), (2, x), (1, x)]
        same([layers[i](t) for i, t in order], [alone[i](t) for i, t in order])


CHANGES = {
    "x": lambda layers, x: x.add_(1.0),
    "a base weight": lambda layers, x: layers[1].weight.mul_(2.0),
    "B": lambda layers, x: layers[1].lora.B.weight.mul_(2.0),
    "another B": lambda layers, x: setattr(
        layers[1].lora.B, "weight", nn.Parameter(torch.ones(4, 2))
    ),
    "what is trained": lambda layers, x: layers[1].weight.requires_grad_(False),
    "the weight of the adapter": lambda layers, x: layers[1].use_adapters({"default": 0.5}),
    "the adapter in use": lambda layers, x: layers[1].use_adapters({}),
    "the state": lambda layers, x: setattr(layers[1], "_lora_state", "disabled"),
    "dropout": lambda layers, x: layers[1].set_dropout(0.5),
    "the memory of B": lambda layers, x: setattr(layers[1].lora.B.weight, "data", torch.ones(4, 2)),
    "whether x learns": lambda layers, x: x.requires_grad_(),
    "a hook that gives it another tensor": lambda layers, x: layers[1].register_forward_pre_hook(
        lambda module, args: (args[0] * 2,)
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_between_the_calls_counts(change):
    layers, alone = make().eval(), make(grouped=False).eval()
    x = torch.randn(3, 8)
    layers[0](x)
    assert 1 in kept_of(layers).ys
    for these in (layers, alone):
        with torch.no_grad():
            CHANGES[change](these, x if these is layers else torch.zeros(1))
    ours, theirs = layers[1](x), alone[1](x)
    torch.testing.assert_close(ours, theirs)
    assert ours.requires_grad == theirs.requires_grad
    grads = []
    for y, these in ((ours, layers), (theirs, alone)):
        wanted = [p for p in these[1].parameters() if p.requires_grad]
        grads.append(torch.autograd.grad(y.sum(), wanted, allow_unused=True))
    same(*grads)


def test_modes_that_change_between_the_calls():
    layers, x = make(), an_input()
    with torch.no_grad():
        layers[0](x)
    assert layers[1](x).requires_grad
    layers[0](x)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[1](x).dtype == torch.bfloat16
        layers[0](x)
    with torch.autocast("cpu", torch.float16):
        assert layers[1](x).dtype == torch.float16
    with torch.inference_mode():
        layers[0](x)
    with torch.no_grad():
        assert not layers[1](x).is_inference()
    layers[0](x)
    with use_backend("reference"):
        assert 2 in kept_of(layers).ys
        layers[1](x)
    with torch.inference_mode():
        inside = torch.randn(3, 8)
        first = layers[0](inside)
        inside.add_(1.0)
        torch.testing.assert_close(layers[0](inside) - first, layers[0](inside) - first)
        torch.testing.assert_close(layers[1](inside), make(grouped=False)[1](inside))


def test_layers_of_several_dropouts_or_adapters_compute_by_themselves():
    layers, x = make(0.5), an_input()
    layers[1].set_dropout(0.25)
    assert not is_grouped(*(layer(x) for layer in layers))
    layers[1].set_dropout(0.5)
    assert is_grouped(*(layer(x) for layer in layers))
    layers[2].add_adapter("other", layers[2].lora_config)
    layers[2].use_adapters({"default": 1.0, "other": 1.0})
    assert not is_grouped(*(layer(x) for layer in layers))


def test_weights_that_are_elsewhere_for_now():
    """As an offloading hook or FSDP of single layers has them between their calls."""
    layers, alone, x = make(), make(grouped=False), an_input()
    weight = layers[1].weight
    layers[1].weight = nn.Parameter(torch.empty(4, 8, device="meta"))
    torch.testing.assert_close(layers[0](x), alone[0](x))
    layers[1].weight = nn.Parameter(torch.empty(0))
    torch.testing.assert_close(layers[0](x), alone[0](x))
    layers[1].weight = weight
    torch.testing.assert_close(layers[1](x), alone[1](x))


def test_an_input_that_does_not_fit_is_an_error_as_ever():
    layers = make()
    for x, error in ((torch.randn(3, 7), ValueError), (torch.randn(3, 8).half(), TypeError)):
        with pytest.raises(error):
            layers[0](x)
    with pytest.raises(ValueError, match="x must be"):
        layers[0](torch.tensor(1.0))


def test_hooks_of_the_layers_are_called():
    layers, alone, x = make(), make(grouped=False), an_input()
    for these in (layers, alone):
        these[1].register_forward_hook(lambda module, args, y: y * 2)
        these[2].register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    same([layer(x) for layer in layers], [layer(x) for layer in alone])


def test_what_is_left_after_an_exception_is_forgotten_at_the_next_call_of_any():
    layers, others = make(), make()
    layers[0](an_input())  # and then something raises
    kept = weakref.ref(kept_of(layers).ys[1])
    x = an_input()
    for layer in others:
        layer(x)
    gc.collect()
    assert kept() is None and not layers[0]._lora_siblings._kept


def test_what_an_ended_thread_has_left_is_forgotten():
    layers, others = make(), make()
    worker = threading.Thread(target=lambda: layers[0](torch.randn(3, 8)))
    worker.start()
    worker.join()
    for _ in range(2):
        others[0](an_input())
    assert not layers[0]._lora_siblings._kept


def test_backwards_of_their_own_in_turn():
    """As of an actor and a critic, or of heads that take turns."""
    layers, alone, x = make(), make(grouped=False), an_input()
    for these in (layers, alone):
        for layer in these:
            layer(x).sum().backward()
    same([p.grad for p in layers.parameters()], [p.grad for p in alone.parameters()])


def test_a_sibling_in_another_dtype_does_not_matter():
    layers, alone = make(), make(grouped=False)
    layers[1].double()
    x = an_input()
    torch.testing.assert_close(layers[0](x), alone[0](x))
    assert layers[1](x.double()).dtype == torch.float64


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_siblings_of_copies(copied):
    layers, x = make(), an_input()
    layers[0](x)  # and the others not yet
    other = copied(layers)
    assert other[0]._lora_siblings is other[2]._lora_siblings is not layers[0]._lora_siblings
    with torch.no_grad():
        other[1].weight.zero_()
        other[1].lora.B.weight.zero_()
    ys = [layer(x) for layer in other]
    assert is_grouped(*ys)
    torch.testing.assert_close(ys[1], layers[1].bias * 0 + other[1].bias + torch.zeros(3, 4))
    same([layer(x) for layer in layers], [layer(x) for layer in make(grouped=False)])


def test_one_layer_copied_alone_has_no_siblings():
    layers, x = make(), an_input()
    for other in (copy.deepcopy(layers[1]), copy.copy(layers[1])):
        torch.testing.assert_close(other(x), make(grouped=False)[1](x))
    assert is_grouped(*(layer(x) for layer in layers))


def test_a_layer_does_not_keep_the_others_alive():
    layers = make()
    first, gone = layers[0], weakref.ref(layers[1])
    del layers
    gc.collect()
    assert gone() is None
    assert first(an_input()).shape == (3, 8)


BLOCKS = {
    "all": lambda layers, x: torch.cat([layer(x) for layer in layers], 1),
    "one alone": lambda layers, x: layers[0](x).sin(),
    "stopped early": lambda layers, x: layers[0](x).sin().sum() + layers[1](x).sin().sum(),
    "twice": lambda layers, x: layers[0](x).sin() + layers[0](x).cos(),
}


@pytest.mark.parametrize("hooks", [False, True])
@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(use_reentrant, block, hooks):
    """What a recomputed call does is what it did, whatever was left over in between."""
    layers = make(0.5)
    if hooks:
        layers[0].register_full_backward_hook(lambda *_: None)
    for _ in range(4):
        layers.zero_grad()
        x = an_input()
        torch.manual_seed(3)
        y = BLOCKS[block](layers, x)
        plain = gradients([y], x, layers)
        torch.manual_seed(3)
        again = checkpoint(BLOCKS[block], layers, x, use_reentrant=use_reentrant)
        again.square().sum().backward()
        torch.testing.assert_close(y, again)
        same(plain, [x.grad, *(p.grad for p in layers.parameters())])


def test_siblings_in_checkpoints_of_their_own():
    layers, alone = make(), make(grouped=False)
    x = an_input()
    results = []
    for these in (layers, alone):
        ys = [checkpoint(lambda x, m=m: m(x).sin(), x, use_reentrant=False) for m in these]
        results.append(gradients(ys, x, these))
    same(*results)


# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_each_computes_by_itself():
    layers, alone = make(), make(grouped=False)

    class Block(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return torch.cat([layer(x) for layer in self.layers], 1)

    compiled = torch.compile(Block(layers), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = an_input()
        ys, expected = compiled(x), Block(alone)(x)
        torch.testing.assert_close(ys, expected)
        same(gradients([ys], x, layers), gradients([expected], x, alone))
    assert not layers[0]._lora_siblings._kept
    graphs = []

    def look(graph, inputs):
        graphs.append(graph.code)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Block(layers), fullgraph=True, backend=look)(an_input())
    assert graphs[0].count("autograd_function_apply(") == 3


def test_threads_get_each_their_own():
    layers, alone = make(), make(grouped=False)
    inputs = [torch.randn(5, 8) for _ in range(8)]
    expected = [[layer(x) for layer in alone] for x in inputs]
    wrong = []

    def work(x, ys):
        for _ in range(50):
            for layer, y in zip(layers, ys, strict=True):
                if not torch.allclose(layer(x), y, atol=1e-6):
                    wrong.append(x)

    workers = [
        threading.Thread(target=work, args=pair) for pair in zip(inputs, expected, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_only_on_the_devices_it_is_asked_for():
    layers, x = make(devices=("cuda",)), an_input()
    assert not is_grouped(*(layer(x) for layer in layers))


def test_few_rows_on_a_cpu_are_not_worth_it():
    layers = make(devices=("cpu",))
    x, many = an_input(255), an_input(256)
    assert not is_grouped(*(layer(x) for layer in layers))
    assert is_grouped(*(layer(many) for layer in layers))


# torch's own forward mode compiles its decompositions by it.
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_transforms_of_functions():
    layers, alone, x = make(), make(grouped=False), torch.randn(4, 3, 8)
    for transform in (
        lambda f: torch.vmap(torch.func.grad(f))(x),
        lambda f: torch.func.jvp(f, (x,), (x,))[1],
        lambda f: torch.func.hessian(f)(x[0, 0]),
    ):
        results = [
            transform(lambda x, these=these: sum(layer(x).square().sum() for layer in these))
            for these in (layers, alone)
        ]
        torch.testing.assert_close(*results)
