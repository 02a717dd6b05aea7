"""Files of several adapters of one model: each by itself, and none of their names in them."""

from __future__ import annotations

import pytest
import torch
from several import ADAPTERS, ON, carrying, fill
from tiny_model import IDS, SUFFIXES, Model, assert_untouched, snapshot
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    disable_lora,
    holds_adapter,
    load_lora,
    lora_adapters,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    read_adapter,
    remove_lora,
    save_lora,
    use_lora,
)

KINDS = [*SUFFIXES, ""]
KNOWS_ALPHA = [".safetensors", ""]


def bare(model):
    """The base of ``model``, without any adapter."""
    plain = Model().double()
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "lora" not in n})
    return plain


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_each_is_saved_by_itself(tmp_path, kind, name):
    model = carrying()
    path = tmp_path / f"adapter{kind}"
    save_lora(model, path, name=name)  # in use or not
    state = lora_state_dict(model, name)
    assert list(state) == [f"{n}.lora.{f}.weight" for n in ON[name] for f in "AB"]
    use_lora(model, name)
    if kind in KNOWS_ALPHA:
        fresh = bare(model)
        assert load_lora(fresh, path) == ON[name]
        assert lora_adapters(fresh) == {"default": 1.0}
        torch.testing.assert_close(fresh(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    other = carrying(seed=1)
    others = {n: t for n, t in other.state_dict().items() if "lora" in n}
    use_lora(other, None)
    assert load_lora(other, path, name=name) == ON[name]
    assert lora_adapters(other) == dict.fromkeys(ADAPTERS)
    torch.testing.assert_close(lora_state_dict(other, name), state, rtol=0, atol=0)
    inner = ".lora." if name == "default" else f".loras.{name}."
    after = other.state_dict()
    assert all(torch.equal(after[n], t) for n, t in others.items() if inner not in n)


@pytest.mark.parametrize("kind", KNOWS_ALPHA)
def test_loaded_beside_others(tmp_path, kind):
    model = carrying()
    for name in ADAPTERS:
        save_lora(model, tmp_path / f"{name}{kind}", name=name)
    plain = bare(model)
    for i, name in enumerate(("tone", "fr", "default")):
        before = plain(IDS)
        assert load_lora(plain, tmp_path / f"{name}{kind}", name=name) == ON[name]
        assert i == 0 or torch.equal(plain(IDS), before)  # a further one waits
    assert lora_adapters(plain) == {"default": None, "fr": None, "tone": 1.0}
    weights = [0.5, 2.0, -1.0]
    for each in (model, plain):
        use_lora(each, list(ADAPTERS), weights=weights)
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    for each in (model, plain):
        merge_lora(each)
    torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_changes_nothing(tmp_path, kind):
    model = carrying()
    save_lora(model, tmp_path / f"fr{kind}", name="fr")
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match="missing from the file|in the file but without"):
        load_lora(model, tmp_path / f"fr{kind}")  # into "default", which is on others
    for name in ("a.b", "loras", ""):
        with pytest.raises(ValueError, match="name "):
            load_lora(model, tmp_path / f"fr{kind}", name=name)
    for function in (save_lora, lambda m, p, name: lora_state_dict(m, name)):
        with pytest.raises(ValueError, match="no adapter named 'de'; it has 'default', 'fr', 't"):
            function(model, tmp_path / "de", name="de")
    with disable_lora(model), pytest.raises(ValueError, match="inside disable_lora"):
        load_lora(model, tmp_path / f"fr{kind}", name="de")
    assert_untouched(model, before)
    model = nn.Sequential(nn.Linear(3, 3))
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError):
        load_lora(model, tmp_path / f"fr{kind}", name="de")
    assert_untouched(model, before)


def test_no_default_is_said():
    model = carrying("fr")
    for function in (lora_state_dict, lambda m: save_lora(m, "never.pth")):
        with pytest.raises(ValueError, match="no adapter named 'default'; it has 'fr'"):
            function(model)


# --- checkpoints of the whole model ---------------------------------------------------------------


@pytest.mark.parametrize("kind", [".pth", "directory"])
def test_out_of_a_checkpoint_comes_the_one_asked_for(tmp_path, kind):
    model = carrying()
    if kind == "directory":
        from safetensors.torch import save_model

        save_model(model, str(tmp_path / "model.safetensors"))
        path = tmp_path
    else:
        path = tmp_path / "model.pth"
        torch.save(model.state_dict(), path)
    assert holds_adapter(path)
    for name in ADAPTERS:
        other = carrying(name, seed=1)
        assert load_lora(other, path, name=name) == ON[name]
        state = lora_state_dict(model, name)
        torch.testing.assert_close(lora_state_dict(other, name), state, rtol=0, atol=0)
    # By a name that the checkpoint does not hold it is the default one.
    other = bare(model)
    with pytest.warns(UserWarning, match="does not say alpha"):
        assert load_lora(other, path, name="mine") == ON["default"]
    assert list(read_adapter(path)[0]) == ON["default"]


