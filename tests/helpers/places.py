"""Where things lie."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "data" / "golden"
# The original's files, which are not there for everyone: what reads them skips without.
ORIGINAL = ROOT / ".." / "shared" / "golden"
