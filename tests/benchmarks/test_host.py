"""What a call costs the host, as it is measured without a GPU."""

from __future__ import annotations

import time

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import stub_process
import torch

from benchmarks import host, stub_driver


def test_a_call_costs_the_least_of_the_rounds(monkeypatch):
    durations = iter([0, 0, 0, 5, 2, 9])  # three to warm up
    now = [0.0]

    def call():
        now[0] += next(durations)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(host, "ROUNDS", 3)
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(time, "thread_time", lambda: now[0])
    assert host.microseconds(call) == 2e6


def test_the_interpreter_is_not_timed(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        host.main([])
    assert "unset it" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(bool(stub_driver.missing()), reason=stub_driver.missing())
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU nothing is launched on the stub")
def test_every_strategy_and_its_rivals_have_a_row(tmp_path):
    status, found = stub_process.run_python(tmp_path, "-m", "benchmarks.host", "--json")
    assert status == 0
    rows = {"three calls", "hopper + hopper", "fused + fused, dropout", "aten + aten"}
    assert rows <= found.keys()
    assert all(cost > 0 for cost in found.values())
