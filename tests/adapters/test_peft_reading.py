"""PEFT's two files: everything that must be refused, and what need not be."""

from __future__ import annotations

import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import IDS, Model, assert_untouched, snapshot, trained
from tiny_peft import CONFIG, DROP, TENSORS, edit

from lora_kernels import AdapterMismatchError, load_lora, save_lora

BIN = "adapter_model.bin"

CONFIGS = {
    "r missing": ({"r": DROP}, "r is missing"),
    "r of another kind": ({"r": "4"}, "r must be an integer, got '4'"),
    "r zero": ({"r": 0}, "r must be at least 1"),
    "alpha missing": ({"lora_alpha": DROP}, "lora_alpha is missing, which PEFT would take for 8"),
    "alpha null": ({"lora_alpha": None}, "lora_alpha is missing"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha must be finite"),
    "alpha text": ({"lora_alpha": "x"}, "lora_alpha must be a number"),
    "dropout": ({"lora_dropout": 1.5}, "lora_dropout must be in"),
    "another rank": ({"r": 3}, r"gate\.lora_A\.weight: .*says rank 3, found shape \[2, 8\]"),
    "another pattern": ({"rank_pattern": {"gate": 5}}, r"gate\.lora_B\.weight: .*says rank 5"),
    "pattern of text": ({"rank_pattern": {"gate": "x"}}, r"rank_pattern\['gate'\] must be an int"),
    "alpha of null": ({"alpha_pattern": {"gate": None}}, "alpha_pattern must map names to numbers"),
    "pattern a list": ({"alpha_pattern": ["gate"]}, "alpha_pattern must map names to numbers"),
    "bad pattern": ({"rank_pattern": {"(": 2}}, "rank_pattern has a key that is no pattern"),
    "rslora": ({"use_rslora": "yes"}, "use_rslora must be True or False"),
    "peft type": ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
    "no peft type": ({"peft_type": DROP}, "peft_type is None"),
    "dora": ({"use_dora": True}, "use_dora is True: DoRA"),
    "bias": ({"bias": "some"}, "bias is 'some', expected one of none, lora_only, all"),
    "modules to save": ({"modules_to_save": "gate"}, "modules_to_save is 'gate', expected a list"),
    "no name": ({"modules_to_save": [""]}, r"modules_to_save is \[''\], expected a list of names"),
    "module absent": (
        {"modules_to_save": ["embed"]},
        "missing from the file: embed, of modules_to",
    ),
    "lora bias": ({"lora_bias": True}, "lora_bias is True"),
    "fan in": ({"fan_in_fan_out": True}, "fan_in_fan_out is True: transposed"),
    "replication": ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication is"),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
    "parameters": ({"target_parameters": "w"}, "target_parameters is"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config is"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens is"),
    "arrow": ({"arrow_config": {"top_k": 2}}, "arrow_config is"),
    "qalora": ({"use_qalora": True}, "use_qalora is True, a setting that this library does not"),
    "unknown": ({"use_next_year": {"a": 1}}, "use_next_year is .*does not know"),
} | {
    init: ({"init_lora_weights": init}, f"init_lora_weights is '{init}'.*rewritten the base")
    for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new")
}


def refused(directory, message, error=AdapterMismatchError):
    for model in (Model(), trained(Model(), rank=2, alpha=4)):
        before = snapshot(model)
        with pytest.raises(error, match=message) as caught:
            load_lora(model, directory)
        assert str(directory) in str(caught.value)
        assert_untouched(model, before)


@pytest.mark.parametrize("case", CONFIGS)
def test_configs_that_are_not_plain_lora_are_refused(tmp_path, case):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    changes, message = CONFIGS[case]
    edit(tmp_path, **changes)
    refused(tmp_path, message)


def test_all_that_is_wrong_with_a_config_is_said_at_once(tmp_path):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    edit(tmp_path, use_dora=True, lora_bias=True, r=DROP)
    refused(tmp_path, r"(?s)use_dora.*lora_bias.*r is missing")


@pytest.mark.parametrize(
    "changes",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}},
        {"init_lora_weights": False},
        {"init_lora_weights": "mica"},
        {"init_lora_weights": "Gaussian"},
        {"layers_to_transform": [0], "layers_pattern": "blocks"},
        {"target_modules": "all-linear", "exclude_modules": ["x"], "revision": "main"},
        {"use_next_year": None, "dora_next_year": False, "list_next_year": []},
        {"lora_dropout": DROP, "rank_pattern": None, "alpha_pattern": DROP, "use_rslora": DROP},
    ],
)
def test_configs_that_change_nothing_are_taken(tmp_path, changes):
    source = trained(Model(), rank=2, alpha=4)
    save_lora(source, tmp_path)
    edit(tmp_path, **changes)
    target = Model()
    target.load_state_dict(source.state_dict(), strict=False)
    load_lora(target, tmp_path)
    assert torch.equal(target(IDS), source(IDS))


