"""Directories of every era, and of the models that transformers makes of them, read and refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_minimind import ids, one_thread, tiny  # noqa: F401 - one_thread acts by itself

from minimind.model.checkpoint import CheckpointError, load_model, save_model
from minimind.model.eras import ERAS
from minimind.model.transformer import MiniMindLM


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("writer", ["save_model", "save_pretrained"])
def test_round_trip_through_both_readers(tmp_path, era, use_moe, writer):
    model = tiny(era=era, use_moe=use_moe, hidden_dim=24, rope_theta=100.0)
    if writer == "save_model":
        save_model(model, tmp_path / "new")
    else:
        model.save_pretrained(tmp_path / "new")
    stored = load_file(tmp_path / "new" / "model.safetensors")
    head = "output.weight" if era == "2025-02" else "lm_head.weight"
    assert set(model.state_dict()) - set(stored) == {head}
    for reader in (load_model, MiniMindLM.from_pretrained):
        again = reader(tmp_path / "new").eval()
        assert again.config.era == era and again.config.rope_theta == 100.0
        assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
        for name, t in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], t), f"{reader}: {name}"
        # Not to the bit: the last one depends on where in memory a weight begins.
        torch.testing.assert_close(again(ids(2, 5)).logits, model(ids(2, 5)).logits)


def twin_directory(path, era, **changes):
    """A Llama or Qwen3 as transformers writes it, its logits, and the model."""
    sizes = {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
        "num_key_value_heads": 1, "vocab_size": 61, "intermediate_size": 40, "rope_theta": 77.0,
        "rms_norm_eps": 1e-3, "max_position_embeddings": 48, "tie_word_embeddings": True,
        "bos_token_id": 1, "eos_token_id": 2, **changes,
    }  # fmt: skip
    kind = {"2025-04": "Llama", "2026-03": "Qwen3"}[era]
    if changes.get("num_experts"):
        kind = "Qwen3Moe"
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(
        getattr(transformers, f"{kind}Config")(**sizes)
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize(
    ("era", "changes"),
    [
        ("2025-04", {}),
        ("2025-04", {"tie_word_embeddings": False}),
        ("2026-03", {"head_dim": 16}),
        ("2026-03", {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 24,
                     "norm_topk_prob": True}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("form", ["model.safetensors", "pytorch_model.bin"])
def test_transformers_directories_load_with_their_configuration(tmp_path, era, changes, form):
    twin = twin_directory(tmp_path, era, **changes)
    if form == "pytorch_model.bin":
        torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / form)
        (tmp_path / "model.safetensors").unlink()
    model = load_model(tmp_path)
    assert model.config.era == era and model.config.max_seq_len == 48
    with torch.no_grad():
        expected = twin(ids(2, 9)).logits
        torch.testing.assert_close(model(ids(2, 9)).logits, expected, atol=1e-5, rtol=1e-5)


def rewritten(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return directory


@pytest.mark.parametrize("tied", [False, True])
def test_where_a_configuration_is_silent_the_tensors_tell_whether_they_are_tied(tmp_path, tied):
    twin = twin_directory(tmp_path, "2025-04", tie_word_embeddings=tied)
    content = json.loads((tmp_path / "config.json").read_text())
    del content["tie_word_embeddings"]
    (tmp_path / "config.json").write_text(json.dumps(content))
    model = load_model(tmp_path)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    torch.testing.assert_close(model(ids(2, 9)).logits, twin(ids(2, 9)).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "qwen3"}, "MiniMind 2026-03 .qwen3., but the weights are of 2025-04"),
        ({"model_type": "mistral"}, "model_type is 'mistral', expected minimind, llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', expected 'silu'"),
        ({"attention_bias": True}, "attention_bias is True, expected False"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn"),
        ({"inference_rope_scaling": True}, "inference_rope_scaling is True"),
        ({"num_key_value_heads": 3}, "n_heads must be divisible by n_kv_heads"),
        ({"num_key_value_heads": 2}, r"k_proj.weight expected \[16, 32\] found \[8, 32\]"),
    ],
)
def test_configurations_of_other_models_are_refused(tmp_path, changes, words):
    twin_directory(tmp_path, "2025-04")
    with pytest.raises(CheckpointError, match=words) as caught:
        load_model(rewritten(tmp_path, **changes))
    assert "config.json" in str(caught.value)


# --- directories that cannot be trusted -----------------------------------------------------------


def test_links_out_of_a_directory_are_not_followed(tmp_path):
    save_model(tiny(), tmp_path / "real")
    for name in ("model.safetensors", "config.json"):
        folder = tmp_path / name.partition(".")[0]
        save_model(tiny(), folder)
        (folder / name).unlink()
        (folder / name).symlink_to(tmp_path / "real" / name)
        with pytest.raises(CheckpointError, match=f"{name} is a link to .*outside the directory"):
            load_model(folder)


def test_a_hub_downloads_own_links_are_followed(tmp_path):
    model, snapshot = tiny(), tmp_path / "models--a--b" / "snapshots" / "0123"
    save_model(model, tmp_path / "models--a--b" / "blobs")
    snapshot.mkdir(parents=True)
    for name in ("model.safetensors", "config.json"):
        (snapshot / name).symlink_to(Path("../../blobs") / name)
    torch.testing.assert_close(load_model(snapshot)(ids(1, 5)).logits, model(ids(1, 5)).logits)


def test_split_weights_are_named(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="several files .*index.json.*max_shard_size"):
        load_model(tmp_path)
