"""Python in a process of its own, in which Triton may be put on the stub of a driver."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

HELPERS = Path(__file__).parent


def run_python(cache: Path, *arguments: str) -> tuple[int, Any]:
    """Run Python where Triton compiles, into ``cache``: its exit status, and its output as JSON."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert ran.stdout, ran.stderr[-2000:]
    return ran.returncode, json.loads(ran.stdout)
