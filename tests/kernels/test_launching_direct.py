"""Direct launches against Triton's own, through its launcher on a stub of the driver."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import stub_process

from benchmarks import stub_driver

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(stub_driver.missing()), reason=stub_driver.missing()),
]
SCRIPT = stub_process.HELPERS / "direct_launches.py"
# Kernels that read each operand, in forward and backward by the pointer kernels.
READERS = {"x": 3, "weight": 2, "a": 2, "b": 2, "dy": 2}


def test_every_strategy_launches_directly_what_triton_would(tmp_path):
    status, said = stub_process.run_python(tmp_path, str(SCRIPT))
    assert status == 0 and said["found"] == []
    assert said["layers"] == 9 and said["ordinary"] == 0
    assert said["shifted"] == READERS  # Triton compiles other kernels for such addresses
