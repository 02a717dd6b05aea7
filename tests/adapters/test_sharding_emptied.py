"""Adapters under DeepSpeed's ZeRO-3, which empties parameters between their uses.

DeepSpeed is imitated: what it does to a parameter, and what its GatheredParameters undoes.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import IDS, Model, trained
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    merge_lora,
    merged_lora,
    remove_lora,
    save_lora,
)

GATHER = "with deepspeed.zero.GatheredParameters({}, modifier_rank=0):"
LORA, ALL = GATHER.format("lora_parameters(model)"), GATHER.format("model.parameters()")


def empty(parameters):
    for parameter in parameters:
        if not hasattr(parameter, "ds_shape"):
            parameter.ds_id, parameter.ds_shape = id(parameter), parameter.shape
        parameter.ds_tensor, parameter.data = parameter.data, torch.empty(0)


@contextmanager
def gathered(parameters):
    parameters = [p for p in parameters if hasattr(p, "ds_shape")]
    for parameter in parameters:
        parameter.data = parameter.ds_tensor
    yield
    empty(parameters)


def zero(**settings):
    """A model with LoRA, all of it emptied, and the same one as it was."""
    torch.manual_seed(0)
    model = trained(Model(), rank=2, alpha=4, **settings)
    torch.manual_seed(0)
    plain = trained(Model(), rank=2, alpha=4, **settings)
    empty(model.parameters())
    return model, plain


def said(model, act):
    """The message of a refusal, after which the model is as it was."""
    before = [(id(m), type(m)) for m in model.modules()]
    tensors = [p.ds_tensor.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="ZeRO-3") as caught:
        act(model)
    assert [(id(m), type(m)) for m in model.modules()] == before
    after = list(model.parameters())
    assert all(p.numel() == 0 for p in after)
    assert all(torch.equal(p.ds_tensor, t) for p, t in zip(after, tensors, strict=True))
    message = str(caught.value)
    assert "FSDP" not in message and "FullyShard" not in message
    return message


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth", "directory"])
def test_files(tmp_path, name):
    model, plain = zero()
    path = tmp_path / name
    key = "'blocks.0.q.lora.A.weight' is emptied"
    message = said(model, lambda m: save_lora(m, path))
    assert key in message and LORA in message and not path.exists()
    message = said(model, lora_state_dict)
    assert key in message and LORA in message
    with gathered(lora_parameters(model)):
        save_lora(model, path)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.ds_tensor.zero_()
    message = said(model, lambda m: load_lora(m, path))
    assert key in message and LORA in message
    with gathered(lora_parameters(model)):
        load_lora(model, path)
        torch.testing.assert_close(lora_state_dict(model), lora_state_dict(plain), rtol=0, atol=0)


@pytest.mark.parametrize("act", [merge_lora, lambda m: merged_lora(m).__enter__()])
def test_merging(act):
    model, plain = zero()
    assert ALL in said(model, act)
    layer = model.gate  # the factors alone are not enough, nor is the weight
    base = [p for name, p in model.named_parameters() if "lora" not in name]
    for some, missing in ((lora_parameters(model), "weight"), (base, "lora.A.weight")):
        with gathered(some), pytest.raises(ValueError, match=f"'blocks.0.q.{missing}' is emptied"):
            act(model)
    assert model.gate is layer
    with gathered(model.parameters()):
        act(model)
        act(plain)
        assert torch.equal(model(IDS), plain(IDS)) and torch.equal(
            model.gate.weight, plain.gate.weight
        )


def test_an_adapter_is_taken_out():
    model, plain = zero()
    assert remove_lora(model) == remove_lora(plain)
    assert not any("lora" in name for name, _ in model.named_parameters())
    with gathered(model.parameters()):
        assert torch.equal(model(IDS), plain(IDS))


def test_an_adapter_is_put_on_an_emptied_base(tmp_path):
    torch.manual_seed(0)
    plain = trained(Model(), rank=2, alpha=4)
    save_lora(plain, tmp_path / "a.safetensors")
    torch.manual_seed(0)
    bare, loaded = Model(), None
    bare.load_state_dict(plain.state_dict(), strict=False)
    empty(bare.parameters())
    apply_lora(bare, 2, alpha=4, verbose=False)
    shapes = {key: tensor.shape for key, tensor in lora_state_dict(plain).items()}
    assert {key: tensor.shape for key, tensor in lora_state_dict(bare).items()} == shapes
    remove_lora(bare)
    load_lora(bare, tmp_path / "a.safetensors")
    with gathered(bare.parameters()):
        loaded = bare(IDS)
    assert torch.equal(loaded, plain(IDS))


def test_what_is_trained_whole(tmp_path):
    model, plain = zero(modules_to_save=["blocks.1.k"])
    path = tmp_path / "a.safetensors"
    factors = [p for name, p in model.named_parameters() if "lora" in name]
    for act in (lambda: save_lora(model, path), lambda: lora_state_dict(model)):
        with gathered(factors), pytest.raises(ValueError, match="'blocks.1.k.weight' is emptied"):
            act()
    with gathered(lora_parameters(model)):
        save_lora(model, path)
    save_lora(plain, tmp_path / "b.safetensors")
    found, expected = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with gathered(factors), pytest.raises(ValueError, match="'blocks.1.k.weight' is emptied"):
        load_lora(model, path)
    bare = Model()
    empty(bare.parameters())
    message = said(bare, lambda m: apply_lora(m, 2, modules_to_save=["blocks.1.k"]))
    assert ALL in message
    with pytest.raises(AdapterMismatchError, match="ZeRO-3"):
        load_lora(bare, path)
    with gathered(bare.parameters()):
        apply_lora(bare, 2, modules_to_save=["blocks.1.k"], verbose=False)
    assert bare.blocks[1].k.weight.shape == (4, 8)


def test_single_tokens():
    bare = nn.ModuleDict({"embed": nn.Embedding(10, 8), "gate": nn.Linear(8, 8)})
    empty(bare.parameters())
    tokens = {"embed": [1, 2]}
    message = said(bare, lambda m: apply_lora(m, 2, trainable_token_indices=tokens))
    assert "tokens of 'embed'" in message and ALL in message
    with gathered(bare.parameters()):
        apply_lora(bare, 2, trainable_token_indices=tokens, verbose=False)
    with gathered([bare.gate.weight]), pytest.raises(ValueError, match="'embed.weight' is emptied"):
        merge_lora(bare)
