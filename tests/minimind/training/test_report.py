"""What a run writes: metrics, the comparison as text, the plot."""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import struct
import types

import pytest
from matplotlib import get_data_path
from matplotlib.font_manager import fontManager

import minimind.training.report as module
from minimind.training.loop import Progress
from minimind.training.report import (
    Report,
    Side,
    append,
    command_line,
    compare,
    drawable,
    matches,
    plot_loss,
    program,
    written,
)


def progress(step, loss=1.0, aux_loss=0.0, tokens=100, seconds=0.5, **changes):
    values = {"total_steps": 7, "epoch": 1, "lr": 1e-3 / step, **changes}
    return Progress(
        step=step, loss=loss, aux_loss=aux_loss, tokens=tokens, seconds=seconds, **values
    )


def rows(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- records --------------------------------------------------------------------------------------


def test_records_hold_means_of_their_interval(tmp_path):
    with Report(tmp_path, 0, 7, log_interval=3) as report:
        for step, loss in enumerate((4.0, 2.0, 0.0, 3.0, 3.0, 6.0, 9.0), start=1):
            report.step(
                progress(
                    step, loss, aux_loss=loss / 4, tokens=10 * step, seconds=2.0 if step < 4 else 1
                )
            )
            if step == 3:
                assert len(rows(tmp_path)) == 1  # written at once, not at the end
    first, second, last = rows(tmp_path)
    assert first == {
        "step": 3,
        "epoch": 1,
        "loss": 2.0,
        "aux_loss": 0.5,
        "lr": 1e-3 / 3,
        "tokens_per_second": 10.0,  # 60 tokens in 6 seconds
    }
    assert (second["step"], second["loss"], second["tokens_per_second"]) == (6, 4.0, 50.0)
    # The interval that the run's end leaves incomplete is a record too.
    assert (last["step"], last["loss"], last["aux_loss"]) == (7, 9.0, 2.25)


def test_no_empty_record_after_a_full_interval(tmp_path):
    with Report(tmp_path, 0, 2, log_interval=2) as report:
        report.step(progress(1))
        report.step(progress(2))
        report.flush()
    assert [row["step"] for row in rows(tmp_path)] == [2]


def test_an_error_flushes_and_is_passed_on(tmp_path):
    with pytest.raises(KeyboardInterrupt), Report(tmp_path, 0, 9, log_interval=5) as report:
        report.step(progress(1, loss=2.0))
        report.step(progress(2, loss=4.0))
        raise KeyboardInterrupt
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(2, 3.0)]


def test_a_resumed_run_keeps_the_grid_and_appends(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "loss": 9}\n{"step": 4, "lo')
    done = {"event": "before", "heldout_loss": 5.0}
    with Report(tmp_path, 4, 7, 3, [done], [progress(4, loss=4.0)]) as report:
        assert (report.bar.n, report.bar.total) == (4, 7)
        for step in (5, 6, 7):
            report.step(progress(step, loss=float(step)))
        assert report.bar.n == 7
    assert [row.get("step") for row in rows(tmp_path)] == [None, 6, 7]
    assert [row.get("loss") for row in rows(tmp_path)] == [None, 5.0, 7.0]


def test_the_state_is_that_of_complete_records_and_the_steps_since(tmp_path):
    with pytest.raises(KeyboardInterrupt), Report(tmp_path, 0, 9, log_interval=2) as report:
        for step in (1, 2, 3):
            report.step(progress(step))
        raise KeyboardInterrupt
    state = report.state_dict()
    assert [row["step"] for row in state["rows"]] == [2]
    assert [Progress(**step) for step in state["pending"]] == [progress(3)]
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]


def test_a_full_disk_ends_no_training_and_loses_no_record(tmp_path, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with Report(tmp_path, 0, 4, log_interval=1) as report:
        report.step(progress(1))
        with monkeypatch.context() as patch:
            patch.setattr(module, "append", full)
            report.step(progress(2))
            report.step(progress(3))
        report.step(progress(4))
    assert capsys.readouterr().err.count("cannot be written ([Errno 28] No space left") == 1
    assert [row["step"] for row in rows(tmp_path)] == [1, 4]
    report.write()
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 3, 4]


