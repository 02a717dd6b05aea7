"""Adapters on disk: save, load, and everything that must be refused."""

from __future__ import annotations

import copy
import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_surgery import IDS, Model, snapshot, trained
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    LoRALinear,
    apply_lora,
    load_lora,
    lora_state_dict,
    save_lora,
)

SUFFIXES = [".pth", ".pt", ".safetensors"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_round_trip(tmp_path, suffix, dtype):
    torch.manual_seed(1)
    source = trained(Model().to(dtype), rank=3)
    path = tmp_path / "deep" / f"adapter{suffix}"
    save_lora(source, path)
    torch.manual_seed(1)
    target = Model().to(dtype)
    apply_lora(target, rank=3, verbose=False)
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


def drop(state):
    del state["gate.lora.B.weight"]


def drop_module(state):
    del state["gate.lora.B.weight"], state["gate.lora.A.weight"]


def extra_key(state):
    state["gate.lora.C.weight"] = torch.ones(2, 2)


def base_key(state):
    state["gate.weight"] = torch.ones(8, 8)


def extra_module(state):
    state["blocks.7.q.lora.A.weight"] = torch.ones(2, 8)
    state["blocks.7.q.lora.B.weight"] = torch.ones(8, 2)


def other_rank(state):
    state["gate.lora.A.weight"] = torch.ones(5, 8)
    state["gate.lora.B.weight"] = torch.ones(8, 5)


def other_width(state):
    state["gate.lora.A.weight"] = torch.ones(2, 9)


def one_dimensional(state):
    state["gate.lora.A.weight"] = torch.ones(8)


def not_finite(state):
    state["gate.lora.B.weight"][3, 1] = float("nan")


def infinite(state):
    state["gate.lora.B.weight"][3, 1] = float("inf")


def integers(state):
    state["gate.lora.A.weight"] = torch.ones(2, 8, dtype=torch.int64)


def empty(state):
    state.clear()


DAMAGE = {
    drop: r"missing key gate\.lora\.B\.weight",
    drop_module: "missing from the file: gate",
    extra_key: r"unexpected key 'gate\.lora\.C\.weight'",
    base_key: r"unexpected key 'gate\.weight'",
    extra_module: r"blocks\.7\.q",
    other_rank: r"gate\.lora\.A\.weight: expected \[2, 8\], found \[5, 8\]",
    other_width: r"gate\.lora\.A\.weight: expected \[2, 8\], found \[2, 9\]",
    one_dimensional: r"gate\.lora\.A\.weight: expected a matrix",
    not_finite: r"gate\.lora\.B\.weight: holds NaN",
    infinite: r"gate\.lora\.B\.weight: holds NaN or infinity",
    integers: r"gate\.lora\.A\.weight: expected a floating-point tensor, found torch\.int64",
    empty: "holds no tensors",
}
# On a model without LoRA the file itself says rank and modules.
FINE_ON_A_BARE_MODEL = {drop_module, other_rank}


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("bare", [False, True], ids=["adapted", "bare"])
@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_file_that_does_not_fit_changes_nothing(tmp_path, damage, bare, suffix):
    state = {k: v.clone() for k, v in lora_state_dict(trained(Model(), rank=2)).items()}
    damage(state)
    path = tmp_path / f"a{suffix}"
    (torch.save if suffix == ".pth" else save_file)(state, path)
    model = Model() if bare else trained(Model(), rank=2)
    before = snapshot(model)
    if bare and damage in FINE_ON_A_BARE_MODEL:
        load_lora(model, path)
        return
    with pytest.raises(AdapterMismatchError, match=DAMAGE[damage]):
        load_lora(model, path)
    modules, tensors = snapshot(model)
    assert modules == before[0] and tensors.keys() == before[1].keys()
    assert all(torch.equal(tensors[name], before[1][name]) for name in tensors)


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


def test_another_scale_is_refused_where_the_file_knows_it(tmp_path):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path / "a.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=r"scale 2 \(rank 2, alpha 4.0\), the model has 1"
    ):
        load_lora(trained(Model(), rank=2), tmp_path / "a.safetensors")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_code_in_a_pickle_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.pth"
    torch.save({"gate.lora.A.weight": Evil()}, path)
    with pytest.raises(AdapterMismatchError, match="pickled objects"):
        load_lora(Model(), path)
    path.write_bytes(pickle.dumps(Evil(), protocol=2))
    with pytest.raises(AdapterMismatchError, match="pickled objects"):
        load_lora(Model(), path)
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("length", [0, 7, 300])
def test_half_a_file_is_refused(tmp_path, suffix, length):
    path = tmp_path / f"a{suffix}"
    save_lora(trained(Model()), path)
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(AdapterMismatchError, match=f"a{suffix} "):
        load_lora(Model(), path)


