"""Imported by tests of what imports Triton: without it their files are skipped."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
