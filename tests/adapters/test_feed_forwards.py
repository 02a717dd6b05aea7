"""Feed-forwards of whole models, each computed as a whole."""

from __future__ import annotations

import copy
import functools
import io
import pickle

import pytest
import torch
from tiny_families import ATTENTION, FAMILIES, MLP, assert_rounding_apart, both, family, results
from tiny_peft import TOKENS, fill, recompute_activations
from torch import nn

from lora_kernels import (
    accelerate_peft,
    apply_lora,
    disable_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
    use_lora,
)
from lora_kernels.adapters import feed_forwards as whole
from lora_kernels.adapters.feed_forwards import (
    feed_forwards,
    fuse_feed_forwards,
    part_feed_forwards,
)


@pytest.fixture
def calls(monkeypatch):
    """The positional arguments of every call of `lora_feed_forward`."""
    made, function = [], whole.lora_feed_forward

    def counted(*args, **kwargs):
        made.append((args, kwargs))
        return function(*args, **kwargs)

    monkeypatch.setattr(whole, "lora_feed_forward", counted)
    return made


def targets_of(name):
    return FAMILIES[name][2] if name == "qwen2_moe" else ATTENTION + MLP


@functools.cache
def prepared(name="llama", dropout=0.0, dtype=torch.float32, targets=None):
    model = family(name, dtype)
    targets = targets_of(name) if targets is None else list(targets)
    settings = {"dropout": dropout, "target_modules": targets, "lora_dtype": dtype}
    apply_lora(model, 4, alpha=6, verbose=False, group=False, **settings)
    mark_only_lora_as_trainable(model)
    fill(lora_parameters(model))
    return model


def model_of(name="llama", **settings):
    return copy.deepcopy(prepared(name, **settings))


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients_are_the_models_own(name, calls):
    model = model_of(name)
    keys, text = list(model.state_dict()), str(model)
    own = results(model)
    names = fuse_feed_forwards(model)
    end = ".shared_expert" if name == "qwen2_moe" else ""
    assert names == [f"model.layers.{i}.mlp{end}" for i in (0, 1)] == feed_forwards(model)
    assert_rounding_apart(results(model), own)
    assert len(calls) == 2
    assert list(model.state_dict()) == keys and str(model) == text
    for name in names:
        module = model.get_submodule(name)
        base = type(module)._lora_base
        assert isinstance(module, base) and type(module).__name__ == base.__name__
    assert fuse_feed_forwards(model) == names
    part_feed_forwards(model)
    again = results(model)
    assert len(calls) == 2 and all(torch.equal(again[key], own[key]) for key in own)


@pytest.mark.parametrize(
    "targets", [("gate_proj",), ("down_proj",), ("up_proj", "q_proj")], ids=str
)
def test_lora_on_some_of_the_three(targets, calls):
    model = model_of(targets=targets)
    own = results(model)
    assert len(fuse_feed_forwards(model)) == 2
    assert_rounding_apart(results(model), own)
    assert len(calls) == 2


def test_without_lora_there_is_none_to_find():
    assert feed_forwards(family("llama")) == []
    assert fuse_feed_forwards(model_of(targets=("q_proj", "v_proj"))) == []


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in PEFT
def test_peft_layers_are_served_once_accelerated(calls):
    _, theirs = both("llama")
    assert feed_forwards(theirs) == []
    accelerate_peft(theirs)
    own = results(theirs)
    assert len(fuse_feed_forwards(theirs)) == 2
    assert_rounding_apart(results(theirs), own)
    assert len(calls) == 2
    theirs.disable_adapter_layers()
    results_off = theirs(TOKENS).logits
    assert len(calls) == 2 and not torch.allclose(results_off, own["logits"])
    theirs.enable_adapter_layers()
    accelerate_peft(theirs, undo=True)
    assert_rounding_apart(results(theirs), own)
    assert len(calls) == 2


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "gelu_new", "silu", "gelu_python"])
def test_activations_of_transformers(act, calls):
    from transformers.activations import ACT2FN

    model = model_of()
    for layer in model.model.layers:
        layer.mlp.act_fn = ACT2FN[act]
    own = results(model)
    assert len(fuse_feed_forwards(model)) == 2
    assert_rounding_apart(results(model), own)
    assert len(calls) == 2


