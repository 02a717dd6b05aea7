from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("triton")

from benchmarks import tune
from lora_kernels.tuning import KERNELS, Config, Row, Shape, lookup

CPU = torch.device("cpu")
SHAPE = Shape(32, 32, 32, 4)
HOPPER = (9, 0)
pytestmark = pytest.mark.interpreted


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_is_launched_and_judged(kernel):
    config = Config(16, 32, 32, 4, 2)
    found = tune.tune(kernel, SHAPE, torch.float16, CPU, HOPPER, [config], seconds=0.0)
    assert found is not None and not found.failed
    assert found.kernel == kernel and found.tried == 2 and found.gain > 0 and found.seconds > 0


def test_wrong_and_broken_candidates_are_left_out(monkeypatch):
    real = tune.forward.compute_xa

    def strange(x, lora_a, *, config):
        if config.block_m == 64:
            raise RuntimeError("does not fit\nat all")
        xa, bits = real(x, lora_a, config=config)
        return (xa * 1.1 if config.block_m == 128 else xa), bits

    monkeypatch.setattr(tune.forward, "compute_xa", strange)
    configs = [Config(m, 0, 32, 4, 2) for m in (16, 64, 128)]
    found = tune.tune("xa", SHAPE, torch.float32, CPU, HOPPER, configs, seconds=0.0)
    wrong, broken = sorted(found.failed, key=lambda text: "RuntimeError" in text)
    assert "block_m=128" in wrong and "WRONG: xa is off by" in wrong
    assert "block_m=64" in broken and "does not fit" in broken
    assert found.config.block_m in (16, lookup("xa", HOPPER, 4, SHAPE).block_m)


def test_the_faster_candidate_wins(monkeypatch):
    def slow_unless_32(x, lora_a, *, config):
        time.sleep(0.0 if config.block_m == 32 else 0.01)
        return x @ lora_a.t(), None

    monkeypatch.setattr(tune.forward, "compute_xa", slow_unless_32)
    assert lookup("xa", HOPPER, 2, SHAPE).block_m != 32
    configs = [Config(m, 0, 32, 4, 2) for m in (16, 32, 64)]
    found = tune.tune("xa", SHAPE, torch.float16, CPU, HOPPER, configs, seconds=0.0)
    assert found.config.block_m == 32 and found.gain > 2 and found.tried == 4


def test_no_row_no_tuning():
    assert tune.tune("hopper", SHAPE, torch.float16, CPU, (8, 0), [], seconds=0.0) is None


def test_rows_can_be_pasted():
    result = tune.Result("gemm", Shape(8, 4, 2, 1), Config(1, 2, 3, 4, 5, 6), 1.25, 1e-3, 9, [])
    text = tune.row(result, HOPPER, 2)
    pasted = eval(text.partition(",  #")[0], {"Row": Row, "Config": Config})
    assert pasted == Row(HOPPER, "gemm", 2, Config(1, 2, 3, 4, 5, 6), m=8, n=4, k=2, r=1)
    assert "1.25 times as fast" in text


def test_without_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert tune.main(["--minutes", "1"]) == 1
    assert "no CUDA GPU" in capsys.readouterr().out
