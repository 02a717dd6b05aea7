"""Settings: what is out of range is named."""

from __future__ import annotations

import math

import pytest

from minimind.settings import TrainingConfig

BAD_SETTINGS = {
    "epochs": [0, 1.0],
    "batch_size": [0, "4"],
    "warmup_steps": [-1],
    "accumulation_steps": [0],
    "log_interval": [0],
    "save_interval": [-1],
    "seed": [-1],
    "num_workers": [-1],
    "lr": [0.0, -1e-4, math.nan, math.inf],
    "grad_clip": [-0.1, math.nan, math.inf],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n in BAD_SETTINGS for v in BAD_SETTINGS[n]])
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value!r}"):
        TrainingConfig(**{name: value})


def test_the_lowest_settings_are_fine():
    config = TrainingConfig(1, 1, 1e-9, 0, 1, 0.0, log_interval=1, save_interval=0, seed=0)
    assert (config.lr, config.grad_clip, config.num_workers) == (1e-9, 0.0, 0)
