"""Adapters saved and loaded: the same again, and nothing else of the model."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import IDS, SUFFIXES, Model, trained
from torch import nn

from lora_kernels import AdapterMismatchError, apply_lora, load_lora, lora_state_dict, save_lora


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix, dtype):
    torch.manual_seed(1)
    source = trained(Model().to(dtype), rank=3, lora_dtype=dtype)
    path = tmp_path / "deep" / f"adapter{suffix}"
    save_lora(source, path)
    torch.manual_seed(1)
    target = Model().to(dtype)
    apply_lora(target, rank=3, lora_dtype=dtype, verbose=False)
    assert load_lora(target, path) == ["blocks.0.q", "blocks.1.q", "gate"]
    assert torch.equal(target(IDS), source(IDS))
    on_disk = load_file(path) if suffix == ".safetensors" else torch.load(path, weights_only=True)
    assert on_disk.keys() == lora_state_dict(source).keys()
    assert type(on_disk) is dict and {t.dtype for t in on_disk.values()} == {dtype}
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary left
    mask = os.umask(0)
    os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~mask


def test_nothing_but_the_adapter_is_saved(tmp_path):
    model = trained(nn.Sequential(nn.Linear(512, 512)), rank=1)
    # Views of something large must not drag it along.
    large = torch.randn(512, 4096)
    model[0].lora.A.weight = nn.Parameter(large[:1, :512])
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        save_lora(model, path)
        assert path.stat().st_size < 8192


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_bare_model_gets_what_the_file_describes(tmp_path, suffix):
    torch.manual_seed(1)
    scaling = {} if suffix != ".safetensors" else {"alpha": 6, "dropout": 0.1, "use_rslora": True}
    source = trained(Model(), rank=4, rank_pattern={"gate": 2}, **scaling).eval()
    save_lora(source, tmp_path / f"a{suffix}")
    torch.manual_seed(1)
    target = Model().eval()
    load_lora(target, tmp_path / f"a{suffix}")
    assert torch.equal(target(IDS), source(IDS))
    for name in ("blocks.0.q", "gate"):
        assert target.get_submodule(name).lora_config == source.get_submodule(name).lora_config


class Wrapper(nn.Module):
    def __init__(self, module, name):
        super().__init__()
        setattr(self, name, module)


@pytest.mark.parametrize(
    "prefix", ["module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"]
)
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_wrapper_prefixes_are_dropped_on_both_sides(tmp_path, prefix, suffix):
    source = trained(Model())
    plain, wrapped = tmp_path / f"plain{suffix}", tmp_path / f"wrapped{suffix}"
    save_lora(source, plain)
    save_lora(Wrapper(source, prefix), wrapped)
    assert lora_state_dict(Wrapper(source, prefix)).keys() == lora_state_dict(source).keys()
    for path in (plain, wrapped):
        bare, inside = Model(), Wrapper(Model(), prefix)
        load_lora(bare, path)
        load_lora(inside, path)
        for target in (bare, inside):
            for name, tensor in lora_state_dict(source).items():
                assert torch.equal(lora_state_dict(target)[name], tensor)


def test_prefixes_in_the_file_itself(tmp_path):
    source = trained(Model())
    state = {f"module._orig_mod.{k}": v for k, v in lora_state_dict(source).items()}
    torch.save(state, tmp_path / "a.pth")
    target = Model()
    assert load_lora(target, tmp_path / "a.pth") == ["blocks.0.q", "blocks.1.q", "gate"]


def test_values_are_cast_to_the_models_dtype(tmp_path):
    source = trained(Model())
    state = {k: v.half() for k, v in lora_state_dict(source).items()}
    torch.save(state, tmp_path / "half.pth")  # as the original project saves
    target = Model()
    load_lora(target, tmp_path / "half.pth")
    for name, tensor in lora_state_dict(target).items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[name].float())


def test_not_strict_takes_what_both_have(tmp_path):
    source = trained(Model(), rank=2, target_modules=["q"])
    save_lora(source, tmp_path / "a.pth")
    target = trained(Model(), rank=2, target_modules=["blocks.1.q", "gate"])
    gate = target.gate.lora.A.weight.clone()
    with pytest.raises(AdapterMismatchError, match=r"missing from the file: gate\n.*blocks.0.q"):
        load_lora(target, tmp_path / "a.pth")
    assert load_lora(target, tmp_path / "a.pth", strict=False) == ["blocks.1.q"]
    assert torch.equal(target.blocks[1].q.lora.B.weight, source.blocks[1].q.lora.B.weight)
    assert torch.equal(target.gate.lora.A.weight, gate)
    stranger = trained(Model(), rank=2, target_modules=["gate"])
    with pytest.raises(AdapterMismatchError, match="no module in common"):
        load_lora(stranger, tmp_path / "a.pth", strict=False)


def test_metadata_says_how_the_adapter_was_made(tmp_path):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path / "a.safetensors")
    import safetensors

    with safetensors.safe_open(tmp_path / "a.safetensors", "pt") as file:
        metadata = json.loads(file.metadata()["lora_kernels"])
    assert metadata["modules"]["gate"] == {
        "rank": 2,
        "alpha": 4.0,
        "dropout": 0.0,
        "use_rslora": False,
    }


def test_paths_are_checked(tmp_path):
    model = trained(Model())
    for function in (save_lora, load_lora):
        with pytest.raises(ValueError, match=r"must end in \.pth, \.pt or \.safetensors"):
            function(model, tmp_path / "adapter.bin")
    with pytest.raises(FileNotFoundError, match="no adapter file at"):
        load_lora(model, tmp_path / "none.pth")
