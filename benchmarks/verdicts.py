"""Where measurements contradict the choices of `lora_kernels.kernels.tuning`, and by how much.

Pure functions of the rows that `benchmarks.first` writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

Row = dict[str, Any]

# What a strategy must win to be called better: medians of two equal kernels differ by less.
NOISE = 0.01
# Of the copy's bandwidth and of torch's product, what passes and products should reach.
PASS_SHARE, PRODUCT_SHARE = 0.8, 0.93
# Smaller passes are over before the memory is busy, or find all in the cache.
PASS_BYTES = 2**25


def verdicts(rows: Sequence[Row]) -> list[Row]:
    """What is wrong, the costliest first; empty where nothing is.

    Returns:
        Rows of kind ``verdict``: ``wrong`` is ``strategy``, or ``blocks`` for a kernel's row;
        ``about`` and ``says`` in words; ``gain`` the factor between what the table chose and the
        best, ``lost`` in seconds a call; both None where a choice does not work at all.
    """
    found = [*_choices(rows), *_shares(rows)]
    return sorted(found, key=lambda row: -float("inf") if row["lost"] is None else -row["lost"])


def _choices(rows: Sequence[Row]) -> Iterator[Row]:
    layers = [row for row in rows if row["kind"] == "layer"]
    for problem in dict.fromkeys(row["problem"] for row in layers):
        here = [row for row in layers if row["problem"] == problem]
        tables: dict[str, str] = next((row["table"] for row in here if row.get("table")), {})
        for timing in ("graph", "call"):
            for role, times in _by_role([row for row in here if row["timing"] == timing]).items():
                chosen = tables.get(role)
                if chosen is not None:
                    yield from _compared(problem, timing, role, chosen, times, here)


def _by_role(rows: Sequence[Row]) -> dict[str, dict[str, Row]]:
    """By role and strategy, the row or what is left of it when forward's share is taken away."""
    measured = {
        (row["direction"], row["name"].removeprefix("ours: ")): row
        for row in rows
        if "seconds" in row and row["name"].startswith("ours: ")
    }
    forward = {name: row for (way, name), row in measured.items() if way == "forward"}
    backward = {}
    for (way, name), row in measured.items():
        # one_kernel is no way to compute dx: its backward is by whatever the table says.
        if way == "both" and name in forward and name != "one_kernel":
            before = forward[name]
            # The other part's spread is this one's, too.
            backward[name] = {
                "seconds": row["seconds"] - before["seconds"],
                "p20": row["p20"] - before["p80"],
                "p80": row["p80"] - before["p20"],
            }
    return {"forward": forward, "dx": backward}


def _compared(
    problem: str,
    timing: str,
    role: str,
    chosen: str,
    times: dict[str, Row],
    rows: Sequence[Row],
) -> Iterator[Row]:
    how = "in CUDA graphs" if timing == "graph" else "eagerly"
    about = f"{problem}, {role}, {how}"
    if chosen not in times:
        why = next(
            (
                row["error"]
                for row in rows
                if row["name"] == f"ours: {chosen}" and row["timing"] == timing and "error" in row
            ),
            None,
        )
        if why is not None:
            says = f"the table says {chosen}, which does not work: {why}"
            yield _verdict("strategy", about, says, None, None)
        return
    best = min(times, key=lambda name: times[name]["seconds"])
    ours, other = times[chosen], times[best]
    gain = ours["seconds"] / other["seconds"] if other["seconds"] > 0 else 1.0
    if gain > 1 + NOISE and other["p80"] < ours["p20"]:
        says = (
            f"the table says {chosen}, {_ms(ours)}; {best} takes {_ms(other)}, {gain:.2f} times "
            f"as fast"
        )
        yield _verdict("strategy", about, says, gain, ours["seconds"] - other["seconds"])


def _shares(rows: Sequence[Row]) -> Iterator[Row]:
    """Passes that fall short of the copy, and products that do of torch's."""
    pieces = [row for row in rows if row["kind"] == "piece" and "seconds" in row]
    torchs = {(_size(row), row["role"]): row["seconds"] for row in pieces if "torch" in row["name"]}
    # Where both products run, the table takes the one for Hopper.
    product = "hopper" if any("hopper" in row["name"] for row in pieces) else "fused"
    for row in pieces:
        base = torchs.get((_size(row), row["role"]))
        if "share" in row and row.get("tbps", 0) * 1e12 * row["seconds"] >= PASS_BYTES:
            share, goal, of = row["share"], PASS_SHARE, "the copy's bandwidth"
        elif base is not None and row["name"].endswith(product):
            share, goal, of = base / row["seconds"], PRODUCT_SHARE, "torch's product"
        else:
            continue
        if share < goal:
            says = f"{row['block']} reaches {share:.2f} of {of}, and {goal} was reckoned with"
            lost = row["seconds"] * (1 - share / goal)
            yield _verdict("blocks", f"{row['problem']}, {row['name']}", says, goal / share, lost)


def _size(row: Row) -> tuple[int, int, int]:
    return row["m"], row["k"], row["n"]


def _verdict(wrong: str, about: str, says: str, gain: float | None, lost: float | None) -> Row:
    return {
        "kind": "verdict",
        "wrong": wrong,
        "about": about,
        "says": says,
        "gain": gain,
        "lost": lost,
    }


def _ms(row: Row) -> str:
    return f"{row['seconds'] * 1e3:.3f} ms"


def summary(rows: Sequence[Row]) -> list[str]:
    """Lines to read: what failed, the table's own ratios, what is wrong."""
    lines = []
    for row in rows:
        if row["kind"] == "layer" and row["name"] == "ours" and "ratio" in row:
            way = "forward" if row["direction"] == "forward" else "forward+backward"
            how = "graphs" if row["timing"] == "graph" else "eagerly"
            lines.append(f"{row['problem']}, {way}, {how}: {row['ratio']:.3f} of the frozen linear")
    failed = [row for row in rows if "error" in row]
    lines += [f"no figure: {_where(row)}: {row['error']}" for row in failed]
    wrong = [row for row in rows if row["kind"] == "verdict"]
    for row in wrong:
        lost = "" if row["lost"] is None else f" ({row['lost'] * 1e6:.0f} µs a call)"
        lines.append(f"the table's {row['wrong']}: {row['about']}: {row['says']}{lost}")
    if not wrong:
        lines.append("nothing measured contradicts the table")
    return lines


def _where(row: Row) -> str:
    words = (row.get(key) for key in ("part", "problem", "name", "direction", "timing"))
    return ", ".join(str(word) for word in dict.fromkeys(words) if word)
