from __future__ import annotations

import json

import pytest
from places import ROOT

from benchmarks import report

pytest.importorskip("matplotlib")

STAMP = {
    "device": "Some GPU",
    "driver": "1.2",
    "torch": "2.11",
    "commit": "abc",
    "date": "2026-01-02",
}


def row(contender, samples, m=64, suite="linear", **info):
    about = {"suite": suite, "section": "bfloat16", "label": f"M {m}", "contender": contender}
    about |= {"base": "frozen", "base_is_rival": False, "peak_bytes": 3 * 2**20}
    about |= {"k": 512, "n": 256, "m": m, "rank": 16, "dtype": "bfloat16", "dropout": 0.0}
    about |= {"direction": "both", "timing": "call"}
    return {**about, **STAMP, **info, "samples": samples}


def write(path, rows, missing=()):
    benchmarks = []
    for each in rows:
        info = dict(each)
        data = info.pop("samples")
        benchmarks.append({"extra_info": info, "stats": {"data": data, "median": data[0]}})
    machine = {"ceilings": {"bandwidth": 1e12, "flops": {"bfloat16": 1e14}}}
    text = {"benchmarks": benchmarks, "machine_info": machine, "missing": list(missing)}
    path.write_text(json.dumps(text), encoding="utf-8")
    return path


THREE = [
    row("frozen", [1.0, 1.0, 10.0]),
    row("peft", [2.0, 3.0, 20.0]),
    row("ours", [1.0, 1.5, 20.0]),
]


def line(text, start):
    (found,) = [each for each in text.splitlines() if each.startswith(start)]
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_ratios_and_speedups_are_medians_of_paired_rounds():
    text = report.markdown(THREE, [])
    ratios, speedups = text.split("Speed-up")
    assert line(ratios, "| M 64") == ["M 64", "1e+03", "2.00 (2.00–2.60)", "1.50 (1.20–1.80)"]
    # Of 2/1, 3/1.5 and 20/20.
    assert line(speedups, "| M 64") == ["M 64", "2.00"]
    assert "driver 1.2; torch 2.11; commit abc; date 2026-01-02" in text


def test_geometric_mean_over_problems():
    rows = [
        row(name, [seconds], m)
        for m, peft in ((1, 2.0), (2, 8.0))
        for name, seconds in (("frozen", 1.0), ("peft", peft), ("ours", 1.0))
    ]
    assert line(report.markdown(rows, []), "| **geometric mean**")[1] == "**4.00**"


def test_a_rival_that_is_the_base_counts_as_a_rival():
    rows = [{**each, "base_is_rival": True} for each in THREE]
    assert line(report.markdown(rows, []).split("Speed-up")[1], "| M 64") == [
        "M 64",
        "0.67",
        "2.00",
    ]


def test_what_is_missing_is_named():
    gone = {k: v for k, v in row("peft, compiled", []).items() if k != "samples"}
    text = report.markdown(THREE, [{**gone, "reason": "no compiler"}])
    assert "- peft, compiled: no compiler (linear: 1 row)" in text
    lonely = report.markdown([row("ours", [1.0]), row("peft", [2.0])], [])
    assert line(lonely.split("Speed-up")[0], "| M 64") == ["M 64", "–", "–", "–"]


def test_devices_are_not_mixed():
    other = [{**each, "device": "Other", "samples": [1.0, 1.0, 1.0]} for each in THREE]
    text = report.markdown(THREE + other, [])
    assert text.count("## Some GPU") == text.count("## Other") == 1
    assert "2.00 (2.00–2.60)" in text and "1.00 (1.00–1.00)" in text


def test_rates_and_details():
    rows = [row("ours", [0.5], suite="training", tokens_per_second=1234, samples_per_second=5.5)]
    assert "| M 64 | ours | 1,234 | 5.5 | 3 |" in report.markdown(rows, [])
    detail = line(report.details(rows), "| training")
    assert detail[2:8] == ["ours", "500", "500", "500", "1", "3.0"]


def test_command_writes_markdown_and_plots(tmp_path, capsys):
    rows = [
        row(name, [s, s, s], m)
        for m in (16, 64, 256)
        for name, s in (("frozen", 1.0), ("peft", 2.0), ("ours", 1.1))
    ]
    first = write(tmp_path / "a.json", rows)
    gone = {k: v for k, v in row("ours", []).items() if k != "samples"} | {"reason": "out of time"}
    # A second file measures one row anew, and what the first one has is not missing.
    second = write(tmp_path / "b.json", [row("ours", [1.3] * 3, 64)], [gone])
    report.main([str(first), str(second), "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert line(text.split("Speed-up")[0], "| M 64")[3] == "1.30 (1.30–1.30)"
    assert "out of time" not in text
    assert "![ratio by tokens](ratio-by-tokens.png)" in text and "rank.png" not in text
    assert (tmp_path / "out" / "ratio-by-tokens.png").read_bytes().startswith(b"\x89PNG")
    assert "wrote" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["not json", "{}", '{"benchmarks": [], "machine_info": {}}'])
def test_other_files_are_refused(tmp_path, text, capsys):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(SystemExit):
        report.main([str(path)])
    assert "x.json" in capsys.readouterr().err


def test_the_short_table_goes_between_the_markers(tmp_path):
    rows = [
        row(name, [s] * 3, dropout=p, label=f"p {p}")
        for p in (0.0, 0.1)
        for name, s in (("frozen", 2.0), ("peft", 3.0), ("beta=1", 9.0), ("ours", 2.5))
    ]
    rows += [row(name, [1.0], m=7) for name in ("frozen", "ours")]  # not measured with dropout
    path = write(tmp_path / "a.json", rows)
    readme = tmp_path / "README.md"
    readme.write_text("before <!-- benchmarks: begin -->old<!-- benchmarks: end --> after")
    report.main([str(path), "--readme", str(readme)])
    assert readme.read_text(encoding="utf-8") == (
        "before <!-- benchmarks: begin -->\n| | peft | ours |\n|---|---|---|\n"
        "| bfloat16, p 0.0 | 1.50 | 1.25 |\n| bfloat16, p 0.1 | 1.50 | 1.25 |\n"
        "<!-- benchmarks: end --> after"
    )


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_shows_the_newest_results(name):
    newest = max((ROOT / "benchmarks" / "results").glob("*/benchmarks.json"))
    text = (ROOT / name).read_text(encoding="utf-8")
    rows, _ = report.load([newest])
    assert report.with_table(text, report.summary(rows)) == text
    assert f"({newest.parent.relative_to(ROOT)}/report.md)" in text
