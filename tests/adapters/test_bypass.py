"""Linears whose weight is read past them: left out, or refused where they are named."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_model import assert_untouched, snapshot
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    load_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    merged_lora,
)
from lora_kernels.adapters.bypass import bypassed_linears
from lora_kernels.adapters.weight_reads import SourceReader

SIZES = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "intermediate_size": 16}
# Of transformers: further settings, and the endings of the linears that are read past.
FAMILIES = {
    "Mamba": ({"state_size": 4}, ["x_proj", "dt_proj", "out_proj"]),
    "Mamba2": ({"state_size": 4, "num_heads": 4, "head_dim": 8, "n_groups": 1}, ["out_proj"]),
    "FalconMamba": ({"state_size": 4}, ["x_proj", "dt_proj", "out_proj"]),
    "Rwkv": ({}, ["output", "value"]),
    "Bloom": ({"n_head": 2}, []),
    "Llama": (HEADS, []),
    "MobileBert": (HEADS, []),
    "WavLM": (HEADS, ["k_proj", "v_proj", "q_proj", "out_proj"]),
    "Deberta": (HEADS, []),
    "T5": ({"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}, []),
}


def family(name):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name][0]})
    return getattr(transformers, f"{name}Model")(config)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    model = family(name)
    found = bypassed_linears(model)
    assert list(dict.fromkeys(n.rpartition(".")[2] for n in found)) == FAMILIES[name][1]


def test_bloom_reads_them_with_the_settings_that_do():
    model = family("Bloom")
    attention = model.h[1].self_attention
    attention.pretraining_tp, attention.slow_but_exact = 2, True
    assert bypassed_linears(model) == {"h.1.self_attention.dense": "BloomAttention.forward"}


def test_all_linear_leaves_them_out_and_says_so(capsys):
    model = family("Mamba")
    names = apply_lora(model, 2, target_modules="all-linear")
    assert names == [f"layers.{i}.mixer.in_proj" for i in range(2)]
    (said,) = capsys.readouterr().out.splitlines()[2:]
    assert re.fullmatch(
        r"leave out x_proj, dt_proj, out_proj \(6\): MambaMixer\.\w+ reads the weight past "
        "the module, and LoRA there would not run",
        said,
    )
    mark_only_lora_as_trainable(model)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.5)
    ids = torch.arange(8)[None]
    model.eval()(ids)[0].square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in lora_parameters(model))
    with torch.no_grad():
        y = model(ids)[0]
        with merged_lora(model):
            torch.testing.assert_close(model(ids)[0], y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [["in_proj", "x_proj", "out_proj"], r".*_proj"])
def test_named_they_are_refused(targets):
    model = family("Mamba")
    before = snapshot(model)
    with pytest.raises(TypeError, match=r"'layers.0.mixer.x_proj': MambaMixer\.\w+ reads its"):
        apply_lora(model, 2, target_modules=targets)
    assert_untouched(model, before)


def test_a_file_for_them_is_refused(tmp_path):
    model = family("Mamba")
    name, weight = "layers.0.mixer.dt_proj", model.layers[0].mixer.dt_proj.weight
    torch.save(
        {
            f"{name}.lora.A.weight": torch.ones(2, weight.shape[1]),
            f"{name}.lora.B.weight": torch.ones(weight.shape[0], 2),
        },
        tmp_path / "a.pth",
    )
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match=rf"{name}': MambaMixer\.\w+ reads its"):
        load_lora(model, tmp_path / "a.pth")
    assert_untouched(model, before)


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return x @ self.fc.weight


def test_where_there_are_no_others_it_is_said():
    with pytest.raises(ValueError, match=r"(?s)no module is left.*fc \(1\): Product.forward"):
        apply_lora(Product(), 2)


def test_torchs_own_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    names = [f"layers.{i}.{n}" for i in range(2) for n in ("self_attn.out_proj", "linear1")]
    assert {*names, "layers.0.linear2", "layers.1.linear2"} == set(bypassed_linears(model))
    assert bypassed_linears(nn.LSTM(4, 4)) == {} == bypassed_linears(nn.Linear(4, 4))


def test_many_layers_of_a_class_are_read_once(monkeypatch):
    read = []
    reads = SourceReader.reads
    monkeypatch.setattr(
        SourceReader, "reads", lambda self, *kind: read.append(kind) or reads(self, *kind)
    )
    found = bypassed_linears(nn.Sequential(*(Product() for _ in range(50))))
    assert len(found) == 50 and read == [(Product, "forward")]