def test_a_checkpoint_without_a_default_one(tmp_path):
    model = carrying("fr", "tone")
    path = tmp_path / "model.pth"
    torch.save(model.state_dict(), path)
    assert holds_adapter(path)
    other = carrying("fr", "tone", seed=1)
    before = snapshot(other)
    with pytest.raises(AdapterMismatchError, match="holds 'fr', 'tone', and no .* 'default'"):
        load_lora(other, path)
    assert_untouched(other, before)
    assert load_lora(other, path, name="tone") == ON["tone"]


def test_the_callback_saves_the_one_that_it_was_given(tmp_path):
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from lora_kernels import LoRACallback

    model = carrying("default", "fr")
    callback = LoRACallback(adapter="fr")
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    callback.on_train_begin(args, state, None, model=model)
    callback.on_train_end(args, state, None, model=model)
    assert sorted(read_adapter(tmp_path)[0]) == sorted(ON["fr"])
    with pytest.raises(ValueError, match="no adapter named 'de'"):
        LoRACallback(adapter="de").on_train_begin(args, state, None, model=model)


# --- with what is trained whole -------------------------------------------------------------------


class Headed(Model):
    def __init__(self):
        super().__init__()
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.double()


WHOLE = {
    "default": {"target_modules": ["gate"], "modules_to_save": ["lm_head"]},
    "fr": {"target_modules": ["q"], "trainable_token_indices": {"embed": [1, 3]}},
    "tone": {"target_modules": ["q", "gate"], "modules_to_save": ["lm_head"], "bias": "lora_only"},
}


def headed(seed=0):
    torch.manual_seed(seed)
    model = Headed()
    for name, settings in WHOLE.items():
        apply_lora(model, 2, name=name, verbose=False, **settings)
        fill(model, name)
    return model


def test_each_has_its_own_values():
    model = headed()
    answers = {}
    with disable_lora(model):
        base = model(IDS)
    for name in WHOLE:
        use_lora(model, name)
        answers[name] = model(IDS)
        trained = {id(p) for p in lora_parameters(model)}
        mark_only_lora_as_trainable(model)
        assert {id(p) for p in model.parameters() if p.requires_grad} == trained
        model(IDS).square().sum().backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        model.zero_grad()
    use_lora(model, None)
    assert torch.equal(model(IDS), base)
    use_lora(model, ["default", "fr"])  # the head of one, the tokens of the other
    both = model(IDS)
    assert len({tuple(a.flatten().tolist()) for a in (*answers.values(), base, both)}) == 5
    with pytest.raises(ValueError, match="'default' and 'tone' both train 'lm_head.weight' whole"):
        use_lora(model, ["default", "tone"])
    assert torch.equal(model(IDS), both) and lora_adapters(model)["tone"] is None
    with use_lora(model, "tone"):
        assert torch.equal(model(IDS), answers["tone"])
    assert torch.equal(model(IDS), both)
    with disable_lora(model):
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), both)
    remove_lora(model, "fr")
    assert torch.equal(model(IDS), answers["default"])
    assert not any("lora_tokens" in key for key in model.state_dict())
    remove_lora(model, "default")
    assert torch.equal(model(IDS), base)
    use_lora(model, "tone")
    assert torch.equal(model(IDS), answers["tone"])
    remove_lora(model)
    assert torch.equal(model(IDS), base)
    assert not any("_lora_aside" in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_files_hold_the_values_of_one(tmp_path, kind):
    model = headed()
    plain = Headed()
    with disable_lora(model):
        state = {n: t for n, t in model.state_dict().items() if "lora" not in n}
        plain.load_state_dict(state)
    for name in WHOLE:
        save_lora(model, tmp_path / f"{name}{kind}", name=name)
    other = headed(seed=1)  # of another base, too
    for each in (plain, other):
        for name in WHOLE:
            load_lora(each, tmp_path / f"{name}{kind}", name=name)
    for name in WHOLE:
        state = lora_state_dict(model, name)
        torch.testing.assert_close(lora_state_dict(other, name), state, rtol=0, atol=0)
    for names in ("default", "fr", "tone", ["fr", "tone"]):
        for each in (model, plain):
            use_lora(each, names)
        torch.testing.assert_close(plain(IDS), model(IDS), rtol=1e-12, atol=1e-12)


def test_one_that_begins_while_another_is_in_use_begins_from_the_base():
    model = headed()
    use_lora(model, "tone")
    with disable_lora(model):
        original = model.lm_head.weight.clone()
    assert not torch.equal(model.lm_head.weight, original)
    apply_lora(
        model, 2, target_modules=["k"], modules_to_save=["lm_head"], name="de", verbose=False
    )
    use_lora(model, "de")
    assert torch.equal(model.lm_head.weight, original)


def test_merging_keeps_the_values_in_use():
    model = headed()
    use_lora(model, ["default", "fr"])
    expected = model(IDS)
    merge_lora(model)
    torch.testing.assert_close(model(IDS), expected, rtol=1e-12, atol=1e-12)
    assert model.state_dict().keys() == Headed().state_dict().keys()


def test_tokens_and_lora_on_one_module_are_refused():
    model = Headed()
    tokens = {"trainable_token_indices": {"lm_head": [1]}, "target_modules": ["gate"]}
    apply_lora(model, 2, verbose=False, **tokens)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'lm_head' has single tokens that another adapter trains"):
        apply_lora(model, 2, target_modules=["lm_head"], name="fr", verbose=False)
    assert_untouched(model, before)