def drop_b(t):
    del t["base_model.model.gate.lora_B.weight"]


def drop_module(t):
    del t["base_model.model.gate.lora_A.weight"], t["base_model.model.gate.lora_B.weight"]


def other_prefix(t):
    t["gate.lora_B.weight"] = t.pop("base_model.model.gate.lora_B.weight")


def strange_prefix(t):
    t["x.base_model.model.gate.lora_B.weight"] = t.pop("base_model.model.gate.lora_B.weight")


def no_name(t):
    t["base_model.model.lora_A.weight"] = torch.ones(2, 8)


def embedding(t):
    t["base_model.model.embed.lora_embedding_A"] = torch.ones(2, 10)


def embedding_weight(t):
    t["base_model.model.embed.weight"] = torch.ones(10, 8)


def magnitude(t):
    t["base_model.model.gate.lora_magnitude_vector"] = torch.ones(8)


def lora_bias(t):
    t["base_model.model.gate.lora_B.bias"] = torch.ones(8)


def stranger(t):
    t["base_model.model.blocks.7.q.lora_A.weight"] = torch.ones(2, 8)
    t["base_model.model.blocks.7.q.lora_B.weight"] = torch.ones(8, 2)


def not_finite(t):
    t["base_model.model.gate.lora_B.weight"][1, 1] = float("nan")


def infinite(t):
    t["base_model.model.gate.lora_B.weight"][1, 1] = float("inf")


def integers(t):
    t["base_model.model.gate.lora_A.weight"] = torch.ones(2, 8, dtype=torch.int8)


def width(t):
    t["base_model.model.gate.lora_A.weight"] = torch.ones(2, 9)


def vector(t):
    t["base_model.model.gate.lora_A.weight"] = torch.ones(8)


def empty(t):
    t.clear()


def twice(t):
    for key in [key for key in t if "gate" in key]:
        t[key.replace("gate", "module.gate")] = t[key].clone()


TENSOR_DAMAGE = {
    drop_b: r"missing key base_model\.model\.gate\.lora_B\.weight",
    other_prefix: r"unexpected key 'gate\.lora_B\.weight' \(keys are base_model\.model\.",
    strange_prefix: r"unexpected key 'x\.base_model\.model\.gate",
    no_name: r"unexpected key 'base_model\.model\.lora_A\.weight'",
    embedding: r"unexpected key .*lora_embedding_A' \(this is LoRA on an embedding\)",
    embedding_weight: r"unexpected key 'embed\.weight': it is the base's",
    magnitude: r"\(this is DoRA\)",
    lora_bias: r"\(this is lora_bias\)",
    stranger: r"blocks\.7\.q",
    not_finite: r"gate\.lora\.B\.weight: holds NaN",
    infinite: r"gate\.lora\.B\.weight: holds NaN or infinity",
    integers: r"gate\.lora\.A\.weight: expected a floating-point tensor, found torch\.int8",
    width: r"gate\.lora\.A\.weight: expected \[2, 8\], found \[2, 9\]",
    vector: r"gate\.lora\.A\.weight: expected a matrix",
    empty: "holds no tensors",
    twice: "is there twice",
}


@pytest.mark.parametrize("damage", TENSOR_DAMAGE, ids=lambda f: f.__name__)
def test_tensors_that_do_not_fit_change_nothing(tmp_path, damage):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    damage(tensors)
    save_file(tensors, tmp_path / TENSORS)
    refused(tmp_path, TENSOR_DAMAGE[damage])


