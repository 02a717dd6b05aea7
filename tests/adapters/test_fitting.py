"""A file that does not fit the model changes nothing of it."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import save_file
from tiny_model import Model, snapshot, trained
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    LoRALinear,
    apply_lora,
    load_lora,
    lora_state_dict,
    save_lora,
)


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


def test_another_scale_is_refused_where_the_file_knows_it(tmp_path):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path / "a.safetensors")
    with pytest.raises(
        AdapterMismatchError, match=r"scale 2 \(rank 2, alpha 4.0\), the model has 1"
    ):
        load_lora(trained(Model(), rank=2), tmp_path / "a.safetensors")


@pytest.mark.parametrize("bare", [False, True], ids=["adapted", "bare"])
def test_values_too_large_for_the_models_dtype_are_refused(tmp_path, bare):
    state = {k: v.clone() for k, v in lora_state_dict(trained(Model(), rank=2)).items()}
    state["gate.lora.A.weight"][0, 0] = 1e6
    torch.save(state, tmp_path / "a.pth")
    narrow = {"lora_dtype": torch.float16}
    model = Model().half() if bare else trained(Model().half(), rank=2, **narrow)
    with pytest.raises(AdapterMismatchError, match="gate.lora.A.weight: too large for.*float16"):
        load_lora(model, tmp_path / "a.pth", **narrow)
    if bare:
        load_lora(model, tmp_path / "a.pth")  # into float32
        assert model.gate.lora.A.weight[0, 0] == 1e6


@pytest.mark.parametrize("bare", [False, True], ids=["adapted", "bare"])
def test_a_model_without_memory_is_refused(tmp_path, bare):
    save_lora(trained(Model(), rank=2), tmp_path / "a.pth")
    with torch.device("meta"):
        model = Model()
    if not bare:
        apply_lora(model, rank=2, verbose=False)
    with pytest.raises(AdapterMismatchError, match="on the meta device"):
        load_lora(model, tmp_path / "a.pth")


def test_loading_onto_other_modules_is_refused(tmp_path):
    source = trained(Model(), target_modules=["gate"])
    save_lora(source, tmp_path / "a.pth")
    target = Model()
    target.gate = nn.Conv1d(8, 8, 1)
    with pytest.raises(AdapterMismatchError, match="'gate' is a Conv1d"):
        load_lora(target, tmp_path / "a.pth")
    twin = copy.deepcopy(source)
    assert isinstance(twin.gate, LoRALinear)


def test_a_tied_head_in_the_file_is_refused_by_its_name_and_path(tmp_path):
    pair = {"lm_head.lora.A.weight": torch.ones(2, 8), "lm_head.lora.B.weight": torch.ones(10, 2)}
    torch.save(pair, tmp_path / "a.pth")
    model = Model()
    before = snapshot(model)
    with pytest.raises(
        AdapterMismatchError, match=r"a\.pth does not .*(?s:.)*'lm_head' shares its"
    ):
        load_lora(model, tmp_path / "a.pth")
    assert snapshot(model)[0] == before[0]


def test_an_encoder_layer_in_the_file_is_refused_by_its_name_and_path(tmp_path):
    model = nn.TransformerEncoderLayer(8, 2, 8)
    torch.save(
        {"linear1.lora.A.weight": torch.ones(2, 8), "linear1.lora.B.weight": torch.ones(8, 2)},
        tmp_path / "a.pth",
    )
    with pytest.raises(
        AdapterMismatchError, match=r"a\.pth does not .*(?s:.)*'linear1': TransformerEnc"
    ):
        load_lora(model, tmp_path / "a.pth")
    assert type(model.linear1) is nn.Linear
