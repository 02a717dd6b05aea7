"""The suites as they are run: rows, stamps, absences, and an end in time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest
from places import ROOT

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.slow

ONE = "linear and 512x512-m1-r16-float32"


def run(folder, *options):
    target = folder / "rows.json"
    environment = {
        k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and "XDIST" not in k
    }
    command = [sys.executable, "-m", "pytest", "benchmarks", "--benchmark-only", "-q"]
    command += ["-p", "no:cacheprovider", f"--benchmark-json={target}", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done, json.loads(target.read_text(encoding="utf-8")) if target.exists() else None


def test_rows_of_one_problem(tmp_path):
    done, found = run(tmp_path, "-k", ONE, "--commit", "abc")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["extra_info"]["contender"]: row for row in found["benchmarks"]}
    assert {"frozen", "three calls", "addmm Function", "beta=1", "ours"} <= set(rows)
    assert len({row["stats"]["rounds"] for row in rows.values()}) == 1  # measured in turn
    for row in rows.values():
        info, stats = row["extra_info"], row["stats"]
        assert info["commit"] == "abc" and info["device"] and info["torch"] and info["date"]
        assert (info["m"], info["k"], info["dtype"], info["suite"]) == (1, 512, "float32", "linear")
        assert 0 < info["p20"] <= stats["median"] <= info["p80"] < 1
        assert stats["rounds"] >= 7 and info["peak_bytes"] > 0
    assert found["machine_info"]["ceilings"]["flops"]["float32"] > 0
    assert socket.gethostname() not in json.dumps(found)
    if "ours: fused" not in rows:
        reasons = {row["contender"]: row["reason"] for row in found["missing"]}
        assert reasons["ours: fused"] == "x is on cpu, the kernels run on cuda"
    assert "| minimind 512→512, M 1, r 16, p 0 |" in done.stdout


def test_nothing_new_after_the_time_limit(tmp_path):
    done, found = run(tmp_path, "-k", ONE, "--time-limit", "0")
    assert done.returncode == 0 and "out of time" in done.stdout
    assert found is None
