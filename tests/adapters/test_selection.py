"""Several adapters on one model, and which of them it computes with."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from several import ADAPTERS, ON, carrying, fill, merged_by_hand
from tiny_model import IDS, Model, assert_untouched, snapshot
from torch import nn

from lora_kernels import (
    LoRALinear,
    apply_lora,
    disable_lora,
    lora_adapters,
    lora_parameters,
    mark_only_lora_as_trainable,
    merged_lora,
    remove_lora,
    use_lora,
)

CLOSE = {"rtol": 1e-12, "atol": 1e-12}

CHOICES = {
    "one": ("fr", None, {"fr": 1.0}),
    "a list of one": (["tone"], None, {"tone": 1.0}),
    "two": (["fr", "tone"], None, {"fr": 1.0, "tone": 1.0}),
    "weighted": (("tone", "default"), [0.5, -2], {"tone": 0.5, "default": -2.0}),
    "one weighted": ("default", 0.25, {"default": 0.25}),
    "all": (list(ADAPTERS), (1, 0.0, 3.5), {"default": 1.0, "fr": 0.0, "tone": 3.5}),
    "none": (None, None, {}),
    "an empty list": ([], [], {}),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_model_computes_what_was_chosen(choice):
    names, weights, expected = CHOICES[choice]
    model = carrying()
    use_lora(model, names, weights=weights)
    assert lora_adapters(model) == {name: expected.get(name) for name in ADAPTERS}
    torch.testing.assert_close(model(IDS), merged_by_hand(model, expected)(IDS), **CLOSE)


def test_the_first_is_in_use_and_a_further_one_waits():
    model = carrying("fr")
    before = model(IDS)
    assert lora_adapters(model) == {"fr": 1.0}
    carrying("tone", "default", model=model)
    assert lora_adapters(model) == {"fr": 1.0, "tone": None, "default": None}
    assert torch.equal(model(IDS), before)
    assert lora_adapters(Model()) == {}


def test_it_lasts_and_a_with_brings_back_what_was():
    model = carrying()
    use_lora(model, ["fr", "default"], weights=[2, 0.5])
    outer = model(IDS)
    with use_lora(model, "tone"):
        inner = model(IDS)
        with use_lora(model, None):
            assert lora_adapters(model) == dict.fromkeys(ADAPTERS)
        assert torch.equal(model(IDS), inner)
    assert torch.equal(model(IDS), outer)
    with pytest.raises(KeyError), use_lora(model, None):
        raise KeyError
    assert torch.equal(model(IDS), outer)


def test_adapters_may_come_and_go_inside():
    model = carrying("default", "fr")
    use_lora(model, ["default", "fr"])
    with use_lora(model, "fr"):
        carrying("tone", model=model)
        use_lora(model, "tone")
        remove_lora(model, "default")
    assert lora_adapters(model) == {"fr": 1.0, "tone": None}
    with use_lora(model, None):
        remove_lora(model)
    assert lora_adapters(model) == {}


def test_base_alone_is_the_base():
    model = carrying()
    with disable_lora(model):
        base = model(IDS)
    use_lora(model, None)
    assert torch.equal(model(IDS), base)
    with disable_lora(model):
        assert torch.equal(model(IDS), base)
    assert lora_adapters(model) == dict.fromkeys(ADAPTERS)


MISTAKES = {
    "an unknown name": ("de", None, ValueError, "no adapter named 'de'; it has 'default', 'fr'"),
    "twice": (["fr", "fr"], None, ValueError, "names has 'fr' twice"),
    "a number": (3, None, TypeError, "names must be an adapter's name or a list of names, got 3"),
    "numbers": ([1], None, TypeError, r"got \[1\]"),
    "too few": (
        ["fr", "tone"],
        [1.0],
        ValueError,
        "weights must be one number for each name of .*'tone'.*, got 1",
    ),
    "for none": (None, 1.0, ValueError, "weights must be one number for each name of .., got 1"),
    "not finite": ("fr", float("nan"), ValueError, "weights must be finite"),
    "text": ("fr", "1", TypeError, "weights must be a number for each name, got '1'"),
    "a bool": ("fr", True, TypeError, "weights must be a number"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_leave_what_was_in_use(case):
    names, weights, error, message = MISTAKES[case]
    model = carrying()
    use_lora(model, "tone")
    with pytest.raises(error, match=message):
        use_lora(model, names, weights=weights)
    assert lora_adapters(model) == {"default": None, "fr": None, "tone": 1.0}


def test_not_inside_the_other_blocks():
    model = carrying()
    before = model(IDS)
    for block in (disable_lora, merged_lora):
        with block(model), pytest.raises(ValueError, match=f"use_lora inside {block.__name__}"):
            use_lora(model, "fr")
        with block(model), pytest.raises(ValueError, match=f"adapter inside {block.__name__}"):
            apply_lora(model, name="de", verbose=False)
        assert torch.equal(model(IDS), before)


@pytest.mark.parametrize(
    "function", [use_lora, lora_parameters, mark_only_lora_as_trainable, remove_lora]
)
def test_a_model_without_lora_is_said(function):
    with pytest.raises(ValueError, match="call apply_lora or load_lora first"):
        function(Model(), "fr")


def test_the_same_name_twice_is_refused_and_another_is_not():
    model = carrying("default", "fr")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"an adapter named 'fr' already \(on 'blocks.0.q'\)"):
        apply_lora(model, target_modules=["gate"], name="fr", verbose=False)
    with pytest.raises(ValueError, match=r"carries LoRA already .* give the new adapter another"):
        apply_lora(model, target_modules=["gate"], verbose=False)
    for name in ("a.b", "keys", ""):
        with pytest.raises(ValueError, match="name "):
            apply_lora(model, target_modules=["gate"], name=name, verbose=False)
    with pytest.raises(ValueError, match="no module of the model|no module.*'A'"):
        apply_lora(model, target_modules=["A"], name="de", verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("targets", [None, "all-linear", ".*(q|k|gate)", ["q", "k", "gate"]])
def test_targets_are_the_same_on_a_model_that_carries_others(targets):
    settings = {"target_modules": targets, "exclude_modules": ["lm_head", "embed"], "rank": 2}
    expected = apply_lora(Model(), verbose=False, **settings)
    model = carrying()
    assert apply_lora(model, name="de", verbose=False, **settings) == expected
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == [
        n for n in dict.fromkeys(n for n, _ in Model().named_modules())
        if n in {*expected, *(name for names in ON.values() for name in names)}
    ]  # fmt: skip


def test_a_layer_by_itself_is_a_model_too():
    layer = LoRALinear(8, 8, rank=2)
    apply_lora(layer, 3, name="fr", verbose=False)
    fill(layer, ["default", "fr"])
    x = torch.randn(2, 8)
    use_lora(layer, ["default", "fr"])
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    for lora in (layer.lora, layer.loras["fr"]):
        expected = expected + lora(x)
    torch.testing.assert_close(layer(x), expected)
    assert remove_lora(layer, "fr") == [""] and lora_adapters(layer) == {"default": 1.0}
    with pytest.raises(ValueError, match="cannot be replaced from inside"):
        remove_lora(layer, "default")


# --- training -------------------------------------------------------------------------------------


def names_of(model, parameters):
    wanted = {id(p) for p in parameters}
    return {name for name, p in model.named_parameters() if id(p) in wanted}


def factors_of(adapter):
    inner = "lora" if adapter == "default" else f"loras.{adapter}"
    return {f"{name}.{inner}.{f}.weight" for name in ON[adapter] for f in "AB"}


def test_what_is_trained_is_what_is_computed():
    model = carrying()
    assert names_of(model, lora_parameters(model)) == factors_of("default")
    use_lora(model, ["tone", "fr"])
    both = factors_of("tone") | factors_of("fr")
    assert names_of(model, lora_parameters(model)) == both
    mark_only_lora_as_trainable(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == both
    model(IDS).square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == both
    # One that is not in use may be asked for by name, and not be trained.
    assert names_of(model, lora_parameters(model, "default")) == factors_of("default")
    assert names_of(model, lora_parameters(model, ["default", "fr"])) == (
        factors_of("default") | factors_of("fr")
    )
    with pytest.raises(ValueError, match=r"'default' is not in use.*use_lora\(model, 'default'\)"):
        mark_only_lora_as_trainable(model, "default")
    for function in (lora_parameters, mark_only_lora_as_trainable):
        with pytest.raises(ValueError, match="no adapter named 'de'"):
            function(model, "de")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == both
    use_lora(model, None)
    for function in (lora_parameters, mark_only_lora_as_trainable):
        with pytest.raises(ValueError, match="no adapter is in use"):
            function(model)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_one_is_trained_over_another_that_is_frozen(checkpointed):
    """The gradients are those of one adapter over a base into which the other was folded."""
    model = carrying(dropout=0.0)
    use_lora(model, ["fr", "tone"], weights=[1, 0.5])
    mark_only_lora_as_trainable(model, "fr")
    folded = merged_by_hand(model, {"tone": 0.5})
    apply_lora(folded, name="fr", verbose=False, **ADAPTERS["fr"])
    for name in ON["fr"]:
        theirs = model.get_submodule(name).loras["fr"].state_dict()
        folded.get_submodule(name).loras["fr"].load_state_dict(theirs)
    mark_only_lora_as_trainable(folded, "fr")
    gradients = []
    for each in (model, folded):
        hidden = each.embed(IDS).requires_grad_()
        for block in each.blocks:
            if checkpointed:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        each.lm_head(each.gate(hidden)).square().sum().backward()
        gradients.append({n: p.grad for n, p in each.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == factors_of("fr")
    torch.testing.assert_close(gradients[0], gradients[1], **CLOSE)


def test_checkpointing_draws_the_same_masks_again():
    gradients = []
    for checkpointed in (False, True):
        model = carrying("default", "fr", "tone")
        for layer in (m for m in model.modules() if isinstance(m, LoRALinear)):
            for i, (name, config) in enumerate(layer.lora_configs.items()):
                config = type(config)(config.rank, config.alpha, 0.1 + 0.2 * i, config.use_rslora)
                layer._lora_configs[name] = config
        use_lora(model, list(ADAPTERS))
        torch.manual_seed(3)
        hidden = model.embed(IDS)
        for block in model.blocks:
            if checkpointed:
                hidden = torch.utils.checkpoint.checkpoint(block, hidden, use_reentrant=False)
            else:
                hidden = block(hidden)
        hidden.square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    torch.testing.assert_close(*gradients, **CLOSE)


# --- taken out ------------------------------------------------------------------------------------


def test_one_is_taken_out_and_the_others_stay():
    model = carrying()
    use_lora(model, ["default", "fr"], weights=[1, 2])
    assert remove_lora(model, "default") == ON["default"]
    assert lora_adapters(model) == {"fr": 2.0, "tone": None}
    torch.testing.assert_close(model(IDS), merged_by_hand(model, {"fr": 2.0})(IDS), **CLOSE)
    assert remove_lora(model, "fr") == ON["fr"]
    # Layers that nobody adapts any more are plain again.
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == ON["tone"]
    assert torch.equal(model(IDS), merged_by_hand(model, {})(IDS))
    with pytest.raises(ValueError, match="no adapter named 'fr'; it has 'tone'"):
        remove_lora(model, "fr")
    use_lora(model, "tone")
    layer = model.gate
    assert remove_lora(model, "tone") == ON["tone"]
    assert layer.adapters_in_use == {"tone": 1.0} and model.gate is not layer
    assert not any("lora" in key for key in model.state_dict())
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_all_are_taken_out_together():
    model = carrying()
    use_lora(model, ["default", "tone"])
    names = list(dict.fromkeys(n for n, _ in Model().named_modules() if "k" in n or "q" in n))
    assert remove_lora(model) == [n for n in names if n.endswith((".q", ".k"))] + ["gate"]
    assert model.state_dict().keys() == Model().state_dict().keys()
    assert torch.equal(model(IDS), merged_by_hand(model, {})(IDS))


# --- whole models ---------------------------------------------------------------------------------


def test_state_dicts_keep_them_apart():
    model, other = carrying(), carrying(seed=1)
    assert {n for n in model.state_dict() if "lora" in n} == set().union(*map(factors_of, ON))
    other.load_state_dict(model.state_dict())
    for names in ("default", ["fr", "tone"]):
        use_lora(model, names)
        use_lora(other, names)
        assert torch.equal(model(IDS), other(IDS))


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_go_their_own_way(way):
    model = carrying()
    use_lora(model, ["fr", "tone"], weights=[0.5, 2])
    before = model(IDS)
    twin = way(model)
    assert torch.equal(twin(IDS), before)
    use_lora(twin, "default")
    fill(twin, "fr")
    remove_lora(twin, "tone")
    assert torch.equal(model(IDS), before)
    with disable_lora(model):
        twin = way(model)
    assert torch.equal(twin(IDS), before)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole_and_follows_each_choice():
    model = carrying(model=Model().float()).eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for names, weights in (
        ("default", None), (["fr", "tone"], [2, 0.5]), (None, None), ("tone", None), ("tone", 3),
        ("default", None),
    ):  # fmt: skip
        use_lora(model, names, weights=weights)
        model.zero_grad()
        compiled(IDS).square().sum().backward()
        got = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(IDS).square().sum().backward()
        expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_module_under_two_names_is_one_layer():
    model = Model().double()
    model.alias = model.gate
    for rank, name in ((2, "default"), (3, "fr")):
        assert apply_lora(model, rank, target_modules=["gate"], name=name, verbose=False) == [
            "gate"
        ]
    assert list(model.gate.lora_configs) == ["default", "fr"] and model.alias is model.gate
    assert remove_lora(model) == ["gate"]
    assert model.alias is model.gate and type(model.gate) is nn.Linear
