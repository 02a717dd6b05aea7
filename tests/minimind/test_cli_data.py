"""`minimind finetune` on data of other forms: what it says of them, asks of them, and refuses."""

from __future__ import annotations

import gzip
import json

import pytest
from tiny_cli import finetune, talk

from minimind.data.building import Cache
from minimind.data.sft import held_out
from minimind.data.tokenizer import load_tokenizer


def lines(path, rows, pack=False):
    data = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if pack else data)


def split(data):
    train, heldout = held_out(data, load_tokenizer(), max_length=512, seed=0)
    return [[] if part is None else list(part.conversations) for part in (train, heldout)]


def rows(count, **more):
    return [{"question": f"{i}加1是几？", "answer": f"是{i + 1}。", **more} for i in range(count)]


def answers(here):
    text = (here / "o" / "answers.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_another_form_is_named_and_its_questions_are_asked(here, capsys):
    lines(here / "mine.jsonl.gz", rows(30), pack=True)
    assert finetune("--data", "mine.jsonl.gz", "--out", "o", "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert "data        mine.jsonl.gz: 27 conversations (read as question/answer), " in said
    asked = answers(here)
    assert len(asked) == 3
    assert all({"question": a["prompt"], "answer": a["expected"]} in rows(30) for a in asked)


def test_without_out_the_directory_is_named_after_the_file_alone(here):
    lines(here / "mine.jsonl.gz", rows(3), pack=True)
    assert finetune("--data", "mine.jsonl.gz", "--epochs", "1") == 0
    assert (here / "out" / "mine-1" / "adapter.safetensors").exists()


def test_held_out_samples_beside_a_packed_file(here):
    lines(here / "mine.jsonl.gz", rows(30), pack=True)
    lines(here / "mine.heldout.jsonl.gz", rows(2), pack=True)
    train, heldout = split("mine.jsonl.gz")
    assert (len(train), len(heldout)) == (30, 2)


def test_what_teaches_nothing_is_not_held_out(here):
    silent = [{**turns, "weight": 0} if turns["role"] == "assistant" else turns
              for turns in talk("q", "wrong")]  # fmt: skip
    lines(here / "a.jsonl", [{"conversations": silent}] * 30 + [{"conversations": talk("q", "r")}])
    assert split("a.jsonl")[1] == []
    lines(here / "b.jsonl", [{"text": f"第{i}句"} for i in range(30)])
    assert [len(part) for part in split("b.jsonl")] == [27, 3]


def test_texts_are_learnt_and_ask_nothing(here, capsys):
    (here / "诗.txt").write_text("\n".join(f"第{i}句诗。" for i in range(30)), encoding="utf-8")
    assert finetune("--data", "诗.txt", "--out", "o", "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert "诗.txt: 27 texts, " in said and "held out    3\n" in said
    assert not (here / "o" / "answers.jsonl").exists()


def test_a_question_is_asked_after_its_system_turn(here, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "minimind.training.jobs.answer",
        lambda model, tokenizer, questions, **_: asked.append(questions) or [""] * len(questions),
    )
    system = "用一个字回答。"
    lines(here / "mine.jsonl", rows(30, system=system))
    assert finetune("--data", "mine.jsonl", "--out", "o", "--epochs", "1") == 0
    before, after = asked
    assert (
        before
        == after
        == [
            [{"role": "system", "content": system}, {"role": "user", "content": row["prompt"]}]
            for row in answers(here)
        ]
    )


def test_format_chooses_and_is_remembered(here, capsys):
    lines(here / "mine.jsonl", rows(3, text="春眠不觉晓"))
    assert finetune("--data", "mine.jsonl", "--out", "o") == 2
    assert "mine.jsonl:1 has the field 'text'" in capsys.readouterr().err
    assert finetune("--data", "mine.jsonl", "--out", "o", "--format", "text", "--epochs", "1") == 0
    assert "mine.jsonl: 3 texts, " in capsys.readouterr().out
    assert json.loads((here / "o" / "run.json").read_text())["settings"]["format"] == "text"


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "question,answer\n你是谁？,罗宾。\n".encode("gbk"), [], "may be GB18030"),
        ("a.jsonl", b'{"chosen": "a", "rejected": "b"}', [], "preferences, for methods such"),
        ("a.jsonl", b'{"a": 1}', ["--format", "csv"], "format must be one of sharegpt, "),
        (
            "a.jsonl",
            b'{"tools": [{"name": "f"}], "prompt": "q", "response": "r"}',
            [],
            "a.jsonl:1: the tokenizer's chat template leaves out the tools",
        ),
    ],
)  # fmt: skip
def test_refused_with_a_message(here, capsys, name, content, options, message):
    (here / name).write_bytes(content)
    assert finetune("--data", name, *options) == 2
    said = capsys.readouterr()
    assert message in said.err and said.out == "" and "Traceback" not in said.err
    assert not (here / "out").exists()


