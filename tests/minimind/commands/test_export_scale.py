"""The exported adapter's scale, as a reader takes it that knows ``r`` and ``lora_alpha`` alone."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels import apply_lora, lora_layers, lora_parameters, save_lora
from minimind.cli import main
from minimind.model.checkpoint import load_model

SETTINGS = {
    "plain": ({"alpha": 8}, False),
    "without alpha": ({}, False),
    "rsLoRA": ({"alpha": 8, "use_rslora": True}, True),
    "a rank of its own": ({"alpha": 8, "rank_pattern": {"wq": 2}}, False),
    "a rank of its own without alpha": ({"rank_pattern": {"wq": 2}}, True),
    "an alpha of its own": ({"alpha": 8, "alpha_pattern": {"wv": 3}}, True),
    "all at once": (
        {"alpha": 8, "use_rslora": True, "rank_pattern": {"wq": 2}, "alpha_pattern": {"wv": 3}},
        True,
    ),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_alpha_by_the_rank_of_the_tensor_is_the_scale(here, capsys, case):
    """As llama.cpp's converter and runtime have it: ``lora_alpha / rank``, nothing else is read."""
    settings, folded = SETTINGS[case]
    model = load_model(here / "base")
    apply_lora(model, 4, target_modules="all-linear", verbose=False, **settings)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter)
    save_lora(model, here / "a.safetensors")
    arguments = ["export", "x", "--base", "base", "--lora", "a.safetensors", "--dtype", "float32"]
    assert main(arguments) == 0
    assert ("scale multiplied into B" in capsys.readouterr().out) == folded
    alpha = json.loads((here / "x" / "adapter" / "adapter_config.json").read_text())["lora_alpha"]
    tensors = load_file(here / "x" / "adapter" / "adapter_model.safetensors")
    products = {
        name: alpha / a.shape[0] * (tensors[name.replace("lora_A", "lora_B")] @ a).abs().sum()
        for name, a in tensors.items()
        if "lora_A" in name
    }
    # Rows of q and k move on the way: the sums of the products, and not the products, are equal.
    expected = [layer.delta_weight().abs().sum() for layer in lora_layers(model).values()]
    assert len(products) == len(expected)
    torch.testing.assert_close(
        torch.stack(sorted(products.values())), torch.stack(sorted(expected)), rtol=1e-5, atol=0
    )
