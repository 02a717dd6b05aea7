"""A LoRA file that the original project wrote, on its model, gives the original's logits."""

from __future__ import annotations

import pytest
import torch
from places import GOLDEN
from safetensors.torch import load_file

from lora_kernels import load_lora, merge_lora, save_lora
from minimind import load_model


@pytest.mark.parametrize(
    ("era", "square"),
    [
        ("2025-02", ["layers.{}.attention.wq", "layers.{}.attention.wo"]),
        ("2026-03", ["model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"]),
    ],
)
def test_the_originals_adapter_gives_the_originals_logits(tmp_path, era, square):
    golden = GOLDEN / f"minimind-{era}-dense"
    model = load_model(f"{golden}.weights.safetensors", f"{golden}.config.json")
    names = load_lora(model, f"{golden}.lora.pth")
    assert names == [name.format(i) for i in (0, 1) for name in square]
    expected = load_file(f"{golden}.lora.expected.safetensors")
    with torch.no_grad():
        adapted = model(expected["input_ids"]).logits
        torch.testing.assert_close(adapted, expected["logits"], rtol=0, atol=1e-5)
        # The other way round: what is saved here has the very keys and values of the original.
        save_lora(model, tmp_path / "again.pth")
        original = torch.load(f"{golden}.lora.pth", weights_only=True)
        again = torch.load(tmp_path / "again.pth", weights_only=True)
        assert again.keys() == original.keys()
        assert all(torch.equal(again[key], original[key].float()) for key in again)
        merge_lora(model)
        merged = model(expected["input_ids"]).logits
        torch.testing.assert_close(merged, expected["logits"], rtol=0, atol=1e-5)
        base = load_model(f"{golden}.weights.safetensors", f"{golden}.config.json")
        assert (base(expected["input_ids"]).logits - adapted).abs().max() > 1e-2
