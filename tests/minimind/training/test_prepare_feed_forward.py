"""A run on a CPU computes its feed-forwards as wholes, where LoRA is on them."""

from __future__ import annotations

import pytest

from lora_kernels import lora_layers
from minimind.files import release
from minimind.settings import Settings
from minimind.training.prepare import prepare


@pytest.mark.parametrize(("targets", "whole"), [(None, 0), ("all-linear", 1)])
def test_whole_where_lora_is_on_them(targets, whole, here):
    settings = Settings(base="base", data="data.jsonl", out="out", targets=targets, device="cpu")
    job = prepare(settings, lora=True)
    try:
        found = [m for m in job.model.modules() if hasattr(type(m), "_lora_base")]
        assert len(found) == whole and lora_layers(job.model)
    finally:
        release(job.lock)
