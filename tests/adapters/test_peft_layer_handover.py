"""What `FastLinear` must leave to PEFT's own forward, with the same bits or the same error."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear
from tiny_peft_layer import K, N, count_served, pair, results

from lora_kernels.adapters import peft_layer

SPLIT = ["default", "second", "__base__"]  # which adapter serves which row


@pytest.fixture
def served(monkeypatch):
    return count_served(monkeypatch)


def hook(place):
    return lambda layer: place(layer).register_forward_hook(lambda m, args, y: 2 * y)


def base_of(layer):
    return layer.base_layer


def a_of(layer):
    return layer.lora_A["default"]


def b_of(layer):
    return layer.lora_B["default"]


def dropout_of(layer):
    return layer.lora_dropout["default"]


def replaced_forward(layer):
    real = layer.base_layer.forward
    layer.base_layer.forward = lambda x: real(x) + 1


class Doubling(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Ordinary(torch.Tensor):
    """A subclass that happens to do nothing."""


def subclass_weight(layer):
    weight = layer.base_layer.weight.detach().as_subclass(Ordinary)
    layer.base_layer.weight = nn.Parameter(weight, requires_grad=False)


def set_scaling(layer):
    layer.scaling["default"] = torch.tensor(1.5)


def doubling_a(layer):
    a_of(layer).__class__ = Doubling


def doubling_b(layer):
    b_of(layer).__class__ = Doubling


def bias_of_a(layer):
    a_of(layer).bias = nn.Parameter(torch.ones(4))


def other_dropout(layer):
    layer.lora_dropout["default"] = nn.Softshrink()


def transposed(layer):
    layer.fan_in_fan_out = True


def ungraded_backward_hook(layer):
    layer.base_layer.register_full_backward_hook(lambda m, dx, dy: (3 * dx[0],))


def backward_pre_hook(layer):
    b_of(layer).register_full_backward_pre_hook(lambda m, dy: (3 * dy[0],))


def both_active(layer):
    layer.set_adapter(["default", "second"])


def pre_hook(layer):
    a_of(layer).register_forward_pre_hook(lambda m, args: (args[0] + 1,))


# name: (what is done to both layers, settings of the config, arguments of the call, the reason)
HANDED_OVER = {
    "adapter_names": (None, {}, {"adapter_names": SPLIT}, None),
    "adapters disabled": (lambda m: m.enable_adapters(False), {}, {}, "disabled"),
    "merged": (lambda m: m.merge(), {}, {}, "merged"),
    "two, one of DoRA": (both_active, {"use_dora": True}, {}, "not plain LoRA"),
    "none active": (lambda m: m.set_adapter("elsewhere"), {}, {}, "none of its adapters"),
    "DoRA": (None, {"use_dora": True}, {}, "not plain LoRA .DoraLinearVariant"),
    "lora_bias": (None, {"lora_bias": True}, {}, "has a bias"),
    "fan_in_fan_out": (transposed, {}, {}, "fan_in_fan_out"),
    "base of a subclass": (None, {"base": Doubling}, {}, "its base is a Doubling"),
    "A of a subclass": (doubling_a, {}, {}, "lora_A or lora_B is not exactly"),
    "B of a subclass": (doubling_b, {}, {}, "lora_A or lora_B is not exactly"),
    "bias of A": (bias_of_a, {}, {}, "has a bias"),
    "weight of a subclass": (subclass_weight, {}, {}, "a Ordinary, not an ordinary"),
    "tensor scaling": (set_scaling, {}, {}, "scaling is a Tensor"),
    "another dropout": (other_dropout, {}, {}, "dropout is a Softshrink"),
    "dropout of everything": (None, {"lora_dropout": 1.0}, {}, "drops everything"),
    "hook on the base": (hook(base_of), {}, {}, "a hook or"),
    "hook on A": (hook(a_of), {}, {}, "a hook or"),
    "hook on B": (hook(b_of), {}, {}, "a hook or"),
    "hook on the dropout": (hook(dropout_of), {}, {}, "a hook or"),
    "pre-hook on A": (pre_hook, {}, {}, "a hook or"),
    "backward hook on the base": (ungraded_backward_hook, {}, {}, "a hook or"),
    "backward pre-hook on B": (backward_pre_hook, {}, {}, "a hook or"),
    "replaced forward": (replaced_forward, {}, {}, "a hook or"),
}


@pytest.mark.parametrize("case", HANDED_OVER)
def test_handed_over_with_the_same_bits(served, case):
    change, settings, arguments, reason = HANDED_OVER[case]
    stock, ours = pair(**settings)
    for layer in (stock, ours):
        if change:
            change(layer)
    if reason:
        assert isinstance(ours.parts(), str)
        with pytest.raises(AssertionError, match=reason):
            raise AssertionError(ours.parts())
    x = torch.randn(3, K)
    expected, got = results(stock, x, **arguments), results(ours, x, **arguments)
    assert not served
    assert got.keys() == expected.keys()
    for name, value in got.items():
        assert (value is None) == (expected[name] is None), name
        assert value is None or torch.equal(value, expected[name]), name


def test_hooks_on_every_module_see_the_inner_ones(served):
    _, ours = pair()
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        ours(torch.randn(2, K))
    finally:
        handle.remove()
    assert not served and ours.base_layer in seen and a_of(ours) in seen
    ours(torch.randn(2, K))
    assert len(served) == 1


def test_hooks_on_the_layer_itself_run_as_ever(served):
    _, ours = pair()
    plain = ours(torch.ones(2, K))
    ours.register_forward_hook(lambda m, args, y: y + 1)
    assert torch.equal(ours(torch.ones(2, K)), plain + 1)
    assert len(served) == 2


def double_bias(layer):
    layer.base_layer.bias = nn.Parameter(torch.ones(N, dtype=torch.float64), requires_grad=False)


# What cannot be computed raises what PEFT raises.
IMPOSSIBLE = {
    "x of another dtype": ({}, None, torch.randn(2, K).bfloat16()),
    "integer x": ({}, None, torch.ones(2, K, dtype=torch.long)),
    "x of another width": ({}, None, torch.randn(2, K + 1)),
    "x without dimensions": ({}, None, torch.tensor(1.0)),
    "x elsewhere": ({}, None, torch.empty(2, K, device="meta")),
    "factors of two dtypes": ({}, lambda m: b_of(m).double(), torch.randn(2, K)),
    "bias of another dtype": ({}, double_bias, torch.randn(2, K)),
    "casting switched off": (
        {"dtype": torch.bfloat16},
        lambda m: setattr(m, "cast_input_dtype_enabled", False),
        torch.randn(2, K).bfloat16(),
    ),
    "int8 weight": (
        {},
        lambda m: setattr(
            m.base_layer,
            "weight",
            nn.Parameter(torch.ones(N, K, dtype=torch.int8), requires_grad=False),
        ),
        torch.randn(2, K),
    ),
    "gathered weight": (
        {},
        lambda m: setattr(m.base_layer, "weight", nn.Parameter(torch.empty(0))),
        torch.randn(2, K),
    ),
    "A of another width": (
        {},
        lambda m: setattr(a_of(m), "weight", nn.Parameter(torch.ones(4, K - 1))),
        torch.randn(2, K),
    ),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_what_peft_cannot_do_raises_what_peft_raises(served, case):
    settings, change, x = IMPOSSIBLE[case]
    stock, ours = pair(**settings)
    for layer in (stock, ours):
        if change:
            change(layer)
    with pytest.raises((RuntimeError, IndexError)) as expected:
        stock(x)
    with pytest.raises(type(expected.value)) as got:
        ours(x)
    assert str(got.value) == str(expected.value)
    assert not served


def test_more_positions_and_whole_numbers_under_autocast_raise_what_peft_raises(served):
    stock, ours = pair()
    for layer in (stock, ours):
        with pytest.raises(TypeError, match="takes 2 positional arguments but 3 were given"):
            layer(torch.randn(2, K), 1)
        with pytest.raises(RuntimeError), torch.autocast("cpu", torch.bfloat16):
            layer(torch.ones(2, K, dtype=torch.long))
    assert not served


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
def test_complex_numbers(served):
    stock, ours = (layer.to(torch.complex64) for layer in pair())
    assert ours.parts() == "a weight of it is torch.complex64"
    x = torch.randn(2, K, dtype=torch.complex64)
    assert torch.equal(ours(x), stock(x)) and not served


@pytest.mark.filterwarnings("ignore:.*(nested tensors|Sparse CSR).*:UserWarning")
def test_nested_and_sparse_inputs(served):
    stock, ours = pair(base_bias=False)
    for layer in (stock, ours):
        layer.requires_grad_(False)
    rows = [torch.randn(2, K), torch.randn(3, K)]
    nested = torch.nested.nested_tensor(rows)
    for a, b in zip(ours(nested).unbind(), stock(nested).unbind(), strict=True):
        assert torch.equal(a, b)
    sparse = torch.eye(K).to_sparse()
    assert torch.equal(ours(sparse).to_dense(), stock(sparse).to_dense())
    assert not served


def test_x_of_a_subclass_comes_back_as_peft_returns_it(served):
    stock, ours = pair()
    x = torch.randn(2, K).as_subclass(Ordinary)
    assert type(ours(x)) is type(stock(x)) is Ordinary and not served


def test_float64_under_autocast(served):
    stock, ours = pair(torch.float64)
    x = torch.randn(2, K, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ours(x), stock(x)) and not served


def test_the_meta_device(served):
    stock, ours = (layer.to("meta") for layer in pair())
    y = ours(torch.empty(2, 3, K, device="meta"))
    assert y.is_meta and y.shape == (2, 3, N) and not served
    assert "meta" in ours.parts()
    stock, ours = pair()
    for layer in (stock, ours):
        a_of(layer).to("meta")
    assert ours(torch.empty(2, K)).is_meta == stock(torch.empty(2, K)).is_meta and not served


def test_dtensor_weights(served):
    import torch.distributed as dist
    from torch.distributed.tensor import DTensor, distribute_module, init_device_mesh

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        stock, ours = (distribute_module(layer, mesh) for layer in pair())
        x = DTensor.from_local(torch.randn(3, K), mesh)
        assert "DTensor" in ours.parts()
        assert torch.equal(ours(x).to_local(), stock(x).to_local()) and not served
    finally:
        dist.destroy_process_group()


@pytest.mark.filterwarnings("ignore:`torch.jit.trace")
def test_transforms_and_tracing_are_left_to_peft(served):
    stock, ours = pair()
    x = torch.randn(3, K)

    def gradient(layer):
        return torch.func.grad(lambda x: layer(x).square().sum())(x)

    assert torch.equal(gradient(ours), gradient(stock))
    per_row = torch.func.vmap(torch.func.grad(lambda row: ours(row).sum()))(x)
    torch.testing.assert_close(per_row, torch.func.grad(lambda x: stock(x).sum())(x))
    assert torch.equal(torch.jit.trace(ours, x, check_trace=False)(x), stock(x))
    assert not served


@pytest.mark.parametrize("cls", [Linear, nn.Linear], ids=["PEFT's", "torch's"])
def test_a_forward_put_on_the_class_later_is_called(served, monkeypatch, cls):
    """By a library that patches classes, for as long as it does."""
    stock, ours = pair()
    x, before = torch.randn(3, K), cls.forward
    unpatched = ours(x)
    served.clear()
    with monkeypatch.context() as patch:
        patch.setattr(cls, "forward", lambda self, x, *args, **kw: 2 * before(self, x, *args, **kw))
        assert torch.equal(ours(x), stock(x)) and not torch.allclose(ours(x), unpatched)
        assert not served and "replaced on the class" in ours.parts()
    assert torch.equal(ours(x), unpatched) and served


def test_a_forward_put_on_the_class_before_is_seen(monkeypatch):
    """Also where functools.wraps has given it the name and module of the one that it replaces."""
    assert peft_layer._own_forward(nn.Linear) is nn.Linear.forward
    before = nn.Linear.forward
    patched = functools.wraps(before)(lambda self, x: 2 * before(self, x))
    monkeypatch.setattr(nn.Linear, "forward", patched)
    assert peft_layer._own_forward(nn.Linear) is None
