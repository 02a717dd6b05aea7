"""Cycles of everything that puts something into a model leave nothing behind."""

from __future__ import annotations

import gc
from collections import Counter

import pytest
import torch
from tiny_model import IDS, Model, trained

from lora_kernels import (
    LoRALinear,
    apply_lora,
    disable_lora,
    load_lora,
    merge_lora,
    merged_lora,
    remove_lora,
    save_lora,
    use_lora,
)

CYCLES = 60


def growth(cycle):
    """Kinds of objects of which each cycle leaves one behind, or more."""
    counts = []
    for turn in range(2 * CYCLES + 1):
        cycle()
        if turn in (CYCLES, 2 * CYCLES):
            gc.collect()
            counts.append(Counter(type(one).__qualname__ for one in gc.get_objects()))
    before, after = counts
    return {kind: n - before[kind] for kind, n in after.items() if n - before[kind] >= CYCLES}


def cycles(folder):
    kept, base = trained(Model(), target_modules=["q", "gate"]), Model()
    options = {"target_modules": ["q"], "modules_to_save": ["k"], "verbose": False}
    save_lora(kept, folder / "a.safetensors")

    def put_in_and_take_out():
        apply_lora(base, 2, trainable_token_indices={"embed": [1]}, **options)
        base(IDS).sum().backward()
        remove_lora(base)

    def another():
        apply_lora(kept, 2, name="fr", **options)
        with use_lora(kept, ["default", "fr"]):
            kept(IDS)
        remove_lora(kept, "fr")

    def blocks():
        with merged_lora(kept), merged_lora(kept):
            kept(IDS)
        with disable_lora(kept):
            kept(IDS)

    def files():
        load_lora(base, folder / "a.safetensors")
        save_lora(base, folder / "b.safetensors")
        remove_lora(base)

    def for_good():
        apply_lora(base, 2, **options)
        merge_lora(base)

    return [put_in_and_take_out, another, blocks, files, for_good]


@pytest.mark.parametrize("number", range(5))
def test_nothing_is_left_behind(tmp_path, number):
    assert growth(cycles(tmp_path)[number]) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_leave_nothing_behind(dtype):
    layer = LoRALinear(16, 16, rank=2, dropout=0.1, dtype=dtype)
    optimizer = torch.optim.AdamW(layer.parameters())

    def step():
        layer(torch.randn(4, 16, dtype=dtype)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert growth(step) == {}


def test_what_is_left_behind_is_found():
    left = []
    assert growth(lambda: left.append(torch.ones(1))) == {"Tensor": CYCLES}