def test_bad_rows_stop_a_run_or_are_counted(here, capsys):
    text = [json.dumps(row) for row in rows(30)]
    text[4], text[20] = "{", '{"question": "q"}'
    (here / "mine.jsonl").write_text("\n".join(text))
    assert finetune("--data", "mine.jsonl", "--out", "o", "--epochs", "1") == 2
    assert "mine.jsonl:5: not JSON" in capsys.readouterr().err and not (here / "o").exists()
    assert finetune("--data", "mine.jsonl", "--out", "o", "--epochs", "1", "--skip-bad") == 0
    said = capsys.readouterr().out
    assert "mine.jsonl: 26 conversations" in said and "held out    2" in said
    first = (
        "skipped     2 rows that cannot be used; the first:\n              mine.jsonl:5: not JSON"
    )
    assert first in said and "\n              mine.jsonl:21: no " in said
    assert json.loads((here / "o" / "run.json").read_text())["settings"]["skip_bad"] is True


def test_nothing_but_bad_rows(here, capsys):
    (here / "mine.jsonl").write_text('{"a": 1}\n' * 3)
    assert finetune("--data", "mine.jsonl", "--skip-bad") == 2
    assert "none of 3 rows can be used; the first: mine.jsonl:1: no " in capsys.readouterr().err


@pytest.fixture
def cached(monkeypatch):
    monkeypatch.setattr("minimind.data.building.CACHED_FROM", 0)


def losses(here, out):
    text = (here / out / "metrics.jsonl").read_text()
    return [json.loads(line).get("loss") for line in text.splitlines()]


def test_the_caches_place_is_told_and_all_ways_train_the_same(here, cached, capsys):
    def told(*options):
        assert finetune("--out", f"o{len(list(here.iterdir()))}", *options) == 0
        return capsys.readouterr().out.splitlines()[0]

    before = len(list(here.iterdir()))
    assert told().startswith("data.jsonl: tokens kept in ")  # in the user's cache
    assert told().startswith("data.jsonl: tokens from ")
    assert told("--cache", "c").startswith("data.jsonl: tokens kept in c/data-")
    assert told("--cache", "c").startswith("data.jsonl: tokens from c/data-")
    assert told("--no-cache") == "minimind finetune"
    runs = [losses(here, path.name) for path in here.iterdir() if path.name.startswith("o")]
    assert len(runs) == 5 and before == 2 and all(run == runs[0] for run in runs)


def test_a_cache_and_none_is_refused(here, capsys):
    assert finetune("--cache", "c", "--no-cache") == 2
    assert "--cache c and --no-cache contradict each other" in capsys.readouterr().err


def test_resumed_out_of_the_cache(here, cached, capsys):
    """The resume point knows the data by its tokens, wherever they lie."""
    dataset = held_out("data.jsonl", load_tokenizer(), 512, seed=42)[0]
    (here / "c").mkdir()
    again = held_out("data.jsonl", load_tokenizer(), 512, seed=42, cache=Cache(here / "c"))[0]
    assert dataset.fingerprint() == again.fingerprint()
    assert len(list((here / "c").iterdir())) == 1