def test_a_module_too_few(tmp_path):
    save_lora(trained(Model(), rank=2), tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    drop_module(tensors)
    save_file(tensors, tmp_path / TENSORS)
    assert load_lora(Model(), tmp_path) == ["blocks.0.q", "blocks.1.q"]
    with pytest.raises(AdapterMismatchError, match="missing from the file: gate"):
        load_lora(trained(Model(), rank=2), tmp_path)


def test_half_a_directory_is_refused(tmp_path):
    whole = tmp_path / "whole"
    save_lora(trained(Model(), rank=2, alpha=4), whole)
    for gone, kept in ((TENSORS, CONFIG), (CONFIG, TENSORS)):
        half = tmp_path / f"without_{kept[8:13]}"
        shutil.copytree(whole, half)
        (half / gone).unlink()
        refused(half, f"{gone} is missing, only {kept} is there")
    for name in (TENSORS, CONFIG):
        content = (whole / name).read_bytes()
        for length in (0, 7, len(content) - 5):
            cut = tmp_path / f"{name[8:13]}{length}"
            shutil.copytree(whole, cut)
            (cut / name).write_bytes(content[:length])
            refused(cut, f"{name} cannot be read, it may be damaged")
    for text in (b"[]", b"\xff\xfe", b"[" * 100_000, b'"LORA"'):
        (whole / CONFIG).write_bytes(text)
        refused(whole, f"{CONFIG} (cannot be read|holds a)")


def test_no_adapter_at_all(tmp_path):
    refused(tmp_path, "no adapter at", FileNotFoundError)
    refused(tmp_path / "nowhere", "no adapter at .*check the path", FileNotFoundError)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def as_bin(directory, change=lambda tensors: None):
    tensors = load_file(directory / TENSORS)
    change(tensors)
    torch.save(tensors, directory / BIN)
    (directory / TENSORS).unlink()


def test_the_older_bin_is_read_as_the_newer_file_is(tmp_path):
    source = trained(Model(), rank=2, alpha=4)
    save_lora(source, tmp_path)
    as_bin(tmp_path)
    target = Model()
    target.load_state_dict(source.state_dict(), strict=False)
    assert load_lora(target, tmp_path) == ["blocks.0.q", "blocks.1.q", "gate"]
    assert torch.equal(target(IDS), source(IDS))
    (tmp_path / CONFIG).unlink()
    refused(tmp_path, f"{CONFIG} is missing, only {BIN} is there")


def test_of_both_files_the_newer_is_read(tmp_path):
    source = trained(Model(), rank=2, alpha=4)
    save_lora(source, tmp_path)
    (tmp_path / BIN).write_bytes(b"not even looked at")
    target = Model()
    load_lora(target, tmp_path)
    assert torch.equal(target.gate.lora.A.weight, source.gate.lora.A.weight)


def test_code_in_a_bin_is_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path / "a")
    as_bin(tmp_path / "a", lambda t: t.update(evil=Evil()))
    refused(tmp_path / "a", f"{BIN} .*pickled objects, which could run code")
    (tmp_path / "a" / BIN).write_bytes(pickle.dumps(Evil(), protocol=2))
    refused(tmp_path / "a", f"{BIN} .*pickled objects, which could run code")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("damage", [drop_b, not_finite, width], ids=lambda f: f.__name__)
def test_a_damaged_bin_changes_nothing(tmp_path, damage):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    as_bin(tmp_path, damage)
    refused(tmp_path, TENSOR_DAMAGE[damage])
    for content in (b"", b"<html>", (tmp_path / BIN).read_bytes()[:300]):
        (tmp_path / BIN).write_bytes(content)
        refused(tmp_path, f"{BIN} cannot be read, it may be damaged")
    torch.save([torch.ones(2)], tmp_path / BIN)
    refused(tmp_path, f"{BIN} holds a list, not a dictionary")


def test_values_that_are_no_tensors_are_refused(tmp_path):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    as_bin(tmp_path, lambda t: t.update({"base_model.model.gate.lora_A.weight": [1.0]}))
    refused(tmp_path, r"gate\.lora\.A\.weight: expected a floating-point tensor, found list")


def with_copy(directory, name, tensor):
    tensors = load_file(directory / TENSORS)
    tensors[f"base_model.model.{name}"] = tensor
    save_file(tensors, directory / TENSORS)


