"""A live PEFT model made to run on these kernels: what is taken, and that PEFT goes on working."""

from __future__ import annotations

import contextlib
import copy
import io
import pickle
import sys

import pytest
import torch
import transformers
from tiny_peft import TOKENS, base, logits, recompute_activations
from torch import nn

from lora_kernels import accelerate_peft, load_lora

peft = pytest.importorskip("peft")

from peft.tuners.lora.layer import Linear  # noqa: E402
from tiny_peft_model import WAYS, config, fill_lora, gradients, kinds, layers, pair, same  # noqa: E402

from lora_kernels import adapters  # noqa: E402
from lora_kernels.adapters import peft_layer  # noqa: E402
from lora_kernels.adapters.peft_layer import FastLinear  # noqa: E402

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("name", WAYS)
def test_a_whole_model_gives_the_same_logits_and_gradients(name):
    stock, ours = pair(name)
    assert kinds(ours) == {FastLinear} and kinds(stock) == {Linear}
    assert (logits(base(name)) - logits(stock)).abs().max() > 1e-2
    same(ours, stock)
    if name == "minimind":
        return  # it takes no labels
    expected, got = gradients(stock), gradients(ours)
    assert got.keys() == expected.keys() and len(got) == 12
    for key, gradient in got.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-4, atol=1e-7)


def test_twice_is_once():
    _, ours = pair()
    before = [layer.__dict__.copy() for layer in layers(ours)]
    again = accelerate_peft(ours)
    assert len(again.taken) == 6 and kinds(ours) == {FastLinear}
    assert [layer.__dict__ for layer in layers(ours)] == before


def test_undo_leaves_nothing_behind():
    stock, ours = pair()
    report = accelerate_peft(ours, undo=True)
    assert (
        kinds(ours) == {Linear}
        and not report.taken
        and set(report.left.values()) == {"acceleration undone"}
    )
    for a, b in zip(layers(ours), layers(stock), strict=True):
        assert a.__dict__.keys() == b.__dict__.keys()
    assert torch.equal(logits(ours), logits(stock))
    assert len(accelerate_peft(ours).taken) == 6


def test_a_copy_is_independent_and_accelerated():
    stock, ours = pair()
    twin = copy.deepcopy(ours)
    assert kinds(twin) == {FastLinear}
    fill_lora(twin)
    same(ours, stock)
    assert not torch.allclose(logits(twin), logits(ours))
    accelerate_peft(twin, undo=True)
    assert kinds(ours) == {FastLinear} and kinds(twin) == {Linear}


def test_pickles_and_comes_back_accelerated():
    stock, ours = pair()
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    buffer.seek(0)
    for back in (pickle.loads(pickle.dumps(ours)), torch.load(buffer, weights_only=False)):
        assert kinds(back) == {FastLinear}
        same(back, stock)


def test_a_pickle_finds_its_class_by_itself(monkeypatch):
    _, ours = pair()
    pickled = pickle.dumps(layers(ours)[0])
    monkeypatch.delitem(sys.modules, peft_layer.__name__)
    monkeypatch.setattr(adapters, "peft_layer", peft_layer)  # to come back to afterwards
    back = pickle.loads(pickled)
    assert type(back).__name__ == "FastLinear" and type(back) is not FastLinear
    x = torch.randn(2, 32)
    torch.testing.assert_close(back(x), layers(ours)[0](x))


def test_saved_files_are_the_same_and_load_on_all_sides(tmp_path):
    stock, ours = pair()
    stock.save_pretrained(tmp_path / "stock", save_embedding_layers=False)
    ours.save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    names = {p.name for p in (tmp_path / "stock").iterdir()}
    assert names == {p.name for p in (tmp_path / "ours").iterdir()}
    tensors = "adapter_model.safetensors"
    assert (tmp_path / "ours" / tensors).read_bytes() == (tmp_path / "stock" / tensors).read_bytes()
    fresh = peft.PeftModel.from_pretrained(base("llama"), tmp_path / "ours").eval()
    assert torch.equal(logits(fresh), logits(stock))
    # Into an accelerated model, and into one of ours.
    fill_lora(ours)
    ours.load_adapter(tmp_path / "stock", "default")
    same(ours, stock)
    plain = base("llama")
    load_lora(plain, tmp_path / "ours")
    same(plain, stock)


def test_merging_and_unmerging():
    stock, ours = pair()
    before = logits(ours)
    for model in (stock, ours):
        model.merge_adapter()
    assert all(isinstance(layer.parts(), str) for layer in layers(ours))
    assert torch.equal(logits(ours), logits(stock))
    for model in (stock, ours):
        model.unmerge_adapter()
    assert not any(isinstance(layer.parts(), str) for layer in layers(ours))
    torch.testing.assert_close(logits(ours), before, rtol=0, atol=1e-6)
    merged = ours.merge_and_unload()
    assert not layers(merged) and {
        type(m) for n, m in merged.named_modules() if n.endswith("q_proj")
    } == {nn.Linear}
    same(merged, stock)


