"""`minimind info` of data: counts, lengths, what is learnt and cut, and a sample."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_cli import talk, write

from minimind import SFTDataset, load_tokenizer
from minimind.cli import main
from minimind.commands import looking


def info(capsys, *options):
    assert main(["info", *options]) == 0
    return capsys.readouterr().out


def test_what_is_said_is_what_a_run_would_have(here, capsys):
    talks = [talk(f"数{i}", "好" * (i + 1)) for i in range(30)]
    write("mine.jsonl", [*talks, talk("q" * 40, "r"), [{"role": "user", "content": "q"}]])
    write("mine.heldout.jsonl", talks[:1])
    said = info(capsys, "mine.jsonl", "--max-length", "40")
    cut = SFTDataset("mine.jsonl", load_tokenizer(), 40)
    whole = SFTDataset([*talks, talk("q" * 40, "r")], load_tokenizer(), 4096)
    silent = load_tokenizer().apply_chat_template([{"role": "user", "content": "q"}])["input_ids"]
    tokens = whole.tokens + len(silent)
    assert (
        f"mine.jsonl: 32 conversations, {(here / 'mine.jsonl').stat().st_size / 1000:.1f} kB\n"
        in (said)
    )
    lengths = sorted([*whole.lengths, len(silent)])
    assert f"  tokens      {tokens:,}, a sample {lengths[0]} to {lengths[-1]}: " in said
    assert f"{lengths[15]} (50 %)" in said
    learnt = sum(int(mask.sum()) for _, mask in cut.samples)
    assert f"  learnt      {learnt} of {cut.tokens:,} tokens ({learnt / cut.tokens:.1%})" in said
    over = [length - 40 for length in lengths if length > 40]
    assert f"  cut         {len(over)} of 32 at 40 tokens " in said
    assert f"by {sum(over):,} tokens in all ({sum(over) / tokens:.1%})" in said
    assert f"  left out    {cut.dropped} with nothing to learn" in said and cut.dropped == 2
    assert "  held out    mine.heldout.jsonl\n" in said
    assert "none is longer than 4,096 tokens" in info(capsys, "mine.jsonl", "--max-length", "4096")


def test_the_sample_shows_what_is_learnt(here, capsys, monkeypatch):
    write("mine.jsonl", [talk("x" * 200, "long"), talk("你是\x1b[31m谁？", "我\u202e叫罗宾。")])
    plain = info(capsys, "mine.jsonl")
    assert "mine.jsonl:2, what is learnt between » and «:\n<s>system\n" in plain
    assert plain.endswith("<s>user\n你是�[31m谁？</s>\n<s>assistant\n»我�叫罗宾。</s>«\n")
    monkeypatch.setattr(looking.sys.stdout, "isatty", lambda: True, raising=False)
    coloured = info(capsys, "mine.jsonl")
    assert "what is learnt in green" in coloured
    assert coloured.endswith("<s>assistant\n\033[32m我�叫罗宾。</s>\033[0m\n")
    monkeypatch.setenv("NO_COLOR", "1")
    assert info(capsys, "mine.jsonl") == plain


def test_a_long_sample_is_shown_in_part(here, capsys):
    write("mine.jsonl", [talk("字" * 5000, "r")])
    said = info(capsys, "mine.jsonl", "--max-length", "9000")
    assert said.endswith("字…\n") and len(said) < 4000


@pytest.mark.parametrize("name", ["identity", "诗.txt", "a.csv", "no-ending"])
def test_what_is_taken_for_data(here, capsys, name):
    (here / "诗.txt").write_text("春眠不觉晓\n处处闻啼鸟\n", encoding="utf-8")
    (here / "a.csv").write_text("question,answer\nq,r\n")
    (here / "no-ending").write_text('{"prompt": "q", "response": "r"}')
    said = info(capsys, name)
    kinds = {"identity": "2,512 conversations, ", "诗.txt": "2 texts, "}
    kinds["a.csv"] = "1 conversations (read as question/answer), "
    kinds["no-ending"] = "1 conversations (read as prompt/response), "
    assert kinds[name] in said


def test_a_directory_named_as_a_shipped_set_is_itself(here, capsys):
    (here / "base").rename(here / "tea")
    assert "dim 64, 1 layers" in info(capsys, "tea")


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("{", [], "mine.jsonl:1: not JSON"),
        ("", [], "mine.jsonl holds nothing to learn"),
        ('{"a": 1}', ["--skip-bad"], "mine.jsonl holds nothing to learn"),
        ('{"prompt": "q"}', ["--format", "csv"], "format must be one of"),
        ("{}", ["--max-length", "1"], "max_length must be at least 2"),
        ("{}", ["--tokenizer", "none"], "no tokenizer at none"),
        ("{}", ["--cache", "c", "--no-cache"], "contradict"),
    ],
)
def test_what_cannot_be_said_is_refused(here, capsys, text, options, message):
    (here / "mine.jsonl").write_text(text)
    assert main(["info", "mine.jsonl", *options]) == 2
    said = capsys.readouterr()
    assert message in said.err and "Traceback" not in said.err and said.out == ""


def test_bad_rows_are_counted(here, capsys):
    rows = [json.dumps({"prompt": "q", "response": "r"})] * 3
    (here / "mine.jsonl").write_text("\n".join([*rows, "{"]))
    said = info(capsys, "mine.jsonl", "--skip-bad")
    assert "mine.jsonl: 3 conversations" in said
    assert (
        "  skipped     1 rows that cannot be used; the first:\n              mine.jsonl:4: not"
        in said
    )


def test_what_nothing_is_learnt_of_has_no_sample(here, capsys):
    write("mine.jsonl", [[{"role": "user", "content": "q"}]])
    said = info(capsys, "mine.jsonl")
    assert "  learnt      nothing of what" in said and "left out    1 with" in said
    assert "what is learnt" not in said


def test_sizes_have_a_unit():
    assert [looking._bytes(n) for n in (7, 1234, 43_000_000, 7_500_000_000)] == [
        "7 bytes",
        "1.2 kB",
        "43.0 MB",
        "7.5 GB",
    ]
    assert looking._lengths(np.array([5])) == (
        "a sample 5 to 5: 5 (5 %), 5 (25 %), 5 (50 %), 5 (75 %), 5 (95 %)"
    )
