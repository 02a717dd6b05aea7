from __future__ import annotations

import pytest

from benchmarks import roofline
from benchmarks.roofline import STRATEGIES, Ceilings, Size, floor, frozen, modelled, seconds

# 790 TFLOP/s and 4.3 TB/s at 8192 tokens: worked out by hand, apart from this file's model.
CEILINGS = Ceilings(790e12, 4.3e12)


def ratio(strategy, k, n, r=16, ceilings=CEILINGS, **more):
    size = Size(8192, k, n, r)
    if strategy == "floor":
        return floor(size, ceilings) / seconds(frozen(size), ceilings)
    return modelled(strategy, size, ceilings, **more) / seconds(frozen(size), ceilings)


@pytest.mark.parametrize(
    ("strategy", "k", "n", "r", "expected"),
    [
        ("floor", 4096, 4096, 16, 1.012),
        ("floor", 4096, 4096, 64, 1.047),
        ("floor", 4096, 1024, 64, 1.117),
        ("floor", 14336, 4096, 16, 1.008),
        ("fused", 4096, 4096, 16, 1.072),
        ("fused", 4096, 1024, 16, 1.213),
        ("fused", 4096, 1024, 64, 1.248),
        ("fused", 4096, 14336, 16, 1.038),
        ("fused", 14336, 4096, 64, 1.062),
        ("beta1", 4096, 4096, 16, 1.112),
        ("beta1", 4096, 14336, 16, 1.064),
        ("three calls", 4096, 4096, 16, 1.225),
        ("peft", 4096, 4096, 16, 1.359),
        ("peft", 14336, 4096, 16, 1.199),
    ],
)
def test_ratios_worked_out_by_hand(strategy, k, n, r, expected):
    assert ratio(strategy, k, n, r) == pytest.approx(expected, abs=0.002)


def test_dropout_and_a_slower_product_by_hand():
    assert ratio("peft", 4096, 4096, dropout=True) == pytest.approx(1.471, abs=0.002)
    assert ratio("peft", 4096, 1024, dropout=True) == pytest.approx(2.211, abs=0.005)
    slower = Ceilings(790e12, 4.3e12, fused=0.95)
    assert ratio("fused", 4096, 4096, ceilings=slower) == pytest.approx(1.125, abs=0.002)


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_strategy_beats_the_floor(strategy, direction):
    for m in (1, 64, 1024, 16384):
        for k, n in ((512, 512), (4096, 1024), (4096, 14336)):
            for r in (8, 128):
                size = Size(m, k, n, r)
                assert modelled(strategy, size, CEILINGS, direction) >= floor(
                    size, CEILINGS, direction
                )


def test_a_token_costs_the_reading_of_the_weight():
    size = Size(1, 4096, 4096, 16)
    weight = 2 * 4096 * 4096 / 4.3e12
    assert floor(size, CEILINGS, "forward") == pytest.approx(weight, rel=0.02)


def test_unknown_strategy():
    with pytest.raises(ValueError, match=r"strategy must be one of one_kernel, .*; got 'magic'"):
        modelled("magic", Size(1, 2, 3, 4), CEILINGS)


def test_command(capsys):
    roofline.main(["--tflops", "790", "--tbps", "4.3"])
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if line.startswith("| 4096, 4096 ")]
    assert line.split(" | ")[1] == "1.012"


def test_ceilings_must_be_positive(capsys):
    for name in ("tflops", "tbps", "fused"):
        options = {"tflops": "790", "tbps": "4.3", "fused": "1", name: "-1"}
        with pytest.raises(SystemExit):
            roofline.main([f"--{key}={value}" for key, value in options.items()])
        assert f"--{name} must be more than 0, got -1.0" in capsys.readouterr().err