def test_accelerating_what_is_merged_or_disabled_now():
    stock, ours = pair()
    accelerate_peft(ours, undo=True)
    ours.merge_adapter()
    report = accelerate_peft(ours)
    assert len(report.taken) == len(report.handing_over) == 6
    ours.unmerge_adapter()
    same(ours, stock)
    assert not accelerate_peft(ours).handing_over


def test_adding_switching_disabling_deleting():
    stock, ours = pair()
    first = logits(ours)
    for model in (stock, ours):
        torch.manual_seed(5)
        model.add_adapter(
            "second", config(r=2, use_rslora=True, target_modules=["q_proj", "o_proj"])
        )
        model.set_adapter("second")
        fill_lora(model).eval()
    assert kinds(ours) == {FastLinear, Linear}  # o_proj came later
    same(ours, stock)
    assert len(accelerate_peft(ours).taken) == 8 and kinds(ours) == {FastLinear}
    same(ours, stock)
    second = logits(ours)
    assert not torch.allclose(first, second)
    with contextlib.ExitStack() as stack:
        for model in (stock, ours):
            stack.enter_context(model.disable_adapter())
        assert torch.equal(logits(ours), logits(stock))
        assert torch.equal(logits(ours), logits(base("llama")))
    assert torch.equal(logits(ours), second)
    for model in (stock, ours):
        model.base_model.set_adapter(["default", "second"])
    same(ours, stock)
    for model in (stock, ours):
        model.set_adapter("default")
        model.delete_adapter("second")
    same(ours, stock)
    for model in (stock, ours):
        model.base_model.delete_adapter("default")
    assert torch.equal(logits(ours.base_model.model), logits(base("llama")))
    assert not layers(ours.unload())


def test_several_adapters_in_a_batch():
    stock, ours = pair()
    names = ["default", "__base__"]
    with torch.no_grad():
        expected = stock(input_ids=TOKENS, adapter_names=names).logits
        assert torch.equal(ours(input_ids=TOKENS, adapter_names=names).logits, expected)
    torch.testing.assert_close(expected[1], logits(base("llama"))[1])
    same(ours, stock)  # and the hooks that pass the names are gone


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_adapters_of_transformers_itself():
    stock = base("qwen2")
    try:
        stock.add_adapter(config("qwen2"), adapter_name="default")
    except ValueError as refusal:  # by some releases, of every peft that there is yet
        assert "version of PEFT" in str(refusal)
        pytest.skip(f"transformers {transformers.__version__}: {refusal}")
    fill_lora(stock).eval()
    ours = copy.deepcopy(stock)
    assert len(accelerate_peft(ours).taken) == 6
    for model in (stock, ours):
        torch.manual_seed(6)
        model.add_adapter(config("qwen2", r=2), adapter_name="second")
        fill_lora(model).eval()
        model.set_adapter("second")
    assert kinds(ours) == {FastLinear}
    same(ours, stock)
    for model in (stock, ours):
        model.disable_adapters()
    assert torch.equal(logits(ours), logits(base("qwen2")))
    for model in (stock, ours):
        model.enable_adapters()
        model.set_adapter("default")
    same(ours, stock)
    for model in (stock, ours):
        model.delete_adapter("second")
    same(ours, stock)


def test_float32_adapters_over_a_bfloat16_model():
    stock, ours = pair(dtype=torch.bfloat16)
    assert {p.dtype for n, p in ours.named_parameters() if ".lora_" in n} == {torch.float32}
    truth = copy.deepcopy(stock).double()
    error = (logits(stock).double() - logits(truth)).abs().max()
    assert (logits(ours).double() - logits(truth)).abs().max() <= 2 * error
    assert {g.dtype for g in gradients(ours).values()} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_with_dropout_equals_none(use_reentrant):
    _, ours = pair(lora_dropout=0.5)
    ours.train()
    torch.manual_seed(7)
    plain = gradients(ours)
    recompute_activations(ours, use_reentrant)
    ours.enable_input_require_grads()
    torch.manual_seed(7)
    for name, gradient in gradients(ours).items():
        # Other masks would be far off; transformers 4 rounds otherwise with its cache.
        torch.testing.assert_close(gradient, plain[name], rtol=1e-5, atol=1e-7)


# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_and_follows_changes():
    torch._dynamo.reset()
    stock, ours = pair()
    layer, theirs = layers(ours)[0], layers(stock)[0]
    x = torch.randn(3, 32)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), theirs(x))
    torch.testing.assert_close(
        torch.autograd.grad(run(x).square().sum(), list(layer.lora_A.parameters())),
        torch.autograd.grad(theirs(x).square().sum(), list(theirs.lora_A.parameters())),
    )
    for change in (
        lambda m: m.set_scale("default", 3.0),
        lambda m: m.set_scale("default", 0.7),
        lambda m: m.merge(),
        lambda m: m.unmerge(),
        lambda m: m.enable_adapters(False),
        lambda m: m.enable_adapters(True),
    ):
        change(layer), change(theirs)
        torch.testing.assert_close(run(x), theirs(x))


# The same, and tokens reach the whole model.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_whole_model_compiles():
    torch._dynamo.reset()
    stock, ours = pair("qwen2")
    same(torch.compile(ours, fullgraph=True, backend="aot_eager"), stock)
