"""PEFT's two files: what is written, round trips, and that both appear or neither."""

from __future__ import annotations

import os
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tiny_model import Model, trained
from tiny_peft import CONFIG, OURS, TENSORS, base, config_of, contents, fill, logits, ours
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    LoRALinear,
    apply_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    save_lora,
)
from lora_kernels.adapters.checksums import CHECKSUM, checksum
from lora_kernels.adapters.reading import holds_adapter, read_adapter


@pytest.mark.parametrize("way", ["patterns", "rslora, patterns", "alpha none, ranks"])
def test_a_server_that_knows_only_r_and_alpha_computes_the_same_of_a_folded_one(tmp_path, way):
    source = ours("llama", way)
    save_lora(source, tmp_path / "a", fold_scale=True)
    config = config_of(tmp_path / "a")
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False and config["r"] == config["lora_alpha"] == 4
    target = base("llama")
    apply_lora(target, config["r"], target_modules=config["target_modules"], verbose=False)
    for key, tensor in load_file(tmp_path / "a" / TENSORS).items():
        name, factor = re.fullmatch(r"base_model\.model\.(.*)\.lora_(.)\.weight", key).groups()
        getattr(target.get_submodule(name).lora, factor).weight.data.copy_(tensor)
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-6)


def test_the_two_files(tmp_path):
    source = trained(Model(), rank=2, alpha=3, rank_pattern={"gate": 1}, dropout=0.25)
    save_lora(source, tmp_path / "deep" / "a")
    with safe_open(tmp_path / "deep" / "a" / TENSORS, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert file.metadata() == {"format": "pt", CHECKSUM: checksum(tensors)}
        shapes = {key: tensor.shape for key, tensor in tensors.items()}
    assert shapes == {
        "base_model.model.blocks.0.q.lora_A.weight": (2, 8),
        "base_model.model.blocks.0.q.lora_B.weight": (8, 2),
        "base_model.model.blocks.1.q.lora_A.weight": (2, 8),
        "base_model.model.blocks.1.q.lora_B.weight": (8, 2),
        "base_model.model.gate.lora_A.weight": (1, 8),
        "base_model.model.gate.lora_B.weight": (8, 1),
    }
    assert config_of(tmp_path / "deep" / "a") == {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": 2,
        "lora_alpha": 3,
        "lora_dropout": 0.25,
        "target_modules": ["blocks.0.q", "blocks.1.q", "gate"],
        "exclude_modules": None,
        "rank_pattern": {"^gate": 1},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    mask = os.umask(0)
    os.umask(mask)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["a"]  # no temporary left
    assert (tmp_path / "deep" / "a").stat().st_mode & 0o777 == 0o777 & ~mask
    for name in (TENSORS, CONFIG):
        assert (tmp_path / "deep" / "a" / name).stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_the_model_says_of_itself(tmp_path):
    model = base("llama")
    model.config.name_or_path = "someone/tiny-llama"
    apply_lora(model, 2, target_modules=["q_proj"], verbose=False)
    wrapped = nn.ModuleDict({"module": model})
    for saved, path in ((model, tmp_path / "a"), (wrapped, tmp_path / "b")):
        save_lora(saved, path)
        config = config_of(path)
        assert config["task_type"] == "CAUSAL_LM"
        assert config["base_model_name_or_path"] == "someone/tiny-llama"
    assert (tmp_path / "a" / TENSORS).read_bytes() == (tmp_path / "b" / TENSORS).read_bytes()


@pytest.mark.parametrize("way", OURS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip(tmp_path, way, dtype):
    source = ours("minimind", way, dtype)
    save_lora(source, tmp_path / "a")
    save_lora(source, tmp_path / "a")  # over itself
    bare, adapted = base("minimind", dtype=dtype), ours("minimind", way, dtype)
    fill(lora_parameters(adapted))
    for target in (bare, adapted):
        load_lora(target, tmp_path / "a")
        assert torch.equal(logits(target), logits(source))
        for key, tensor in lora_state_dict(source).items():
            assert torch.equal(lora_state_dict(target)[key], tensor)
    assert holds_adapter(tmp_path / "a")
    pairs, described = read_adapter(tmp_path / "a")
    assert {n: p["A"].shape[0] for n, p in pairs.items()} == {
        n: layer.rank for n, layer in described.items()
    }


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    model = trained(Model(), rank=2)
    gate = nn.Linear(8, 8)
    for layer, message in (
        (LoRALinear.from_linear(gate, 2, dropout=0.5), "one dropout.*0.0 on blocks.*0.5 on gate"),
        (
            LoRALinear.from_linear(gate, 2, alpha=4, use_rslora=True),
            "one use_rslora for all modules.*False on blocks.*True on gate.*fold_scale",
        ),
    ):
        mixed = trained(Model(), rank=2, alpha=4) if "rslora" in message else model
        mixed.gate = layer
        with pytest.raises(ValueError, match=message):
            save_lora(mixed, tmp_path / "a")
        assert not (tmp_path / "a").exists()
    save_lora(mixed, tmp_path / "a", fold_scale=True)  # each scale is in its own B then
    with pytest.raises(ValueError, match="model itself is a LoRALinear"):
        save_lora(LoRALinear(8, 8), tmp_path / "b")
    with pytest.raises(ValueError, match="no LoRALinear"):
        save_lora(nn.Linear(8, 8), tmp_path / "b")


def test_layers_without_alpha_beside_rslora(tmp_path):
    source = trained(Model(), rank=3, alpha=4, use_rslora=True)
    source.gate = LoRALinear.from_linear(nn.Linear(8, 8), 3)
    save_lora(source, tmp_path)
    target = Model()
    load_lora(target, tmp_path)
    assert target.gate.scale == 1.0 and target.blocks[0].q.scale == source.blocks[0].q.scale


def test_folding(tmp_path):
    narrow = {"lora_dtype": torch.bfloat16}
    source = trained(Model().bfloat16(), rank=4, alpha=3, rank_pattern={"gate": 2}, **narrow)
    save_lora(source, tmp_path, fold_scale=True)
    tensors = load_file(tmp_path / TENSORS)
    b = tensors["base_model.model.gate.lora_B.weight"]
    assert torch.equal(b[:, :2], (source.gate.lora.B.weight.float() * 1.5).bfloat16())
    assert not b[:, 2:].any() and not tensors["base_model.model.gate.lora_A.weight"][2:].any()
    target = Model().bfloat16()
    load_lora(target, tmp_path)
    assert target.gate.scale == 1.0 and target.gate.rank == 4
    with pytest.raises(AdapterMismatchError, match="expected"):
        load_lora(source, tmp_path)  # its scale and its ranks are others
    huge = trained(Model().half(), rank=2, alpha=1e6, lora_dtype=torch.float16)
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="B of 'blocks.0.q' is not finite in torch.float16"):
        save_lora(huge, tmp_path, fold_scale=True)
    assert contents(tmp_path) == before


def test_paths(tmp_path):
    model = trained(Model())
    for name in ("a.pth", "a.safetensors"):
        with pytest.raises(ValueError, match="fold_scale is for a directory"):
            save_lora(model, tmp_path / name, fold_scale=True)
    (tmp_path / "file").write_text("")
    for function in (save_lora, load_lora):
        for name in ("file", "llama-3.1"):
            with pytest.raises(ValueError, match="must end in .pth, .pt or .safetensors, or for"):
                function(model, tmp_path / name)
    (tmp_path / "llama-3.1").mkdir()
    save_lora(model, tmp_path / "llama-3.1")
    assert load_lora(Model(), tmp_path / "llama-3.1")
    (tmp_path / "taken" / CONFIG / "deep").mkdir(parents=True)
    with pytest.raises(ValueError, match=f"{CONFIG} is a directory"):
        save_lora(model, tmp_path / "taken")
    assert (tmp_path / "taken" / CONFIG / "deep").is_dir()