def test_a_torn_line_does_not_swallow_the_next(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"n": 1}\n{"n": 2')
    append(tmp_path / "a.jsonl", {"n": 3})
    append(tmp_path / "a.jsonl", {"n": 4})
    assert (tmp_path / "a.jsonl").read_text() == '{"n": 1}\n{"n": 2\n{"n": 3}\n{"n": 4}\n'


def test_append_writes_readable_text(tmp_path):
    append(tmp_path / "a.jsonl", {"prompt": "你好\n😀"})
    append(tmp_path / "a.jsonl", {"n": 1})
    assert (tmp_path / "a.jsonl").read_bytes() == '{"prompt": "你好\\n😀"}\n{"n": 1}\n'.encode()


# --- before and after -----------------------------------------------------------------------------


def test_matches_counts_equal_answers_only():
    assert matches(["a", "b ", "c", ""], ["a", "b", "C", ""]) == 2
    assert matches([], []) == 0
    with pytest.raises(ValueError, match="zip"):
        matches(["a"], ["a", "b"])


def test_compare():
    before = Side(2.0, 1.5, ["I am MiniMind.", "Paris.", "no"])
    after = Side(0.5, 1.65, ["I am Robin.", "Paris.", "yes"])
    expected = ["I am Robin.", "Paris.", "Yes"]
    lines = compare(before, after, ["Who?", "Where?", "So?"], expected).splitlines()
    assert lines[0].split() == ["held-out", "loss", "2.0000", "->", "0.5000", "(-75.0", "%)"]
    assert lines[1].endswith("1.5000 ->   1.6500   (+10.0 %)")
    assert lines[1].startswith("  base set's held-out loss ")
    assert re.sub(" +", " ", lines[2]) == (" answered to the letter 1 -> 2 (of 3 held-out prompts)")
    assert len({line.index("->") for line in lines[:3]}) == 1  # the columns stand in line
    assert lines[3:7] == [
        "",
        "  > Who?",
        "    before: I am MiniMind.",
        "    after:  I am Robin.",
    ]
    assert lines[-3:] == ["  > So?", "    before: no", "    after:  yes"]


def test_compare_shows_some_answers_and_counts_all():
    prompts = [f"p{i}" for i in range(9)]
    before, after = Side(1.0, None, ["x"] * 9), Side(1.0, None, prompts)
    text = compare(before, after, prompts, prompts)
    assert "(+0.0 %)" in text and "base set" not in text
    assert " 0 -> " in text and " 9   (of 9 held-out prompts)" in text
    assert [line for line in text.splitlines() if line.startswith("  > ")] == [
        f"  > p{i}" for i in range(6)
    ]


def test_compare_without_anything_held_out():
    nothing = Side(None, None, [])
    assert compare(nothing, nothing, [], []) == ""


# --- the plot -------------------------------------------------------------------------------------

STEPS = [
    {"step": 10 * i, "epoch": 1, "loss": 3.0 / i, "aux_loss": 0.0, "lr": 1e-3 / i}
    for i in range(1, 5)
]
BEFORE = {"event": "before", "heldout_loss": 4.0, "base_heldout_loss": 1.0}
AFTER = {"event": "after", "heldout_loss": 2.0, "base_heldout_loss": 1.5}
NOTHING = {"heldout_loss": None, "base_heldout_loss": None}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were made, to look into."""
    figures = []
    real = module.FigureCanvasAgg
    monkeypatch.setattr(
        module, "FigureCanvasAgg", lambda figure: figures.append(figure) or real(figure)
    )
    return figures


def curves(figure):
    return {
        line.get_label(): list(zip(*(map(float, d) for d in line.get_data()), strict=True))
        for axes in figure.axes
        for line in axes.get_lines()
    }


CASES = {
    "everything": [BEFORE, AFTER, *STEPS],
    "no base set": [BEFORE | {"base_heldout_loss": None}, AFTER | {"base_heldout_loss": None}]
    + STEPS,
    "nothing held out": [{"event": "before"} | NOTHING, *STEPS, {"event": "after"} | NOTHING],
    "no events": STEPS,
    "a single step": [BEFORE, STEPS[0], AFTER],
    "no steps": [BEFORE, AFTER],
    "many steps": [STEPS[0] | {"step": i} for i in range(1, 60)],
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_plot_writes_a_png_with_the_right_curves(tmp_path, drawn, case):
    path = tmp_path / "loss.png"
    plot_loss(case, path, "a title")
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and content[-8:-4] == b"IEND"
    width, height = struct.unpack(">II", content[16:24])
    assert width > 600 and height > 400
    steps = [row for row in case if "step" in row]
    expected = {
        "training loss": [(row["step"], row["loss"]) for row in steps],
        "learning rate": [(row["step"], row["lr"]) for row in steps],
    }
    events = {row["event"]: row for row in case if "event" in row} if steps else {}
    for key, label in (
        ("heldout_loss", "held-out loss"),
        ("base_heldout_loss", "base set's held-out loss"),
    ):
        if events and events["before"][key] is not None:
            expected[label] = [
                (0.0, events["before"][key]),
                (steps[-1]["step"], events["after"][key]),
            ]
    (figure,) = drawn
    assert curves(figure) == expected
    assert figure.axes[0].get_title() == "a title"
    legend = {text.get_text() for text in figure.legends[0].get_texts()}
    assert legend == set(expected)


def test_a_single_step_is_visible(tmp_path, drawn):
    plot_loss([STEPS[0]], tmp_path / "loss.png", "t")
    plot_loss(STEPS, tmp_path / "loss.png", "t")
    one, four = ([axes.get_lines()[0].get_marker() for axes in f.axes] for f in drawn)
    assert one == [".", "x"] and four == [".", ""]  # a line through one point shows nothing


@pytest.mark.parametrize("loss", [0.05, 60.0, None], ids=["highest", "lowest", "alone"])
def test_a_single_steps_loss_and_rate_lie_apart(tmp_path, drawn, loss):
    rows = [STEPS[0], {**NOTHING, "event": "after", "heldout_loss": loss}]
    plot_loss(rows, tmp_path / "loss.png", "t")
    points = [a.transData.transform(a.get_lines()[0].get_xydata())[0] for a in drawn[0].axes]
    assert abs(points[0] - points[1]).max() > 20  # pixels


@pytest.mark.parametrize("losses", [(9.5, 9.2), (0.031, 0.024), (2.0, 1.1), (90.0, 0.5)])
def test_losses_can_be_read_off_in_plain_numbers(tmp_path, drawn, losses):
    rows = [STEPS[i] | {"loss": loss} for i, loss in enumerate(losses)]
    plot_loss(rows, tmp_path / "loss.png", "t")
    axes = drawn[0].axes[0]
    low, high = axes.get_ylim()
    texts = [text for tick in (*axes.yaxis.get_major_ticks(), *axes.yaxis.get_minor_ticks())
             if low <= tick.get_loc() <= high and (text := tick.label1.get_text())]  # fmt: skip
    assert len(texts) >= 2 and all(low <= float(text) <= high for text in texts)
    assert len(texts) <= 12


@pytest.mark.parametrize(
    ("called", "on_path", "expected"),
    [
        ("/v/bin/minimind", "/v/bin/minimind", "minimind"),
        ("/v/bin/minimind", None, os.path.relpath("/v/bin/minimind")),
        ("/v/bin/minimind", "/other/bin/minimind", os.path.relpath("/v/bin/minimind")),
        ("/my v/minimind", None, f"'{os.path.relpath('/my v/minimind')}'"),
        ("/src/minimind/__main__.py", None, "python -m minimind"),
        ("/v/bin/pytest", None, "minimind"),
    ],
)
def test_the_next_command_can_be_typed_as_it_is_printed(monkeypatch, called, on_path, expected):
    monkeypatch.setattr("sys.argv", [called])
    monkeypatch.setattr("shutil.which", lambda name: on_path)
    assert program() == expected


def test_what_is_printed_can_be_pasted_into_a_shell(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["/src/minimind/__main__.py"])
    path = tmp_path / "我的 $数据" / "it's"
    line = command_line("chat", "--lora", path)
    assert line.startswith("python -m minimind chat --lora ")
    assert shlex.split(line)[-1] == str(path)


def test_only_what_is_there_is_said_to_be_written(tmp_path):
    (tmp_path / "run.json").touch(), (tmp_path / "loss.png").touch()
    assert written(tmp_path, "run.json", "answers.jsonl", "loss.png") == "run.json, loss.png"


@pytest.mark.filterwarnings("error")
def test_a_title_of_any_script_is_drawn_without_a_warning(tmp_path, drawn, monkeypatch):
    title = "minimind finetune: 我的 数据/π $x$.jsonl \ud83d"
    monkeypatch.setattr(fontManager, "ttflist", [])  # nothing but what comes with matplotlib
    own = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    monkeypatch.setattr(module, "findfont", lambda name: own)
    plot_loss(STEPS, tmp_path / "loss.png", title)
    assert drawn[0].axes[0].get_title() == "minimind finetune: ?? ??/π $x$.jsonl ?"


def test_a_font_that_has_the_characters_is_taken(monkeypatch):
    wide = types.SimpleNamespace(name="WenQuanYi Zen Hei")
    has = {"DejaVu Sans": "ab ", "WenQuanYi Zen Hei": "我的"}
    monkeypatch.setattr(fontManager, "ttflist", [wide])
    monkeypatch.setattr(module, "findfont", lambda name: name)
    monkeypatch.setattr(
        module,
        "get_font",
        lambda name: types.SimpleNamespace(get_char_index=lambda c: int(chr(c) in has[name])),
    )
    assert drawable("a 我的é") == ("a 我的?", ["DejaVu Sans", "WenQuanYi Zen Hei"])
    assert drawable("ab") == ("ab", ["DejaVu Sans"])
