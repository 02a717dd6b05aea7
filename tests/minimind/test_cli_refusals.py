"""What the `minimind` command refuses: a clear message, exit code 2, nothing written."""

from __future__ import annotations

import json
import re

import pytest
from tiny_cli import finetune, make_base

from minimind.cli import main


def small_tokenizer_model(here):
    make_base(here / "small", vocab_size=100)


def later_era(here):
    make_base(here / "later", era="2025-04")


def other_run(here):
    (here / "used").mkdir()
    for name in ("run.json", "adapter.safetensors"):
        (here / "used" / name).write_text("{}")


def bad_line(text):
    def prepare(here):
        good = (here / "data.jsonl").read_text().splitlines()[0]
        (here / "bad.jsonl").write_text(f"{good}\n{text}\n")

    return prepare


def turn(role, content):
    return json.dumps({"conversations": [{"role": role, "content": content}]})


REFUSED = {
    "a directory for data": (["--data", "./base"], None, "base is a directory; name one"),
    "no data": (["--data", "none.jsonl"], None, r"no data file at none.jsonl; check the path"),
    "not JSON": (["--data", "bad.jsonl"], bad_line("{oops"), "bad.jsonl:2: not JSON"),
    "no conversations": (["--data", "bad.jsonl"], bad_line('{"a": 1}'), 'bad.jsonl:2: no "conver'),
    "role": (["--data", "bad.jsonl"], bad_line(turn("robot", "x")), "bad.jsonl:2: turn 1 has role"),
    "empty answer": (["--data", "bad.jsonl"], bad_line(turn("assistant", " ")), "says nothing"),
    "no base": (["--base", "nowhere"], None, "nowhere"),
    "base of another size": (["--dim", "128"], None, "--dim 128 does not fit the base base"),
    "later era, no tokenizer": (["--base", "later"], later_era, "2025-04.*name the directory of"),
    "vocabulary too small": (["--base", "small"], small_tokenizer_model, "6400 entries.*only 100"),
    "no tokenizer": (["--tokenizer", "base"], None, "no tokenizer at base"),
    "target": (["--targets", "wx"], None, "the target 'wx'; did you mean"),
    "rank": (["--rank", "0"], None, "rank must be at least 1, got 0"),
    "dropout": (["--dropout", "1"], None, "dropout must be in"),
    "epochs": (["--epochs", "0"], None, "epochs must be an integer of at least 1"),
    "rate": (["--lr", "nan"], None, "lr must be a positive number"),
    "length": (["--max-length", "1"], None, "max_length must be at least 2"),
    "nothing to learn": (["--max-length", "5"], None, "raise max_length"),
    "output used": (["--out", "used"], other_run, "used holds another run; nothing"),
    "output a file": (["--out", "data.jsonl"], None, "exists and is not empty"),
    "output under a file": (["--out", "data.jsonl/o"], None, "data.jsonl"),
    "seed": (["--seed", str(2**70)], None, r"seed must be below 2\*\*63"),
    "device": (["--device", "tpu"], None, "device must be auto, cpu, cuda or mps"),
    "dtype": (["--dtype", "int8"], None, "dtype must be auto, float32"),
    "resume nothing": (["--resume", "base"], None, "--resume takes its settings from the run"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message_and_nothing_written(here, capsys, case):
    options, prepare, message = REFUSED[case]
    if prepare:
        prepare(here)
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert finetune(*options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("minimind finetune: ") and "Traceback" not in said.err
    assert re.search(message, said.err), said.err
    assert said.out == ""
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--resume", "base"], "has no run.json, there is nothing to resume"),
        (["chat", "--compare"], "--compare needs an adapter"),
        (["chat", "--base", "base", "--lora", "no.pth"], "no adapter file at no.pth"),
        (["chat", "--base", "base", "--temperature", "-1"], "temperature must be at least 0"),
        (["chat", "--base", "base", "--top-p", "0"], "top_p in"),
        (["chat", "--base", "base", "--max-new-tokens", "0"], "at least 1"),
        (["merge", "--out", "m"], "merge needs an adapter"),
        (["merge", "--base", "base", "--lora", "x.pth", "--out", "base"], "not empty"),
        (["merge", "--base", "base", "--lora", "x.pth", "--out", "data.jsonl/o"], "x.pth"),
        (["chat", "--base", "base", "--prompt", "long " * 20000], "start a new one"),
        (["info", "nothing"], "nothing at nothing; check the path"),
    ],
)
def test_other_commands_refuse_too(here, capsys, arguments, message):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith(f"minimind {arguments[0]}: ")
