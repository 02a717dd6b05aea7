"""Plots of the linear suite: the ratio to the frozen linear by tokens and by rank."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .measure import ratio
from .roofline import Ceilings, Size, floor, frozen, seconds
from .shapes import DTYPES

Row = dict[str, Any]
LEAST_POINTS = 3
AXES = {"m": ("tokens (M)", "ratio-by-tokens.png"), "rank": ("rank (r)", "ratio-by-rank.png")}


def draw(rows: Sequence[Row], out: Path) -> list[Path]:
    """One file for each axis along which enough was measured; returns their paths."""
    linear = [row for row in rows if row["suite"] == "linear"]
    drawn = []
    for axis, (title, name) in AXES.items():
        panels = _panels(linear, axis)
        if panels:
            _figure(panels, axis, title).savefig(out / name, dpi=110, format="png")
            drawn.append(out / name)
    return drawn


def _panels(rows: Sequence[Row], axis: str) -> list[tuple[str, list[Row]]]:
    """Rows that differ in nothing but the axis and the contender, where there are enough."""
    fixed = [n for n in ("device", "k", "n", "m", "rank", "dtype", "dropout") if n != axis]
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        if row["direction"] == "both":
            key = (*(row[name] for name in fixed), row["timing"])
            groups.setdefault(key, []).append(row)
    panels = []
    for key, group in groups.items():
        if len({row[axis] for row in group}) < LEAST_POINTS:
            continue
        named = dict(zip((*fixed, "timing"), key, strict=True))
        other = f"r = {named['rank']}" if axis == "m" else f"M = {named['m']}"
        title = f"{named['k']} → {named['n']}, {named['dtype']}, {other}, p = {named['dropout']:g}"
        panels.append((title + (", graphs" if named["timing"] == "graph" else ""), group))
    return panels


def _figure(panels: list[tuple[str, list[Row]]], axis: str, title: str) -> Figure:
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(6.2 * columns, 4.2 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, squeeze=False)
    names = list(dict.fromkeys(row["contender"] for _, group in panels for row in group))
    for index, (panel_title, group) in enumerate(panels):
        axes = grid[index // columns][index % columns]
        base = {row[axis]: row for row in group if row["contender"] == row["base"]}
        for number, name in enumerate(names):
            points = sorted(
                (row[axis], ratio(row["samples"], base[row[axis]]["samples"]))
                for row in group
                if row["contender"] == name and name != row["base"] and row[axis] in base
            )
            if not points:
                continue
            places = [place for place, _ in points]
            ours = name.startswith("ours")
            axes.plot(
                places,
                [found.median for _, found in points],
                marker="o" if ours else ".",
                linewidth=2.2 if ours else 1.2,
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                label=name,
            )
            low, high = ([getattr(r, end) for _, r in points] for end in ("low", "high"))
            axes.fill_between(places, low, high, color=f"C{number % 10}", alpha=0.12)
        _draw_floor(axes, group, axis)
        axes.set(title=panel_title, xlabel=title, ylabel="time over the frozen linear's")
        axes.set_xscale("log", base=2)
        ticks = sorted({row[axis] for row in group})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    for index in range(len(panels), lines * columns):
        grid[index // columns][index % columns].set_axis_off()
    return figure


def _draw_floor(axes: Any, group: Sequence[Row], axis: str) -> None:
    row = group[0]
    measured = row.get("ceilings")
    if not measured or row["dtype"] not in measured["flops"]:
        return
    ceilings = Ceilings(measured["flops"][row["dtype"]], measured["bandwidth"])
    places = sorted({r[axis] for r in group})
    ratios = []
    for place in places:
        sizes = {**row, axis: place}
        itemsize = DTYPES[row["dtype"]].itemsize
        size = Size(sizes["m"], sizes["k"], sizes["n"], sizes["rank"], itemsize)
        ratios.append(floor(size, ceilings) / seconds(frozen(size), ceilings))
    axes.plot(places, ratios, color="black", linestyle=":", label="roofline floor")
