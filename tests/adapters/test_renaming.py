"""Adapters under names that transformers has changed since."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import Model, trained
from tiny_peft import TENSORS, edit, fill

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    save_lora,
)

SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
NEW, OLD = "model.language_model", "language_model.model"


def llava():
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    text = LlamaConfig(**SIZES, num_key_value_heads=2, vocab_size=32)
    vision = CLIPVisionConfig(**SIZES, image_size=8, patch_size=4)
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text))


def saved(path, **settings):
    """An adapter under today's names, and what it computes."""
    model = llava()
    settings = {"target_modules": ["q_proj", "multi_modal_projector.linear_1"], **settings}
    apply_lora(model, 2, alpha=4, verbose=False, **settings)
    fill(lora_parameters(model))
    save_lora(model, path)
    return model


def under_old_names(path):
    tensors = load_file(path)
    old = {}
    for key, tensor in tensors.items():
        name = key.replace(NEW, OLD)
        for tower in ("vision_tower", "multi_modal_projector"):
            name = name.replace(f"model.{tower}", tower)
        name = name.replace("vision_tower.", "vision_tower.vision_model.")
        if name.startswith("base_model.") and not name.startswith("base_model.model."):
            name = name.replace("base_model.", "base_model.model.", 1)
        old[name] = tensor
    assert old.keys().isdisjoint(tensors)
    save_file(old, path)
    return old


def same(a, b):
    ours, theirs = lora_state_dict(a), lora_state_dict(b)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


@pytest.mark.parametrize("kind", ["directory", "safetensors"])
@pytest.mark.parametrize("saving", [{}, {"modules_to_save": ["norm"]}, {"rank_pattern": {"k": 1}}])
def test_older_names_are_todays(tmp_path, kind, saving):
    if "rank_pattern" in saving:
        saving = {"rank_pattern": {"language_model.layers.0.self_attn.q_proj": 3}}
    path = tmp_path / "a" if kind == "directory" else tmp_path / "a.safetensors"
    source = saved(path, **saving)
    if kind == "directory":
        under_old_names(path / TENSORS)
        if "rank_pattern" in saving:
            edit(path, rank_pattern={f"^{OLD}.layers.0.self_attn.q_proj": 3})
        if "modules_to_save" in saving:
            edit(path, modules_to_save=[f"{OLD}.norm"])
    else:
        old = under_old_names(path)  # without metadata, as a .pth of the older names would be
        assert not any(key.startswith("model.") for key in old)
    target = llava()
    if kind == "safetensors":
        apply_lora(
            target,
            2,
            alpha=4,
            verbose=False,
            target_modules=["q_proj", "multi_modal_projector.linear_1"],
            **saving,
        )
    load_lora(target, path)
    assert same(target, source)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in PEFT
def test_peft_renames_to_the_same(tmp_path):
    peft = pytest.importorskip("peft")
    saved(tmp_path, target_modules=["q_proj"])
    under_old_names(tmp_path / TENSORS)
    edit(tmp_path, target_modules=["q_proj"], exclude_modules=None)
    ours = llava()
    load_lora(ours, tmp_path)
    theirs = dict(peft.PeftModel.from_pretrained(llava(), tmp_path).named_parameters())
    for name, tensor in lora_state_dict(ours).items():
        module, _, factor, _ = name.rsplit(".", 3)
        key = f"base_model.model.{module}.lora_{factor}.default.weight"
        assert torch.equal(theirs[key], tensor)


def test_a_checkpoint_that_is_saved_under_older_names(tmp_path):
    source = saved(tmp_path / "a.safetensors")
    source.save_pretrained(tmp_path / "whole")
    keys = load_file(tmp_path / "whole" / "model.safetensors").keys()
    assert any(key.startswith("language_model.model.") and ".lora." in key for key in keys)
    target = llava()
    with pytest.warns(UserWarning, match="says neither alpha"):
        load_lora(target, tmp_path / "whole")
    assert same(target, source)


def test_the_older_table_of_a_model(tmp_path):
    """transformers 4.52 to 4.57 has it in the model, patterns that are tried in order."""
    source = trained(Model(), rank=2)
    save_lora(source, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    old = {key.replace("blocks.", "h.layers."): t for key, t in tensors.items()}
    save_file(old, tmp_path / "a.safetensors")
    target = Model()
    with pytest.raises(AdapterMismatchError, match=r"no module 'h\.layers\.0\.q'"):
        load_lora(target, tmp_path / "a.safetensors")
    target._checkpoint_conversion_mapping = {r"^h\.layers": "blocks", r"^h": "never"}
    load_lora(target, tmp_path / "a.safetensors")
    assert same(target, source)


def test_a_name_that_nobody_knows_is_named_as_it_is(tmp_path):
    saved(tmp_path)
    under_old_names(tmp_path / TENSORS)
    tensors = load_file(tmp_path / TENSORS)
    key = next(key for key in tensors if OLD in key)
    tensors[key.replace("q_proj", "z_proj")] = tensors.pop(key)
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(AdapterMismatchError, match="z_proj"):
        load_lora(llava(), tmp_path)


def test_one_module_under_both_names_is_refused(tmp_path):
    saved(tmp_path, target_modules=["q_proj"])
    today = load_file(tmp_path / TENSORS)
    old = under_old_names(tmp_path / TENSORS)
    save_file({**today, **old}, tmp_path / TENSORS)
    with pytest.raises(AdapterMismatchError, match=r"no module 'language_model\.model"):
        load_lora(llava(), tmp_path)
