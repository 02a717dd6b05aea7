"""An adapter inside a checkpoint of the whole model, as ``save_pretrained`` writes it."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import assert_untouched, snapshot
from tiny_peft import base, fill, logits

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    holds_adapter,
    load_lora,
    lora_parameters,
    read_adapter,
    save_lora,
)


def saved(directory, **settings):
    model = base("qwen2")
    apply_lora(model, 4, target_modules=["q_proj", "lm_head"], verbose=False)
    fill(lora_parameters(model))
    model.save_pretrained(directory, **settings)
    return model


@pytest.fixture
def quiet_scale():
    with pytest.warns(UserWarning, match="says neither alpha.*scale 1"):
        yield


def as_bin(directory):
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()


@pytest.mark.usefixtures("quiet_scale")
@pytest.mark.parametrize("kind", ["directory", "file", "shards", "bin"])
def test_the_pairs_are_taken_out(tmp_path, kind):
    model = saved(tmp_path, **({"max_shard_size": "10kB"} if kind == "shards" else {}))
    assert (tmp_path / "model.safetensors.index.json").exists() == (kind == "shards")
    if kind == "bin":
        as_bin(tmp_path)
    path = tmp_path / "model.safetensors" if kind == "file" else tmp_path
    target = base("qwen2")
    assert holds_adapter(path) and len(read_adapter(path)[0]) == 3
    assert load_lora(target, path) == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "lm_head",
    ]
    assert torch.equal(logits(target), logits(model))


def test_the_models_own_scale_is_kept(tmp_path):
    saved(tmp_path)
    target = base("qwen2")
    apply_lora(target, 4, alpha=12, target_modules=["q_proj", "lm_head"], verbose=False)
    load_lora(target, tmp_path)
    assert target.lm_head.scale == 3 and target.lm_head.lora.B.weight.any()


def test_the_adapter_beside_it_comes_first(tmp_path):
    saved(tmp_path)
    source = base("qwen2")
    apply_lora(source, 2, alpha=6, target_modules=["q_proj"], verbose=False)
    fill(lora_parameters(source))
    save_lora(source, tmp_path / "lora.safetensors")
    target = base("qwen2")
    load_lora(target, tmp_path)
    assert torch.equal(logits(target), logits(source))


def test_a_model_without_lora_is_no_adapter(tmp_path):
    base("qwen2").save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="nor a checkpoint with keys that end in"):
        load_lora(base("qwen2"), tmp_path)
    with pytest.raises(AdapterMismatchError, match="it holds no tensors named"):
        load_lora(base("qwen2"), tmp_path / "model.safetensors")


def test_half_a_pair_changes_nothing(tmp_path):
    saved(tmp_path)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    del state["lm_head.lora.B.weight"]
    save_file(state, file)
    model = base("qwen2")
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match=r"missing key lm_head\.lora\.B\.weight"):
        load_lora(model, tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "y"}}))
    file.unlink()
    with pytest.raises(AdapterMismatchError, match="y is a link that leads nowhere"):
        load_lora(model, tmp_path)
    assert_untouched(model, before)
