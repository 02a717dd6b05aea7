"""No message is longer than thirty lines and 2,000 characters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import Model, trained
from tiny_peft import TENSORS, edit
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    load_lora,
    lora_state_dict,
    save_lora,
    use_lora,
)
from lora_kernels.adapters.wording import shortened


def test_what_is_short_is_left_alone():
    for text in ("", "one", "one\n  two", "\n".join(["x"] * 29), "x" * 500):
        assert shortened(text) == text


def test_what_is_left_out_is_counted():
    many = shortened("\n".join(f"line {i}" for i in range(500)))
    assert many.splitlines()[-1] == "  and 471 more" and len(many.splitlines()) == 30
    wide = shortened("\n".join(["y" * 700] * 10))
    assert wide.splitlines() == ["y" * 498 + " …"] * 3 + ["  and 7 more"]


def unexpected(state):
    return {**state, **{f"a{i}.lora.C.weight": torch.ones(1) for i in range(500)}}


def long_names(state):
    return {**state, **{f"{'n' * 5000}{i}.lora.C.weight": torch.ones(1) for i in range(3)}}


def strangers(state):
    pair = {"A": torch.ones(2, 8), "B": torch.ones(8, 2)}
    more = {f"b{i}.lora.{f}.weight": t for i in range(500) for f, t in pair.items()}
    return {**state, **{key: tensor.clone() for key, tensor in more.items()}}


def twice(state):
    return {**state, **{f"{'n' * 9000}.{m}x": torch.ones(1) for m in ("", "module.")}}


def wholes(state):
    return {**state, **{f"c{i}.weight": torch.ones(1) for i in range(500)}}


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("hurt", [unexpected, long_names, strangers, twice, wholes])
def test_files_with_much_that_is_wrong(tmp_path, hurt, peft):
    model = trained(Model(), rank=2, alpha=4)
    if peft:
        save_lora(model, tmp_path)
        state = hurt(load_file(tmp_path / TENSORS))
        names = {k: k if k.startswith("base") else f"base_model.model.{k}" for k in state}
        names = {k: n.replace(".lora.", ".lora_").replace("_C", "_C") for k, n in names.items()}
        save_file({names[k]: t for k, t in state.items()}, tmp_path / TENSORS)
        edit(tmp_path, modules_to_save=[f"c{i}" for i in range(500)])
        path = tmp_path
    else:
        path = tmp_path / "a.pth"
        torch.save(hurt(dict(lora_state_dict(model))), path)
    with pytest.raises(AdapterMismatchError) as caught:
        load_lora(Model(), path)
    said = str(caught.value)
    assert len(said) <= 2000 and len(said.splitlines()) <= 30 and str(tmp_path) in said


def deep(count=300):
    model = nn.ModuleList(nn.ModuleDict({"projection": nn.Linear(2, 2)}) for _ in range(count))
    apply_lora(model, 1, verbose=False)
    return model


def unlike_dropouts(model, directory):
    for block in model[::2]:
        block["projection"].set_dropout(0.5)
    save_lora(model, directory / "a")


def rows_of_many(model, directory):
    tokens = {"trainable_token_indices": {"projection": [1]}, "target_modules": ["projection"]}
    apply_lora(model, 1, name="fr", verbose=False, **tokens)


def tied_to_many(model, directory):
    for i, block in enumerate(model[1:]):
        block["norm"] = nn.Linear(2, 2)
        if i:
            block["norm"].weight = model[1]["norm"].weight
    settings = {"target_modules": ["projection"], "modules_to_save": ["1.norm"]}
    apply_lora(model, 1, name="fr", verbose=False, **settings)


def many_adapters(model, directory):
    layer = model[0]["projection"]
    for i in range(300):
        layer.add_adapter(f"adapter-{i}", layer.lora_config)
    use_lora(model, "another")


@pytest.mark.parametrize("wrong", [unlike_dropouts, rows_of_many, tied_to_many, many_adapters])
def test_models_of_many_layers(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"and \d\d\d more") as error:
        wrong(deep(), tmp_path)
    assert len(str(error.value)) <= 2000 and len(str(error.value).splitlines()) <= 30