@pytest.mark.parametrize("bare", [False, True], ids=["adapted", "bare"])
def test_values_too_large_for_the_models_dtype_are_refused(tmp_path, bare):
    state = {k: v.clone() for k, v in lora_state_dict(trained(Model(), rank=2)).items()}
    state["gate.lora.A.weight"][0, 0] = 1e6
    torch.save(state, tmp_path / "a.pth")
    model = Model().half() if bare else trained(Model().half(), rank=2)
    with pytest.raises(AdapterMismatchError, match="gate.lora.A.weight: too large for.*float16"):
        load_lora(model, tmp_path / "a.pth")


@pytest.mark.parametrize("bare", [False, True], ids=["adapted", "bare"])
def test_a_model_without_memory_is_refused(tmp_path, bare):
    save_lora(trained(Model(), rank=2), tmp_path / "a.pth")
    with torch.device("meta"):
        model = Model()
    if not bare:
        apply_lora(model, rank=2, verbose=False)
    with pytest.raises(AdapterMismatchError, match="on the meta device"):
        load_lora(model, tmp_path / "a.pth")


def test_one_layer_under_two_names_is_refused(tmp_path):
    state = dict(lora_state_dict(trained(Model(), rank=2)))
    state |= {f"module.{k}": v for k, v in state.items()}
    torch.save(state, tmp_path / "a.pth")
    with pytest.raises(AdapterMismatchError, match="is there twice"):
        load_lora(Model(), tmp_path / "a.pth")


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", b"PK\x03\x04garbage"])
def test_files_of_another_kind_are_not_called_pickles(tmp_path, content):
    for suffix in SUFFIXES:
        path = tmp_path / f"a{suffix}"
        path.write_bytes(content)
        with pytest.raises(
            AdapterMismatchError, match="^(?!.*weights_only).*another kind.*save_lora$"
        ):
            load_lora(Model(), path)


# torch 2.11 warns whenever it reads a sparse tensor without invariant checks.
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_sparse_and_narrow_tensors_are_refused(tmp_path):
    for tensor, message in (
        (torch.ones(2, 8).to_sparse(), "expected a dense tensor"),
        (torch.ones(2, 8).to(torch.float8_e4m3fn), "found torch.float8"),
    ):
        state = {**lora_state_dict(trained(Model(), rank=2)), "gate.lora.A.weight": tensor}
        torch.save(state, tmp_path / "a.pth")
        with pytest.raises(AdapterMismatchError, match=message):
            load_lora(Model(), tmp_path / "a.pth")


@pytest.mark.parametrize(
    "metadata",
    [
        "not json",
        "{}",
        "[]",
        '{"version": 1, "modules": []}',
        '{"version": 1, "modules": {"gate": {"rank": 0}}}',
        '{"version": 2, "modules": {}}',
    ],
)
def test_damaged_metadata_is_refused(tmp_path, metadata):
    state = lora_state_dict(trained(Model()))
    save_file(state, tmp_path / "a.safetensors", {"lora_kernels": metadata})
    with pytest.raises(AdapterMismatchError, match="cannot be read"):
        load_lora(Model(), tmp_path / "a.safetensors")


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


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    save_lora(trained(Model()), path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_lora(trained(Model()), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.pth"]


def test_paths_are_checked(tmp_path):
    model = trained(Model())
    for function in (save_lora, load_lora):
        with pytest.raises(ValueError, match=r"must end in \.pth, \.pt or \.safetensors"):
            function(model, tmp_path / "adapter.bin")
    with pytest.raises(FileNotFoundError, match="no adapter file at"):
        load_lora(model, tmp_path / "none.pth")


def test_loading_onto_other_modules_is_refused(tmp_path):
    source = trained(Model(), target_modules=["gate"])
    save_lora(source, tmp_path / "a.pth")
    target = Model()
    target.gate = nn.Conv1d(8, 8, 1)
    with pytest.raises(AdapterMismatchError, match="'gate' is a Conv1d"):
        load_lora(target, tmp_path / "a.pth")
    twin = copy.deepcopy(source)
    assert isinstance(twin.gate, LoRALinear)