@pytest.mark.parametrize(
    "act", [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU(), nn.Sigmoid()], ids=str
)
def test_activations_of_torch(act, calls):
    model = model_of()
    for layer in model.model.layers:
        layer.mlp.act_fn = act
    own = results(model)
    known = isinstance(act, (nn.GELU, nn.SiLU))
    assert len(fuse_feed_forwards(model)) == (2 if known else 0)
    assert_rounding_apart(results(model), own)
    assert len(calls) == (2 if known else 0)


def first(model):
    return model.model.layers[0].mlp


def hooked(where, kind):
    def change(model):
        module = first(model) if where == "mlp" else getattr(first(model), where)
        getattr(module, f"register_{kind}")(lambda module, *given: None)

    return change


def double(layer):
    forward = layer.forward
    layer.forward = lambda x: 2 * forward(x)


def replaced(name, value):
    return lambda model: setattr(first(model), name, value(getattr(first(model), name)))


def other_dropout(model):
    first(model).up_proj.set_dropout(0.4)
    first(model).train()


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def of_another_class(model):
    first(model).gate_proj.__class__ = type(
        "Mine",
        (type(first(model).gate_proj),),
        {
            "forward": lambda self, x: x @ self.weight.t(),
        },
    )


ALONE = {
    "a hook on gate": hooked("gate_proj", "forward_hook"),
    "a hook before up": hooked("up_proj", "forward_pre_hook"),
    "a backward hook on down": hooked("down_proj", "full_backward_hook"),
    "a hook before backward on down": hooked("down_proj", "full_backward_pre_hook"),
    "a hook on the activation": hooked("act_fn", "forward_hook"),
    "a replaced forward": lambda model: double(first(model).gate_proj),
    "another class": of_another_class,
    "a replaced activation": replaced("act_fn", lambda act: nn.ReLU()),
    "unlike dropout": other_dropout,
    "two adapters": lambda model: use_lora(model, ["default", "other"]),
    "none in use": lambda model: use_lora(model, None),
    "one child for two": replaced("up_proj", lambda up: up),
}


@pytest.mark.parametrize("case", ALONE)
def test_the_modules_own_forward_serves(case, calls):
    """Whatever came after: each call looks anew."""
    model = model_of()
    if case == "two adapters":
        more = ATTENTION + MLP
        apply_lora(model, 2, target_modules=more, name="other", verbose=False)
        fill(lora_parameters(model, "other"))
    twin = copy.deepcopy(model)
    fuse_feed_forwards(model)
    for each in (model, twin):
        ALONE[case](each)
        if case == "one child for two":
            first(each).up_proj = first(each).gate_proj
    served = {"two adapters": 0, "none in use": 0}.get(case, 1)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(3)
        outputs.append(each(TOKENS).logits)
    assert len(calls) == served
    assert_rounding_apart({"logits": outputs[0]}, {"logits": outputs[1]})


def test_a_hook_on_the_module_itself_runs(calls):
    model, seen = model_of(), []
    fuse_feed_forwards(model)
    first(model).register_forward_hook(lambda module, inputs, y: seen.append(y.shape))
    first(model).register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    model(TOKENS)
    assert len(calls) == 2 and len(seen) == 2


def test_a_hook_on_every_module_runs(calls):
    model, seen = model_of(), []
    fuse_feed_forwards(model)
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, y: seen.append(m))
    try:
        model(TOKENS)
    finally:
        handle.remove()
    assert first(model).gate_proj in seen and not calls


def test_a_forward_put_on_the_class_later_is_called(calls, monkeypatch):
    model = model_of()
    fuse_feed_forwards(model)
    base = type(first(model))._lora_base
    monkeypatch.setattr(
        base, "forward", lambda self, x: self.up_proj(x) @ self.down_proj.weight.t()
    )
    model(TOKENS)
    assert not calls


