"""No message is longer than thirty lines and 2,000 characters."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import Model, trained
from tiny_peft import TENSORS, edit

from lora_kernels import AdapterMismatchError, load_lora, lora_state_dict, save_lora
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
