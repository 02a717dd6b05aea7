"""Several adapters on one model, against PEFT itself."""

from __future__ import annotations

import pytest
import torch
from tiny_peft import TARGETS, TOKENS, base, fill

from lora_kernels import (
    load_lora,
    lora_adapters,
    lora_parameters,
    merge_lora,
    merged_lora,
    save_lora,
    use_lora,
)

peft = pytest.importorskip("peft")

from peft.tuners.lora import LoraLayer  # noqa: E402

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated", "ignore:Adapter cat was active"
)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}
NAME = "qwen2"  # its biases take part


def settings():
    first, second, third = TARGETS[NAME]
    return {
        "default": {"r": 4, "lora_alpha": 6, "target_modules": [first, second]},
        "fr": {"r": 2, "lora_alpha": 3, "target_modules": [second], "use_rslora": True},
        "tone": {"r": 3, "lora_alpha": 1, "target_modules": [first, third]},
    }


@pytest.fixture
def theirs():
    """PEFT's model with three adapters, in float64."""
    plain = base(NAME, dtype=torch.float64)
    asked = {name: peft.LoraConfig(**s) for name, s in settings().items()}
    model = peft.get_peft_model(plain, asked.pop("default"), autocast_adapter_dtype=False)
    for name, config in asked.items():
        model.add_adapter(name, config)
    model.double().eval()
    fill(p for n, p in model.named_parameters() if ".lora_" in n)
    return model


@pytest.fixture
def pair(theirs, tmp_path):
    """It, and ours with the adapters that it saved: others than the default in a directory each."""
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["fr", "tone"]
    ours = base(NAME, dtype=torch.float64)
    load_lora(ours, tmp_path)
    for name in ("fr", "tone"):
        load_lora(ours, tmp_path / name, name=name)
    assert lora_adapters(ours) == {"default": 1.0, "fr": None, "tone": None}
    return theirs, ours


def choose(pair, names, weights=None):
    theirs, ours = pair
    theirs.base_model.set_adapter(names)
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        for module in theirs.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.set_scale(name, weight)
    use_lora(ours, names, weights=weights)


def gradients(model, parameters):
    model.zero_grad()
    loss = model(input_ids=TOKENS, labels=TOKENS).loss
    return loss, torch.autograd.grad(loss, parameters)


CHOICES = {
    "the first": (["default"], None),
    "another": (["fr"], None),
    "two": (["default", "fr"], None),
    "in the other order": (["tone", "default"], None),
    "three": (["fr", "tone", "default"], None),
    "weighted": (["fr", "tone", "default"], [0.5, -2.0, 3.0]),
}


def their_factors(theirs, name):
    return [
        module[name].weight
        for layer in theirs.modules()
        if isinstance(layer, LoraLayer) and name in layer.lora_A
        for module in (layer.lora_A, layer.lora_B)
    ]


@pytest.mark.parametrize("choice", CHOICES)
def test_logits_and_gradients(pair, choice):
    names, weights = CHOICES[choice]
    theirs, ours = pair
    choose(pair, names, weights)
    for name in names:
        their_loss, expected = gradients(theirs, their_factors(theirs, name))
        loss, got = gradients(ours, lora_parameters(ours, name))
        torch.testing.assert_close(loss, their_loss, **CLOSE)
        torch.testing.assert_close(got, expected, **CLOSE)
        assert all(g.abs().max() > 0 for g in got)


def test_none_is_their_disabled_adapter(pair):
    theirs, ours = pair
    use_lora(ours, None)
    with theirs.disable_adapter(), torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
        torch.testing.assert_close(ours(input_ids=TOKENS).logits, expected, **CLOSE)


@pytest.mark.parametrize("way", ["cat", "linear"])
def test_merged_as_their_weighted_sum(pair, way):
    """``cat`` is the sum of the products; ``linear``, of one adapter alone, is it too."""
    theirs, ours = pair
    # PEFT takes the root of the weight in float32: of 0.75 times the scale 1/3 it is 1/2.
    names, weights = (["default", "fr"], [0.7, 0.4]) if way == "cat" else (["tone"], [0.75])
    theirs.add_weighted_adapter(names, weights, "sum", combination_type=way)
    theirs.base_model.set_adapter("sum")
    use_lora(ours, names, weights=weights)
    with torch.no_grad():
        expected = theirs(input_ids=TOKENS).logits
        torch.testing.assert_close(ours(input_ids=TOKENS).logits, expected, **CLOSE)
        with merged_lora(ours):
            torch.testing.assert_close(ours(input_ids=TOKENS).logits, expected, **CLOSE)
        merge_lora(ours)
        torch.testing.assert_close(ours(input_ids=TOKENS).logits, expected, **CLOSE)
        theirs = theirs.merge_and_unload()
    mine = ours.state_dict()
    torch.testing.assert_close(mine, theirs.state_dict(), **CLOSE)


def test_peft_loads_each_of_ours(pair, tmp_path):
    theirs, ours = pair
    for name in settings():
        save_lora(ours, tmp_path / "ours" / name, name=name)
    first = base(NAME, dtype=torch.float64)
    again = peft.PeftModel.from_pretrained(
        first, tmp_path / "ours" / "default", autocast_adapter_dtype=False
    )
    for name in ("fr", "tone"):
        again.load_adapter(tmp_path / "ours" / name, name, autocast_adapter_dtype=False)
    again.eval()
    for names in (["default"], ["fr"], ["tone"], list(settings())):
        for model in (theirs, again):
            model.base_model.set_adapter(names)
        with torch.no_grad():
            expected = theirs(input_ids=TOKENS).logits
            torch.testing.assert_close(again(input_ids=TOKENS).logits, expected, **CLOSE)