def test_nothing_is_found_where_a_child_is_watched():
    model = model_of()
    first(model).gate_proj.register_forward_hook(lambda *given: None)
    assert fuse_feed_forwards(model) == ["model.layers.1.mlp"]


@pytest.mark.parametrize("way", ["deepcopy", "copy", "pickle", "save"])
def test_copies_and_pickles_are_whole_too(way, calls):
    model = model_of()
    fuse_feed_forwards(model)
    own = model(TOKENS).logits.detach()
    if way == "save":
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    else:
        ways = {"deepcopy": copy.deepcopy, "copy": copy.copy}
        other = ways.get(way, lambda model: pickle.loads(pickle.dumps(model)))(model)
    calls.clear()
    assert torch.equal(other(TOKENS).logits, own) and len(calls) == 2
    part_feed_forwards(other)
    assert type(first(other)).__module__.startswith("transformers")
    if way != "copy":
        assert feed_forwards(other) and type(first(model)) is not type(first(other))
        with torch.no_grad():
            first(other).gate_proj.lora.B.weight.zero_()
        assert torch.equal(model(TOKENS).logits, own)


def test_merged_disabled_and_removed(calls):
    model = model_of()
    fuse_feed_forwards(model)
    own = model(TOKENS).logits
    calls.clear()
    with merged_lora(model):
        assert_rounding_apart({"y": model(TOKENS).logits}, {"y": own})
    with disable_lora(model):
        bare = model(TOKENS).logits
    assert not calls and not torch.allclose(bare, own)
    other = copy.deepcopy(model)
    merge_lora(other)
    assert_rounding_apart({"y": other(TOKENS).logits}, {"y": own})
    remove_lora(model)
    assert torch.equal(model(TOKENS).logits, bare) and not calls


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, calls):
    model = model_of(dropout=0.2).train()
    fuse_feed_forwards(model)
    torch.manual_seed(5)
    own = results(model)
    assert len(calls) == 2
    recompute_activations(model, use_reentrant)
    torch.manual_seed(5)
    found = results(model)
    assert len(calls) == 6  # forward once more, in backward
    assert all(torch.equal(found[key], own[key]) for key in own)


def test_dropout_is_the_modules_where_it_trains(calls):
    model = model_of(dropout=0.5).train()
    fuse_feed_forwards(model)
    model(TOKENS)
    model.eval()
    model(TOKENS)
    assert [options["dropout_p"] for _, options in calls] == [0.5, 0.5, 0.0, 0.0]


def test_autocast(calls):
    model = model_of()
    with torch.autocast("cpu", torch.bfloat16):
        own = results(model)
    fuse_feed_forwards(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = results(model)
    assert len(calls) == 2
    truth = results(model)
    for key in own:
        distance = [(each[key] - truth[key]).norm() / truth[key].norm() for each in (found, own)]
        assert distance[0] < 1.5 * distance[1] + 1e-3, key


def test_no_grad(calls):
    model = model_of()
    fuse_feed_forwards(model)
    y = model(TOKENS).logits
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert torch.equal(model(TOKENS).logits, y)
    assert len(calls) == 6


# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("training", [False, True])
def test_compiles_whole(training):
    module = first(model_of())
    holder = nn.Sequential(module)
    fuse_feed_forwards(holder)
    x = torch.randn(2, 5, module.gate_proj.in_features, requires_grad=training)
    torch.compiler.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    with torch.set_grad_enabled(training):
        y = torch.compile(module, fullgraph=True, backend=count)(x)
        torch.testing.assert_close(y, module(x))
        if training:
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            ours = torch.autograd.grad(compiled(x).square().sum(), x)
            torch.testing.assert_close(ours, torch.autograd.grad(module(x).square().sum(), x))
    assert len(graphs) == 1


def test_a_class_derived_of_ours_is_left_as_it_is():
    """As sharding makes one, which would be lost."""
    model = model_of()
    fuse_feed_forwards(model)
    mine = type("Sharded", (type(first(model)),), {})
    first(model).__class__ = mine
    part_feed_forwards(model)
    assert type(first(model)) is mine
    assert type(model.model.layers[1].mlp).__dict__.get("_lora_base") is None
