"""Made-up rows, and what they say of the table."""

from __future__ import annotations

import pytest

from benchmarks.verdicts import summary, verdicts

TABLE = {"forward": "hopper", "dx": "hopper"}


def layer(name, direction, seconds, *, timing="graph", width=0.01, problem="P", **more):
    row = {"kind": "layer", "problem": problem, "direction": direction, "timing": timing}
    row |= {"name": f"ours: {name}" if name else "ours", **more}
    if seconds is not None:
        row |= {"seconds": seconds, "p20": seconds * (1 - width), "p80": seconds * (1 + width)}
    return row


def layers(forward, both, **more):
    """Rows of strategies, by milliseconds."""
    rows = [layer("", "both", 1.0, table=TABLE, **more)]
    rows += [layer(name, "forward", ms / 1e3, **more) for name, ms in forward.items()]
    return rows + [layer(name, "both", ms / 1e3, **more) for name, ms in both.items()]


def piece(name, seconds, *, m=8192, role="", **more):
    row = {"kind": "piece", "problem": "P", "name": name, "m": m, "k": 4, "n": 4, "role": role}
    return row | {"seconds": seconds, "block": f"{name} 64x64 w4 s3", **more}


def test_nothing_is_wrong_with_the_fastest():
    rows = layers({"hopper": 1.0, "fused": 1.3}, {"hopper": 2.0, "fused": 2.7})
    assert verdicts(rows) == []
    assert summary(rows)[-1] == "nothing measured contradicts the table"


def test_forward_and_dx_are_judged_apart_and_by_how_much():
    # dx is what is left of both: hopper 2 ms, fused 1 ms, aten 3 ms.
    rows = layers(
        {"hopper": 1.0, "fused": 2.0, "aten": 0.8, "one_kernel": 5.0},
        {"hopper": 3.0, "fused": 3.0, "aten": 3.8, "one_kernel": 5.5},
    )
    dx, forward = verdicts(rows)
    assert dx["wrong"] == forward["wrong"] == "strategy"
    assert dx["about"] == "P, dx, in CUDA graphs"
    assert dx["gain"] == pytest.approx(2.0) and dx["lost"] == pytest.approx(1e-3)
    assert "the table says hopper, 2.000 ms; fused takes 1.000 ms, 2.00 times" in dx["says"]
    assert forward["about"] == "P, forward, in CUDA graphs"
    assert forward["gain"] == pytest.approx(1.25) and forward["lost"] == pytest.approx(2e-4)
    assert "aten takes 0.800 ms" in forward["says"]


def test_one_kernel_is_no_way_to_compute_dx():
    rows = layers({"hopper": 1.0, "one_kernel": 1.0}, {"hopper": 3.0, "one_kernel": 1.5})
    assert verdicts(rows) == []


def test_graphs_and_calls_are_judged_apart():
    rows = layers({"hopper": 1.0, "aten": 2.0}, {}) + layers(
        {"hopper": 2.0, "aten": 1.0}, {}, timing="call"
    )
    (found,) = verdicts(rows)
    assert found["about"] == "P, forward, eagerly"


def test_each_problem_has_its_own_table_and_times():
    rows = layers({"hopper": 1.0, "fused": 2.0}, {})
    rows += layers({"hopper": 2.0, "fused": 1.0}, {}, problem="Q")
    assert [row["about"] for row in verdicts(rows)] == ["Q, forward, in CUDA graphs"]


@pytest.mark.parametrize(
    ("other", "width"), [(0.995, 0.0), (0.9, 0.1)], ids=["a hundredth", "within the spread"]
)
def test_what_may_be_noise_is_no_verdict(other, width):
    assert verdicts(layers({"hopper": 1.0, "fused": other}, {}, width=width)) == []


def test_a_choice_that_does_not_work_comes_first():
    rows = layers({"fused": 1.0, "aten": 0.5}, {"fused": 9.0, "aten": 9.0})
    rows.append(layer("hopper", "forward", None, error="WRONG: y is off"))
    found = verdicts(rows)
    assert found[0]["says"] == "the table says hopper, which does not work: WRONG: y is off"
    assert found[0]["gain"] is None and found[0]["lost"] is None


def test_a_choice_that_was_not_measured_is_not_judged():
    assert verdicts(layers({"fused": 1.0}, {"fused": 2.0})) == []


def test_passes_are_held_against_the_copy():
    rows = [
        piece("xa", 1e-4, tbps=1.2, share=0.4),
        piece("da", 1e-4, tbps=2.7, share=0.9),
        piece("dxa_db", 1e-6, tbps=1.2, share=0.4),  # a megabyte
    ]
    (found,) = verdicts(rows)
    assert found["wrong"] == "blocks" and found["about"] == "P, xa"
    assert "xa 64x64 w4 s3 reaches 0.40 of the copy's bandwidth" in found["says"]
    assert found["gain"] == pytest.approx(2.0) and found["lost"] == pytest.approx(5e-5)


def test_products_are_held_against_torchs_of_the_same_role_and_size():
    rows = [
        piece("y by torch", 1e-3, role="forward"),
        piece("dx by torch", 2e-3, role="dx"),
        piece("y by torch", 9e-3, m=1, role="forward"),
        piece("y by hopper", 2e-3, role="forward"),
        piece("dx by hopper", 2.1e-3, role="dx"),
        piece("y by beta1", 4e-3, role="forward"),  # two kernels, of which one is torch's
        piece("y by fused", 4e-3, role="forward"),  # not what the table takes on Hopper
    ]
    (found,) = verdicts(rows)
    assert found["about"] == "P, y by hopper" and "0.50 of torch's product" in found["says"]
    without = [row for row in rows if "hopper" not in row["name"]]
    assert [row["about"] for row in verdicts(without)] == ["P, y by fused"]


def test_the_summary_tells_ratios_failures_and_verdicts():
    rows = layers({"hopper": 1.0, "aten": 0.5}, {})
    rows[0]["ratio"] = 1.07
    rows.append({"kind": "part", "part": "host", "error": "out of time after 5.0 s"})
    rows.append({"kind": "host", "part": "host", "name": "aten + aten", "error": "E: no"})
    lines = summary([*rows, *verdicts(rows)])
    assert lines == [
        "P, forward+backward, graphs: 1.070 of the frozen linear",
        "no figure: host: out of time after 5.0 s",
        "no figure: host, aten + aten: E: no",
        "the table's strategy: P, forward, in CUDA graphs: the table says hopper, 1.000 ms; aten "
        "takes 0.500 ms, 2.00 times as fast (500 µs a call)",
    ]
