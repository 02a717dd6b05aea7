"""From pytest-benchmark's JSON to tables and plots.

``python -m benchmarks.report a.json b.json --out folder`` writes ``report.md`` and the plots there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from . import plots
from .measure import Spread, spread
from .measure import ratio as ratio_of

Row = dict[str, Any]
SUITES = ("linear", "groups", "feed_forward", "experts", "block", "training", "files")
# What `--readme` fills.
MARKERS = ("<!-- benchmarks: begin -->", "<!-- benchmarks: end -->")
README_COLUMNS = ("three calls", "three calls, addmm", "peft", "peft, bf16 adapters", "ours")
STAMP = ("device", "driver", "cuda", "torch", "triton", "peft", "transformers", "python", "commit")


def main(arguments: list[str] | None = None) -> None:
    """Read JSON files, write ``report.md`` and its plots."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("json", nargs="+", type=Path, help="of pytest --benchmark-json=…")
    parser.add_argument("--out", type=Path, help="folder to write to; the first file's by default")
    parser.add_argument(
        "--readme",
        nargs="+",
        type=Path,
        default=[],
        help=f"files whose part between {MARKERS[0]} and {MARKERS[1]} becomes the short table",
    )
    options = parser.parse_args(arguments)
    try:
        rows, missing = load(options.json)
        for path in options.readme:
            text = with_table(path.read_text(encoding="utf-8"), summary(rows))
            path.write_text(text, encoding="utf-8")
    except ReportError as error:
        parser.error(str(error))
    out = options.out or options.json[0].parent
    out.mkdir(parents=True, exist_ok=True)
    drawn = plots.draw(rows, out)
    pictures = "".join(f"\n![{path.stem.replace('-', ' ')}]({path.name})\n" for path in drawn)
    (out / "report.md").write_text(
        markdown(rows, missing) + pictures + "\n" + details(rows), encoding="utf-8"
    )
    print(f"wrote {out / 'report.md'}" + "".join(f", {path.name}" for path in drawn))


def summary(rows: Sequence[Row]) -> str:
    """The linears that were measured with and without dropout, forward and backward, in short.

    Of a dtype that was measured without dropout only, all of them.
    """
    linear = [r for r in rows if r["suite"] == "linear" and r["direction"] == "both"]
    linear = [r for r in linear if r["timing"] == "call"]

    def size(row: Row) -> tuple[Any, ...]:
        return tuple(row[name] for name in ("dtype", "k", "n", "m", "rank"))

    dropped = {size(row) for row in linear if row["dropout"]}
    dtypes = {dtype for dtype, *_ in dropped}
    linear = [r for r in linear if size(r) in dropped or r["dtype"] not in dtypes]
    names = [n for n in README_COLUMNS if any(row["contender"] == n for row in linear)]
    lines = ["| | " + " | ".join(names) + " |", "|---|" + "---|" * len(names)]
    for (dtype, label), of_label in _grouped(linear, "dtype", "label"):
        by_name = {row["contender"]: row for row in of_label}
        against = by_name.get(of_label[0]["base"])
        ratios = [_ratio(by_name.get(name), against) for name in names]
        cells = ["–" if ratio is None else f"{ratio.median:.2f}" for ratio in ratios]
        lines.append(f"| {dtype}, {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def with_table(text: str, table: str) -> str:
    """``text`` with ``table`` between the markers.

    Raises:
        ReportError: it has no such markers.
    """
    before, begin, rest = text.partition(MARKERS[0])
    _, end, after = rest.partition(MARKERS[1])
    if not (begin and end):
        raise ReportError(f"no {MARKERS[0]} … {MARKERS[1]} to put the table between")
    return f"{before}{begin}\n{table}\n{end}{after}"


class ReportError(ValueError):
    """A file is not what pytest-benchmark writes for these suites; the message says which."""


def load(paths: Sequence[Path]) -> tuple[list[Row], list[Row]]:
    """Rows and what is missing, of several files; a later file's row replaces an earlier one's.

    Raises:
        ReportError: a file cannot be read, or holds none of our rows.
    """
    rows: dict[Any, Row] = {}
    missing: dict[Any, Row] = {}
    for path in paths:
        try:
            text = json.loads(path.read_text(encoding="utf-8"))
            benchmarks, absent = text["benchmarks"], text.get("missing", [])
            ceilings = text["machine_info"].get("ceilings")
            for benchmark in benchmarks:
                info, stats = benchmark["extra_info"], benchmark["stats"]
                samples = stats.get("data") or [stats["median"]]
                row = {**info, "samples": samples, "ceilings": ceilings}
                rows[_key(row)] = row
            for row in absent:
                missing[_key(row)] = row
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(
                f"{path} is not the JSON of these suites ({type(error).__name__}: {error}); "
                "write one with pytest benchmarks/ --benchmark-only --benchmark-json=FILE"
            ) from error
    if not rows:
        raise ReportError(f"no rows in {', '.join(map(str, paths))}")
    return list(rows.values()), [row for key, row in missing.items() if key not in rows]


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("device", "suite", "section", "label", "contender"))


