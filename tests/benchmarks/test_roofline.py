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
    (line,) = [line for line in lines if line.startswith("| q, k, v ")]
    assert line.split(" | ")[1] == "0.972"


def test_ceilings_must_be_positive(capsys):
    for name in ("tflops", "tbps", "fused"):
        options = {"tflops": "790", "tbps": "4.3", "fused": "1", name: "-1"}
        with pytest.raises(SystemExit):
            roofline.main([f"--{key}={value}" for key, value in options.items()])
        assert f"--{name} must be more than 0, got -1.0" in capsys.readouterr().err


QKV, GATE_UP = (4096, (4096, 1024, 1024)), (4096, (14336, 14336))


@pytest.mark.parametrize(
    ("k", "ns", "r", "expected"),
    [(*QKV, 16, 0.972), (*QKV, 64, 0.991), (*GATE_UP, 16, 1.022)],
)
def test_a_group_worked_out_by_hand(k, ns, r, expected):
    m, flops, bandwidth, count, n = 8192, 790e12, 4.3e12, len(ns), sum(ns)
    sums = (count - 1) * 3 * 2 * m * k / bandwidth
    base = 2 * sum(2 * m * k * n / flops for n in ns) + sums  # all of them bound by arithmetic
    passes = 2 * (m * k + count * r * (m + k)) + m * n + 2 * r * (count * m + n)
    products = 2 * m * n * (k + r) + 2 * m * k * (n + count * r)
    ours = products / flops + 2 * passes / bandwidth
    assert ours / base == pytest.approx(expected, abs=0.001)
    group = roofline.Group(m, k, ns, r)
    whole = seconds(roofline.frozen_group(group), CEILINGS)
    assert seconds(roofline.fused_group(group), CEILINGS) / whole == pytest.approx(
        ours / base, abs=0.001
    )


@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("name", roofline.GROUPS)
def test_a_group_beats_its_members_one_by_one(name, dropout):
    for ceilings in (CEILINGS, Ceilings(280e12, 1.75e12)):
        group = roofline.Group(8192, *roofline.GROUPS[name], 16)
        ways = roofline.modelled_group(group, dropout)
        times = {way: seconds(kernels, ceilings) for way, kernels in ways.items()}
        assert times["fused"] < times["fused, one by one"] < times["peft"]


def test_one_member_is_a_group_of_its_own():
    size = Size(8192, 4096, 1024, 16)
    group = roofline.Group(8192, 4096, (1024,), 16)
    for strategy, ours in (("fused", roofline.fused_group), ("beta1", roofline.beta1_group)):
        whole = seconds(ours(group), CEILINGS)
        assert whole == pytest.approx(modelled(strategy, size, CEILINGS), rel=1e-6)
    assert roofline.frozen_group(group) == frozen(size)
