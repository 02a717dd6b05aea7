"""Files of several adapters of one model: each by itself, and none of their names in them."""

from __future__ import annotations

import pytest
import torch
from several import ADAPTERS, ON, carrying
from tiny_model import IDS, SUFFIXES, Model, assert_untouched, snapshot
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    disable_lora,
    holds_adapter,
    load_lora,
    lora_adapters,
    lora_state_dict,
    merge_lora,
    read_adapter,
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
    with pytest.warns(UserWarning, match="says neither alpha"):
        assert load_lora(other, path, name="mine") == ON["default"]
    assert list(read_adapter(path)[0]) == ON["default"]


def test_out_of_factors_alone_comes_the_one_asked_for(tmp_path):
    model = carrying()
    path = tmp_path / "factors.pth"
    torch.save({key: t for key, t in model.state_dict().items() if "lora" in key}, path)
    for name in ADAPTERS:
        other = carrying(name, seed=1)
        assert load_lora(other, path, name=name) == ON[name]
        state = lora_state_dict(model, name)
        torch.testing.assert_close(lora_state_dict(other, name), state, rtol=0, atol=0)


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


def test_callbacks_save_the_ones_that_they_were_given(tmp_path):
    pytest.importorskip("transformers")
    from types import SimpleNamespace

    from lora_kernels import LoRACallback

    model = carrying()
    args = SimpleNamespace(output_dir=str(tmp_path))
    state = SimpleNamespace(global_step=1, is_world_process_zero=True)
    for callback in (LoRACallback(adapter="fr"), LoRACallback()):
        callback.on_train_begin(args, state, None, model=model)
        callback.on_train_end(args, state, None, model=model)
    for name in ("fr", "default"):
        other = bare(model)
        assert load_lora(other, tmp_path, name=name) == ON[name]
        use_lora(model, name)
        torch.testing.assert_close(other(IDS), model(IDS), rtol=1e-12, atol=1e-12)
    assert load_lora(bare(model), tmp_path, name="mine") == ON["default"]
    (tmp_path / "lora.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"nor lora\.safetensors.*; lora\.fr\.safetensors is,"
    ):
        load_lora(bare(model), tmp_path)
    with pytest.raises(ValueError, match="no adapter named 'de'"):
        LoRACallback(adapter="de").on_train_begin(args, state, None, model=model)


def test_the_default_one_beside_a_checkpoint_is_not_taken_for_another_in_it(tmp_path):
    from safetensors.torch import save_model

    model = carrying()
    save_model(model, str(tmp_path / "model.safetensors"))
    save_lora(model, tmp_path / "lora.safetensors")
    for name in ("fr", "default"):
        other = carrying(name, seed=1)
        assert load_lora(other, tmp_path, name=name) == ON[name]
        state = lora_state_dict(model, name)
        torch.testing.assert_close(lora_state_dict(other, name), state, rtol=0, atol=0)
    assert load_lora(bare(model), tmp_path, name="mine") == ON["default"]  # warnings are errors