def markdown(rows: Sequence[Row], missing: Sequence[Row]) -> str:
    """Per device: ratios to the floor, speed-ups of ours, and who is missing and why."""
    parts = []
    for device, of_device in _grouped(rows, "device"):
        parts.append(f"## {device}\n")
        parts.append("; ".join(_stamp(of_device)) + "\n")
        of_device = sorted(of_device, key=lambda row: SUITES.index(row["suite"]))
        for (suite, section), table in _grouped(of_device, "suite", "section"):
            parts.append(f"### {suite}: {section}\n")
            parts.append(_ratio_table(table))
            parts.append(_speedup_table(table))
            parts.append(_rate_table(table))
        absent = [row for row in missing if row["device"] == device]
        if absent:
            parts.append("### Not measured\n")
            parts.append(_missing_list(absent))
    return "\n".join(part for part in parts if part)


def details(rows: Sequence[Row]) -> str:
    """Every row: median, 20th and 80th percentile in milliseconds, rounds, and peak memory."""
    lines = [
        "### Every row\n",
        "| suite | problem | contender | ms | p20 | p80 | rounds | peak MiB | commit | date |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{1e3 * value:.4g}" for value in spread(row["samples"]))
        peak = row.get("peak_bytes")
        memory = "" if peak is None else f"{peak / 2**20:.1f}"
        cells = (row["suite"], f"{row['section']}, {row['label']}", row["contender"], times)
        lines.append(
            f"| {' | '.join(cells)} | {len(row['samples'])} | {memory} "
            f"| {row['commit']} | {row['date']} |"
        )
    return "\n".join(lines) + "\n"


def _stamp(rows: Sequence[Row]) -> list[str]:
    said = []
    for name in (*STAMP[1:], "date"):
        values = sorted({str(row[name]) for row in rows if row.get(name)})
        if values:
            said.append(f"{name} {', '.join(values)}")
    return said


def _grouped(rows: Iterable[Row], *names: str) -> list[tuple[Any, list[Row]]]:
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in names) if len(names) > 1 else row[names[0]]
        groups.setdefault(key, []).append(row)
    return list(groups.items())


def _ratio_table(rows: Sequence[Row]) -> str:
    """Time over the base's, median of the rounds and 20th to 80th percentile."""
    base = rows[0]["base"]
    names = [n for n in dict.fromkeys(row["contender"] for row in rows) if n != base]
    lines = [
        f"Time over that of {base}: median (20th–80th percentile) of the rounds' ratios.\n",
        "| | " + f"{base}, ms | " + " | ".join(names) + " |",
        "|---|" + "---|" * (len(names) + 1),
    ]
    for label, of_label in _grouped(rows, "label"):
        by_name = {row["contender"]: row for row in of_label}
        against = by_name.get(base)
        first = "–" if against is None else f"{1e3 * spread(against['samples']).median:.3g}"
        cells = [_spread(_ratio(by_name.get(name), against)) for name in names]
        lines.append(f"| {label} | {first} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _speedup_table(rows: Sequence[Row]) -> str:
    """How many times as fast ours is: one row a problem, and over all of them."""
    base, ours = rows[0]["base"], "ours"
    names = dict.fromkeys(row["contender"] for row in rows)
    rivals = [
        n for n in names if not n.startswith(ours) and (n != base or rows[0]["base_is_rival"])
    ]
    if ours not in names or not rivals:
        return ""
    lines = [
        "Speed-up of ours over each rival: median of the rounds' ratios.\n",
        "| | " + " | ".join(rivals) + " |",
        "|---|" + "---|" * len(rivals),
    ]
    found: dict[str, list[float]] = {name: [] for name in rivals}
    for label, of_label in _grouped(rows, "label"):
        by_name = {row["contender"]: row for row in of_label}
        cells = []
        for name in rivals:
            ratio = _ratio(by_name.get(name), by_name.get(ours))
            cells.append("–" if ratio is None else f"{ratio.median:.2f}")
            if ratio is not None:
                found[name].append(ratio.median)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    means = [f"**{_geometric_mean(found[name]):.2f}**" if found[name] else "–" for name in rivals]
    lines.append("| **geometric mean** | " + " | ".join(means) + " |")
    return "\n".join(lines) + "\n"


def _rate_table(rows: Sequence[Row]) -> str:
    """Work a second and memory, where rows say how much work they did."""
    rows = [row for row in rows if "tokens_per_second" in row]
    if not rows:
        return ""
    lines = [
        "| | | tokens/s | conversations/s | peak MiB above what was held |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['label']} | {row['contender']} | {row['tokens_per_second']:,} "
            f"| {row['samples_per_second']:,} | {row['peak_bytes'] / 2**20:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def _missing_list(missing: Sequence[Row]) -> str:
    lines = []
    for (contender, reason), rows in _grouped(missing, "contender", "reason"):
        suites = ", ".join(dict.fromkeys(row["suite"] for row in rows))
        lines.append(f"- {contender}: {reason} ({suites}: {len(rows)} row{'s' * (len(rows) > 1)})")
    return "\n".join(lines) + "\n"


def _ratio(row: Row | None, against: Row | None) -> Spread | None:
    if row is None or against is None:
        return None
    return ratio_of(row["samples"], against["samples"])


def _spread(ratio: Spread | None) -> str:
    return "–" if ratio is None else f"{ratio.median:.2f} ({ratio.low:.2f}–{ratio.high:.2f})"


def _geometric_mean(values: Sequence[float]) -> float:
    return math.exp(math.fsum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    main()
