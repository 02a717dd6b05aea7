"""Ranks, scales and patterns."""

from __future__ import annotations

import math

import pytest

from lora_kernels import LoRAConfig
from lora_kernels.config import lora_scale


def test_scale():
    assert lora_scale(16) == 1.0
    assert lora_scale(16, alpha=32) == 2.0
    assert lora_scale(16, alpha=32, use_rslora=True) == 8.0
    assert lora_scale(16, use_rslora=True) == 1.0  # no alpha: scale 1, whatever the root


def test_patterns_match_endings_and_the_first_wins():
    config = LoRAConfig(
        rank=4,
        alpha=8,
        rank_pattern={"layers.0.wq": 2, "wq": 3, r"w\d": 7},
        alpha_pattern={"wo": 1},
    )
    assert [config.layer(n).rank for n in ("layers.0.wq", "layers.1.wq", "wo", "w1")] == [
        2,
        3,
        4,
        7,
    ]
    assert config.layer("xwq").rank == 4  # an ending begins at a dot
    assert config.layer("layers.3.wo").alpha == 1 and config.layer("wq").alpha == 8


BAD = {
    "rank 0": (ValueError, "rank must be at least 1, got 0", {"rank": 0}),
    "fractional rank": (TypeError, "rank must be an integer", {"rank": 1.5}),
    "boolean rank": (TypeError, "rank must be an integer", {"rank": True}),
    "text alpha": (TypeError, "alpha must be a number", {"alpha": "2"}),
    "infinite alpha": (ValueError, "alpha must be finite", {"alpha": math.inf}),
    "dropout 1": (ValueError, r"dropout must be in \[0, 1\)", {"dropout": 1.0}),
    "NaN dropout": (ValueError, r"dropout must be in \[0, 1\)", {"dropout": math.nan}),
    "no targets": (ValueError, "target_modules is empty", {"target_modules": []}),
    "targets of numbers": (TypeError, "target_modules must be", {"target_modules": [1]}),
    "bad expression": (ValueError, "not a regular expression", {"target_modules": "w("}),
    "flags in a pattern": (ValueError, "rank_pattern holds", {"rank_pattern": {"(?i)w": 2}}),
    "bad pattern": (ValueError, "rank_pattern holds", {"rank_pattern": {"w(": 2}}),
    "pattern rank 0": (ValueError, r"rank_pattern\['w'\] must be", {"rank_pattern": {"w": 0}}),
    "pattern list": (TypeError, "alpha_pattern must map", {"alpha_pattern": [1]}),
    "text rsLoRA": (TypeError, "use_rslora must be True or False", {"use_rslora": "yes"}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case):
    error, message, arguments = BAD[case]
    with pytest.raises(error, match=message):
        LoRAConfig(**arguments)
