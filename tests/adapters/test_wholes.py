"""Parameters trained whole: in place while an adapter is used, the base's when it is not."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tiny_model import IDS, Model, assert_untouched, snapshot
from torch import nn

from lora_kernels import (
    apply_lora,
    disable_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
)
from lora_kernels.adapters.wholes import (
    drop_wholes,
    insert_wholes,
    use_wholes,
    whole_parameters,
    whole_tensors,
)


class Normed(Model):
    """With a head of its own, a norm that has statistics, and what is no tensor to be saved."""

    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(8, 10)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout()
        self.norm.register_buffer("passing", torch.ones(1), persistent=False)

    def forward(self, ids):
        x = self.gate(self.embed(ids))
        return self.lm_head(self.norm(x.transpose(1, 2)).transpose(1, 2))


def adapted(**settings):
    torch.manual_seed(0)
    model = Normed().eval()
    settings = {"target_modules": ["gate"], "verbose": False, **settings}
    apply_lora(model, 2, **settings)
    return model


def change(model):
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_()
    return model


HEAD = {"modules_to_save": ["lm_head", "norm"]}


def test_what_is_trained_is_what_was_named():
    model = adapted(**HEAD)
    mark_only_lora_as_trainable(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {
        "gate.lora.A.weight",
        "gate.lora.B.weight",
        "lm_head.weight",
        "lm_head.bias",
        "norm.weight",
        "norm.bias",
    }
    assert {id(p) for p in lora_parameters(model)} == {
        id(p) for p in model.parameters() if p.requires_grad
    }
    assert model.state_dict().keys() == {*Normed().state_dict(), *(n for n in names if "lora" in n)}


def test_the_base_comes_back_whole():
    model, base = adapted(**HEAD), Normed().eval()
    base.load_state_dict(model.state_dict(), strict=False)
    before = base(IDS)
    originals = {n: t.clone() for n, t in base.state_dict().items()}
    change(model)
    model.norm.running_mean += 1
    trained = model(IDS)
    assert not torch.equal(trained, before)
    with disable_lora(model):
        assert torch.equal(model(IDS), before)
        with disable_lora(model):
            assert torch.equal(model(IDS), before)
        assert torch.equal(model(IDS), before)
    assert torch.equal(model(IDS), trained)
    remove_lora(model)
    assert {n: t.tolist() for n, t in model.state_dict().items()} == {
        n: t.tolist() for n, t in originals.items()
    }
    assert not any("_lora_aside" in module.__dict__ for module in model.modules())


def test_a_graph_taken_before_the_base_was_asked_is_whole():
    """As in preference tuning: the reference's answers between the policy's and its backward."""
    gradients = []
    for asks in (False, True):
        model = change(adapted(**HEAD))
        loss = model(IDS).square().sum()
        if asks:
            with disable_lora(model):
                model(IDS)
        loss.backward()
        gradients.append([p.grad for p in lora_parameters(model)])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_merging_keeps_what_was_learnt():
    model = change(adapted(**HEAD))
    trained = model(IDS)
    with merged_lora(model):
        assert torch.allclose(model(IDS), trained, atol=1e-5)
    head = model.lm_head.weight
    assert torch.equal(model(IDS), trained)
    merge_lora(model)
    assert torch.allclose(model(IDS), trained, atol=1e-5) and model.lm_head.weight is head
    assert not any("_lora_aside" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies_have_a_base_of_their_own(way):
    model = change(adapted(**HEAD))
    if way == "deepcopy":
        twin = copy.deepcopy(model)
    elif way == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    with disable_lora(model):
        bare = model(IDS)
    change(twin)
    with torch.no_grad():
        with disable_lora(twin):
            assert torch.equal(twin(IDS), bare)
            twin.lm_head.weight.zero_()
        with disable_lora(model):
            assert torch.equal(model(IDS), bare)


def test_a_copy_inside_disable_lora_is_refused():
    model = adapted(**HEAD)
    with disable_lora(model), pytest.raises(RuntimeError, match="leave the block first"):
        copy.deepcopy(model)
    copy.deepcopy(model)


def test_the_base_follows_the_model_to_another_dtype():
    model = change(adapted(**HEAD))
    expected = adapted(target_modules=["gate"]).double()
    expected.gate.load_state_dict({**model.gate.state_dict()}, strict=False)
    model.double()
    with disable_lora(model), disable_lora(expected):
        assert model.lm_head.weight.dtype == torch.float64
        assert torch.equal(model(IDS), expected(IDS))
    remove_lora(model)
    assert model.lm_head.weight.dtype == torch.float64


def test_an_error_inside_brings_the_adapter_back():
    model = change(adapted(**HEAD))
    trained = model(IDS)
    with pytest.raises(KeyError), disable_lora(model):
        raise KeyError
    assert torch.equal(model(IDS), trained)


def test_each_adapter_has_its_own():
    model = adapted(**HEAD)
    base = model(IDS)
    change(model)
    names = ["lm_head.weight", "lm_head.bias"]
    trained = model(IDS)
    insert_wholes(model, names, "fr")
    assert torch.equal(model(IDS), trained)  # it is there, and not in use yet
    use_wholes(model, ["fr"])
    assert whole_parameters(model, ["fr"])[0] is model.lm_head.weight
    with disable_lora(model):  # it began as a copy of the base's, not of what was in use
        original = model.lm_head.weight.clone()
    assert torch.equal(model.lm_head.weight, original)
    with torch.no_grad():
        model.lm_head.weight.fill_(3)
    assert whole_tensors(model, "fr").keys() == set(names)
    assert len(whole_tensors(model)) == 7
    use_wholes(model, ["default"])
    assert not torch.equal(model.lm_head.weight, torch.full((10, 8), 3.0))
    use_wholes(model, ["fr", "other"])
    assert torch.equal(model.lm_head.weight, torch.full((10, 8), 3.0))
    with pytest.raises(ValueError, match="'fr' and 'default' both train 'lm_head.weight' whole"):
        use_wholes(model, ["fr", "default"])
    assert torch.equal(model.lm_head.weight, torch.full((10, 8), 3.0))
    drop_wholes(model, "fr")
    use_wholes(model, [])
    with torch.no_grad():
        model.gate.lora.B.weight.zero_()
    assert torch.equal(model(IDS), base)
    use_wholes(model, ["default"])
    drop_wholes(model, "default")
    assert whole_tensors(model) == {} and torch.equal(model(IDS), base)


def test_tied_weights_are_trained_as_one_or_not_at_all():
    model = Model()
    before = snapshot(model)
    for named in (["embed"], ["lm_head"]):
        with pytest.raises(ValueError, match="is tied to .*name both to train them as one"):
            apply_lora(model, 2, modules_to_save=named, verbose=False)
        assert_untouched(model, before)
    original = model.embed.weight
    apply_lora(model, 2, modules_to_save=["embed", "lm_head"], verbose=False)
    assert model.embed.weight is model.lm_head.weight is not original
    assert len(whole_parameters(model)) == 1
    twin = copy.deepcopy(model)
    assert twin.embed.weight is twin.lm_head.weight
    with disable_lora(model):
        assert model.embed.weight is model.lm_head.weight is original
    remove_lora(model)
    assert model.embed.weight is model.lm_head.weight is original


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"modules_to_save": ["lm_hed"]}, ValueError, r"'lm_hed', which is no .*\['lm_head'\]"),
        ({"modules_to_save": "lm_head"}, TypeError, "put it into a list"),
        ({"modules_to_save": [3]}, TypeError, "modules_to_save must be None"),
        (
            {"modules_to_save": ["gate"]},
            ValueError,
            "all of the modules targeted are trained whole",
        ),
        ({"modules_to_save": ["drop"]}, ValueError, "'drop': 'drop' has no parameters"),
        ({"bias": "some"}, ValueError, "bias must be one of none, lora_only, all, got 'some'"),
    ],
)
def test_mistakes_change_nothing(settings, error, message):
    model = Normed()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        apply_lora(model, 2, target_modules=["gate"], verbose=False, **settings)
    assert_untouched(model, before)


def test_what_cannot_be_trained_is_refused():
    with torch.device("meta"):
        model = Normed()
    with pytest.raises(ValueError, match="'norm.weight' is on the meta device"):
        apply_lora(model, 2, target_modules=["gate"], modules_to_save=["norm"], verbose=False)
    model = Normed()
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="'lm_head.weight' has been emptied"):
        apply_lora(model, 2, target_modules=["gate"], modules_to_save=["lm_head"], verbose=False)
    model = Normed()
    model.lm_head.weight = nn.Parameter(torch.ones(10, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"'lm_head.weight' is .*int8, quantised"):
        apply_lora(model, 2, target_modules=["gate"], modules_to_save=["lm_head"], verbose=False)


@pytest.mark.parametrize(
    ("bias", "trained"),
    [
        ("none", set()),
        ("lora_only", {"gate.bias"}),
        ("all", {"gate.bias", "norm.bias", "lm_head.bias"}),
    ],
)
def test_biases(bias, trained):
    model = adapted(bias=bias)
    blocks = {f"blocks.{i}.{m}.bias" for i in (0, 1) for m in ("q", "k", "out_proj")}
    assert whole_tensors(model).keys() == trained | (blocks if bias == "all" else set())
    base = model(IDS)
    change(model)
    assert not torch.equal(model(IDS), base)
    with disable_lora(model):
        assert torch.equal(model(IDS), base)


def test_linears_inside_get_no_lora(capsys):
    model = Normed()
    names = apply_lora(model, 2, target_modules="all-linear", modules_to_save=["blocks.0"])
    assert names == ["blocks.1.q", "blocks.1.k", "blocks.1.out_proj", "gate"]
    assert "train module whole: blocks.0\n" in capsys.readouterr().out
