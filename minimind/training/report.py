"""What a run shows and writes: the progress bar, metrics.jsonl, before and after, loss.png."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager, get_font
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter
from tqdm import tqdm

from lora_kernels.adapters import write_atomically

from .loop import Progress

METRICS, ANSWERS, PLOT = "metrics.jsonl", "answers.jsonl", "loss.png"
SHOWN_ANSWERS = 6


@dataclass(frozen=True)
class Side:
    """The model before or after training; None or empty where there was nothing to look at.

    Losses are nats per supervised token. ``answers`` are to the held-out prompts, in order.
    """

    heldout_loss: float | None
    base_heldout_loss: float | None
    answers: list[str]


class Report:
    """The progress bar and the log of one run, as a context manager around its training.

    Training goes on where neither can be shown or written: `write` can still do it in the end.

    Args:
        out: directory of metrics.jsonl, which is written anew and then appended to.
        step, total_steps: where the run stands and ends.
        log_interval: optimizer steps between records; a record holds the means of its interval.
        rows: the records up to the last that was complete.
        pending: the steps since, which the next record covers.
        told: called with the step and the record, once it is written.
    """

    def __init__(
        self,
        out: Path,
        step: int,
        total_steps: int,
        log_interval: int,
        rows: Sequence[dict[str, Any]] = (),
        pending: Sequence[Progress] = (),
        told: Callable[[int, dict[str, Any]], object] = lambda step, row: None,
    ) -> None:
        self._told = told
        self.metrics = out / METRICS
        self.log_interval = log_interval
        self.rows, self.pending = list(rows), list(pending)
        self._failed = False
        self.bar = tqdm(
            total=total_steps,
            initial=step,
            desc="training",
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants few lines
        )

    def __enter__(self) -> Report:
        with self._going_on():
            self.write()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
        elif self.pending:
            # Seen, but not kept: a resumed run's record covers the whole interval.
            with self._going_on():
                append(self.metrics, self._record())
        with contextlib.suppress(OSError):
            self.bar.close()

    def step(self, progress: Progress) -> None:
        """Count one optimizer step; every ``log_interval`` of them make a record."""
        self.pending.append(progress)
        with contextlib.suppress(OSError):
            self.bar.update()
        if progress.step % self.log_interval == 0:
            self.flush()

    def flush(self) -> None:
        """Write the steps since the last record as one."""
        if not self.pending:
            return
        row = self._record()
        self.pending = []
        self.rows.append(row)
        with self._going_on():
            append(self.metrics, row)
        self._told(row["step"], row)
        with contextlib.suppress(OSError):
            self.bar.set_postfix_str(
                f"loss {math.nan if row['loss'] is None else row['loss']:.4f}, lr {row['lr']:.2e}, "
                f"{row['tokens_per_second']:,.0f} tokens/s"
            )

    def write(self) -> None:
        """Write metrics.jsonl anew, whole or not at all."""
        write_rows(self.metrics, self.rows)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to write the records of an unbroken one."""
        return {"rows": list(self.rows), "pending": [asdict(p) for p in self.pending]}

    @contextlib.contextmanager
    def _going_on(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._failed:
                warn(f"{self.metrics} cannot be written ({error}); training goes on")
            self._failed = True

    def _record(self) -> dict[str, Any]:
        tokens = sum(p.tokens for p in self.pending)
        seconds = sum(p.seconds for p in self.pending)
        last = self.pending[-1]
        finite = [p for p in self.pending if math.isfinite(p.loss)]
        skipped = sum(p.skipped for p in self.pending)
        return {
            "step": last.step,
            "epoch": last.epoch,
            # Of steps that were skipped for it, a loss that is no number is left out.
            "loss": _mean([p.loss for p in finite]) if finite else None,
            "aux_loss": _mean([p.aux_loss for p in finite]) if finite else None,
            **({"skipped_steps": skipped} if skipped else {}),
            **({} if last.scale is None else {"loss_scale": last.scale}),
            "lr": last.lr,
            "tokens_per_second": round(tokens / seconds, 1),
        }


def say(text: str) -> None:
    """Print to standard output; once that fails, nothing more goes there."""
    _print(text, sys.stdout)


def warn(text: str) -> None:
    """Print a warning to standard error; once that fails, nothing more goes there."""
    _print(f"\nwarning: {text}", sys.stderr)


def _print(text: str, stream: TextIO) -> None:
    try:
        print(text, file=stream, flush=True)
    except OSError:
        silence(stream)


def silence(stream: TextIO) -> None:
    """Let what is still to be written to ``stream`` go nowhere, without an error at the end."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def program() -> str:
    """What the user would have to type to run this command again: ``minimind``, or its path."""
    called = Path(sys.argv[0])
    if called.parts[-2:] == ("minimind", "__main__.py"):
        return "python -m minimind"
    found = shutil.which("minimind")
    if called.name != "minimind" or (found and Path(found).resolve() == called.resolve()):
        return "minimind"
    return shlex.quote(os.path.relpath(called))


def command_line(*arguments: str | os.PathLike[str]) -> str:
    """`program` with ``arguments``, to be pasted into a shell as it is."""
    return f"{program()} {shlex.join(map(str, arguments))}"


def written(out: Path, *names: str) -> str:
    """Those of ``names`` that are in ``out``, as text."""
    return ", ".join(name for name in names if (out / name).exists())


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line to ``path``, on a line of its own even where the last one is torn."""
    line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else b"\n" + line
        file.write(line)


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write JSON lines to ``path``, whole or not at all."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_bytes(text.encode()))


def matches(answers: Sequence[str], expected: Sequence[str]) -> int:
    """How many answers are the expected ones to the letter."""
    return sum(a == e for a, e in zip(answers, expected, strict=True))


def compare(before: Side, after: Side, prompts: Sequence[str], expected: Sequence[str]) -> str:
    """Before and after, as text: losses, answers to the letter, and some answers in full."""
    lines = []
    for name, old, new in (
        ("held-out loss", before.heldout_loss, after.heldout_loss),
        ("base set's held-out loss", before.base_heldout_loss, after.base_heldout_loss),
    ):
        if old is not None and new is not None:
            change = f"{100 * (new / old - 1):+.1f} %" if old else "from nothing"
            lines.append(f"  {name:<26}{old:8.4f} -> {new:8.4f}   ({change})")
    if prompts:
        old_count, new_count = (matches(side.answers, expected) for side in (before, after))
        lines.append(
            f"  {'answered to the letter':<26}{old_count:8d} -> {new_count:8d}   "
            f"(of {len(prompts)} held-out prompts)"
        )
        lines.append("")
        shown = zip(prompts, before.answers, after.answers, strict=True)
        for prompt, old_answer, new_answer in list(shown)[:SHOWN_ANSWERS]:
            lines += [f"  > {prompt}", f"    before: {old_answer}", f"    after:  {new_answer}"]
    return "\n".join(lines)


def plot_loss(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw training loss and learning rate over steps, and the held-out loss at both ends."""
    steps = [row for row in rows if "step" in row]
    figure = Figure(figsize=(7.5, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.plot(
        [row["step"] for row in steps],
        [math.nan if row["loss"] is None else row["loss"] for row in steps],
        color="tab:blue",
        marker="." if len(steps) < 30 else "",
        label="training loss",
    )
    ends = [
        (0 if row["event"] == "before" else steps[-1]["step"], row)
        for row in rows
        if row.get("event") in ("before", "after") and steps
    ]
    for key, label, color in (
        ("heldout_loss", "held-out loss", "tab:orange"),
        ("base_heldout_loss", "base set's held-out loss", "tab:green"),
    ):
        points = [(x, row[key]) for x, row in ends if row.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), "o", color=color, label=label, zorder=3)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)", yscale="log")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    # Within a power of ten the ticks between are all there is to read.
    axes.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    title, fonts = drawable(title)
    axes.set_title(title, parse_math=False, fontfamily=fonts)  # it may hold dollar signs
    axes.grid(alpha=0.3)
    rates = axes.twinx()
    rates.plot(
        [row["step"] for row in steps],
        [row["lr"] for row in steps],
        color="tab:gray",
        linewidth=1,
        linestyle=":",
        marker="x" if len(steps) == 1 else "",
        label="learning rate",
    )
    # A single point at the top, or in the middle, would lie on the loss.
    top = 4 * steps[0]["lr"] if len(steps) == 1 else None
    rates.set(ylabel="learning rate", ylim=(0, top))
    handles = [h for a in (axes, rates) for h in a.get_legend_handles_labels()[0]]
    # Outside: within, it would lie on the only point of a run of one step.
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


# Families with Chinese, Japanese and Korean, as systems and people install them.
_WIDE_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC"),
    *("Source Han Sans CN", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Droid Sans Fallback"),
    *("PingFang SC", "Hiragino Sans GB", "Heiti SC", "STHeiti", "Arial Unicode MS"),
    *("Microsoft YaHei", "SimHei", "SimSun"),
)


def drawable(text: str) -> tuple[str, list[str]]:
    """``text`` and the font families that draw it; "?" for what no font at hand has.

    Otherwise matplotlib would draw boxes and warn of each character.
    """
    families = ["DejaVu Sans"]  # comes with matplotlib
    present = {entry.name for entry in fontManager.ttflist}
    if not text.isascii():
        families += [name for name in _WIDE_FONTS if name in present]
    fonts = [get_font(findfont(name)) for name in families]
    drawn = (
        character if any(font.get_char_index(ord(character)) for font in fonts) else "?"
        for character in text
    )
    return "".join(drawn), families


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
