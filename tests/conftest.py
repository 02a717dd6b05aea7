"""Shared fixtures."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory comes back full of NaN, so that an element nobody wrote cannot hide."""
    for name in ("empty", "empty_like", "empty_strided"):
        real = getattr(torch, name)

        def poison(*args, _real=real, **kwargs):
            tensor = _real(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(torch, name, poison)
