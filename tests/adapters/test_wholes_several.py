"""Several adapters of which some train parameters whole, or single tokens."""

from __future__ import annotations

import json

import pytest
import torch
from several import fill
from tiny_model import IDS, SUFFIXES, Model, assert_untouched, snapshot
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    disable_lora,
    load_lora,
    lora_adapters,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    remove_lora,
    save_lora,
    use_lora,
)

KINDS = [*SUFFIXES, ""]


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


def base(seed=0):
    torch.manual_seed(seed)
    return Headed()


def headed(seed=0):
    model = base(seed)
    for name, settings in WHOLE.items():
        apply_lora(model, 2, name=name, verbose=False, **settings)
        fill(model, name)
    return model


def test_each_has_its_own_values():
    model = headed()
    assert torch.equal(model.lm_head.weight, lora_state_dict(model)["lm_head.weight"])
    assert lora_state_dict(model, "tone").keys() == {
        *(f"{n}.lora.{f}.weight" for n in ("blocks.0.q", "blocks.1.q", "gate") for f in "AB"),
        *("blocks.0.q.bias", "blocks.1.q.bias", "gate.bias", "lm_head.weight"),
    }
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
    # What was not trained last is frozen, whether it was in its place or not.
    use_lora(model, "default")
    assert not any(p.requires_grad for p in lora_parameters(model))
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


def test_a_further_one_waits_with_all_that_it_has():
    model = Headed()
    before = model(IDS)
    apply_lora(model, 2, target_modules=["q"], verbose=False)
    apply_lora(model, 2, name="tone", verbose=False, **WHOLE["tone"])
    fill(model, "tone")
    assert torch.equal(model(IDS), before)


def test_not_taken_out_while_the_base_is_in_its_place():
    model = headed()
    before = model(IDS)
    for name in (None, "default", "tone"):
        with disable_lora(model), pytest.raises(ValueError, match="leave its block first"):
            remove_lora(model, name)
        assert torch.equal(model(IDS), before) and lora_adapters(model).keys() == WHOLE.keys()


class Ended(Headed):
    """It says which module is its head, as transformers' models do."""

    def get_output_embeddings(self):
        return self.lm_head


def with_a_copy(directory, value):
    """Put a copy of the base's head into PEFT's file, as PEFT does by itself at times."""
    from safetensors.torch import load_file, save_file

    path = directory / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.lm_head.weight": value}, path)


def test_the_bases_copy_in_a_file_is_held_against_the_base(tmp_path):
    """And not against what another adapter has in its place."""
    model = Ended()
    with torch.no_grad():
        head = model.lm_head.weight.clone()
    apply_lora(model, 2, target_modules=["q"], verbose=False)
    save_lora(model, tmp_path / "q")
    with_a_copy(tmp_path / "q", head)
    remove_lora(model)
    apply_lora(model, 2, verbose=False, **WHOLE["default"])
    fill(model, "default")
    load_lora(model, tmp_path / "q", name="fr")  # warnings are errors
    assert set(lora_state_dict(model, "fr")) == {
        f"blocks.{i}.q.lora.{f}.weight" for i in (0, 1) for f in "AB"
    }


def test_two_in_use_that_would_have_one_parameter_are_refused(tmp_path):
    model = Ended()
    apply_lora(model, 2, target_modules=["q"], name="fr", verbose=False)
    save_lora(model, tmp_path / "fr", name="fr")
    with_a_copy(tmp_path / "fr", model.lm_head.weight + 1)
    apply_lora(model, 2, verbose=False, **WHOLE["default"])
    use_lora(model, ["fr", "default"])
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match="lm_head.weight: 'default', which is in use"):
        load_lora(model, tmp_path / "fr", name="fr")
    assert_untouched(model, before)
    use_lora(model, "fr")
    with pytest.warns(UserWarning, match="holds lm_head.weight of its base"):
        load_lora(model, tmp_path / "fr", name="fr")


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


def test_one_trains_tokens_of_what_another_trains_whole(tmp_path):
    model = base()
    for name, settings in (("fr", WHOLE["fr"]), ("de", {"modules_to_save": ["embed"]})):
        apply_lora(model, 2, name=name, verbose=False, **{"target_modules": ["q"], **settings})
        fill(model, name)
        use_lora(model, None)  # the next one begins while the tokens are not in use, too
    assert [k for k in lora_state_dict(model, "de") if "lora." not in k] == ["embed.weight"]
    answers = {}
    for name in ("fr", "de"):
        use_lora(model, name)
        answers[name] = model(IDS)
        for kind in KINDS:
            save_lora(model, tmp_path / f"{name}{kind}", name=name)
            fresh = base()
            load_lora(fresh, tmp_path / f"{name}{kind}")
            torch.testing.assert_close(fresh(IDS), answers[name], rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="'de' and 'fr' both train 'embed.weight' whole"):
        use_lora(model, ["fr", "de"])
    assert torch.equal(model(IDS), answers["de"])


def test_pefts_files_say_that_a_module_is_whole_on_which_another_has_lora(tmp_path):
    model = base()
    apply_lora(model, 2, target_modules=["lm_head"], verbose=False)
    settings = {"target_modules": ["q"], "modules_to_save": ["lm_head"]}
    apply_lora(model, 2, name="fr", verbose=False, **settings)
    fill(model, "fr")
    use_lora(model, "fr")
    save_lora(model, tmp_path / "fr", name="fr")
    config = json.loads((tmp_path / "fr" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head"]
    fresh = base()
    load_lora(fresh, tmp_path / "fr")  # warnings are errors
    torch.testing.assert_close(fresh(IDS), model(IDS), rtol=1e-12, atol=1e-12)


def test_an_adapter_put_in_place_without_gradients_can_be_trained():
    model = headed()
    use_lora(model, "tone")
    model.float()
    with torch.inference_mode():
        use_lora(model, "default")
    mark_only_lora_as_trainable(model)
    model(IDS).square().sum().backward()
    assert model.lm_head.weight.dtype == torch.float32 and model.lm_head.weight.grad is not None


def test_a_file_with_lora_and_tokens_on_one_module_is_refused(tmp_path):
    model = base()
    apply_lora(model, 2, target_modules=["lm_head"], verbose=False)
    state = lora_state_dict(model)
    state["lm_head.lora_tokens.weight"] = torch.ones(1, 8)
    state["lm_head.lora_tokens.index"] = torch.tensor([1])
    torch.save(state, tmp_path / "both.pth")
    bare = base()
    before = snapshot(bare)
    with pytest.raises(AdapterMismatchError, match="'lm_head' has LoRA and single tokens"):
        load_lora(bare, tmp_path / "both.pth")
    assert_untouched(bare, before)