def test_the_bases_own_copy_is_passed_over_if_it_is_the_models(tmp_path):
    torch.manual_seed(0)
    source = trained(Model(), rank=2, alpha=4)
    save_lora(source, tmp_path)
    with_copy(tmp_path, "gate.base_layer.weight", source.gate.weight.detach().bfloat16())
    with_copy(tmp_path, "gate.base_layer.bias", source.gate.bias.detach().clone())
    torch.manual_seed(0)
    model = Model()
    before = model.gate.weight.clone()
    load_lora(model, tmp_path)  # bfloat16 is the narrower of the two
    assert torch.equal(model.gate.weight, before)
    assert torch.equal(model(IDS), source(IDS))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("gate.base_layer.weight", torch.ones(8, 8), r"'gate\.weight': it is the base's, and ano"),
        ("gate.base_layer.weight", torch.ones(9, 8), r"gate\.weight: expected \[8, 8\], found \[9"),
        ("gate.base_layer.bias", torch.full((8,), torch.nan), r"gate\.bias: holds NaN"),
        ("gone.base_layer.weight", torch.ones(8, 8), r"'gone\.weight': the model has no such"),
        ("gate.base_layer.scale", torch.ones(8, 8), "'gate.scale': the model has no such"),
    ],
)
def test_another_bases_copy_is_refused(tmp_path, name, tensor, message):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    with_copy(tmp_path, name, tensor)
    refused(tmp_path, message)


@pytest.mark.parametrize("name", [TENSORS, CONFIG])
def test_links_out_of_the_directory_are_not_followed(tmp_path, name):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path / "a")
    (tmp_path / "a" / name).rename(tmp_path / name)
    (tmp_path / "a" / name).symlink_to(tmp_path / name)
    refused(tmp_path / "a", f"{name} is a link to .*outside the directory")
    (tmp_path / name).unlink()
    refused(tmp_path / "a", f"{name} is a link that leads nowhere")
    (tmp_path / "a" / name).unlink()
    (tmp_path / "a" / name).mkdir()
    refused(tmp_path / "a", f"{name} is not a file")


def test_prefixes_in_the_file_itself(tmp_path):
    source = trained(Model(), rank=2, rank_pattern={"gate": 3})
    save_lora(source, tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    for old, new in (
        ("base_model.model.", "_orig_mod.base_model.model."),
        ("base_model.model.", "base_model.model._orig_mod."),
    ):
        save_file({k.replace(old, new): v for k, v in tensors.items()}, tmp_path / TENSORS)
        edit(tmp_path, rank_pattern={"gate": 3})
        target = Model()
        assert load_lora(target, tmp_path) == ["blocks.0.q", "blocks.1.q", "gate"]
        assert torch.equal(target.gate.lora.A.weight, source.gate.lora.A.weight)


def test_not_strict_takes_what_both_have(tmp_path):
    save_lora(trained(Model(), rank=2, target_modules=["q"]), tmp_path)
    target = trained(Model(), rank=2, target_modules=["blocks.1.q", "gate"])
    with pytest.raises(AdapterMismatchError, match="missing from the file: gate"):
        load_lora(target, tmp_path)
    assert load_lora(target, tmp_path, strict=False) == ["blocks.1.q"]


def test_a_model_of_another_rank_or_scale_is_left_alone(tmp_path):
    save_lora(trained(Model(), rank=2, alpha=4), tmp_path)
    for settings, message in (
        ({"rank": 2}, "trained with scale 2"),
        ({"rank": 3, "alpha": 6}, r"gate\.lora\.A\.weight: expected \[3, 8\], found \[2, 8\]"),
    ):
        target = trained(Model(), **settings)
        before = snapshot(target)
        with pytest.raises(AdapterMismatchError, match=message):
            load_lora(target, tmp_path)
        assert_untouched(target, before)


def test_links_within_the_directory_and_to_it_are_fine(tmp_path):
    save_lora(trained(Model(), rank=2), tmp_path / "a")
    (tmp_path / "a" / TENSORS).rename(tmp_path / "a" / "real")
    (tmp_path / "a" / TENSORS).symlink_to("real")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert load_lora(Model(), tmp_path / "link")
    save_lora(trained(Model(), rank=2), tmp_path / "link")  # replaces the link, not its target
    assert not (tmp_path / "a" / TENSORS).is_symlink() and (tmp_path / "link").is_symlink()
