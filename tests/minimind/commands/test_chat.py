"""`minimind chat`."""

from __future__ import annotations

import io
import os
import sys

import pytest
from tiny_cli import finetune

from minimind.cli import main
from minimind.commands import chat as module


def test_chat_with_without_and_comparing(here, capsys, monkeypatch):
    assert finetune("--out", "o", "--epochs", "8", "--lr", "0.05", "--targets", "all-linear") == 0
    capsys.readouterr()
    ask = ["--base", "base", "--prompt", "What is 3 plus 1?", "--max-new-tokens", "12"]
    lora = ["--lora", "o/adapter.safetensors"]
    assert main(["chat", *ask]) == 0
    base = capsys.readouterr().out
    assert main(["chat", *ask, *lora]) == 0
    adapted = capsys.readouterr().out
    assert base.startswith("base> ") and adapted.startswith("lora> ")
    assert base.removeprefix("base> ") != adapted.removeprefix("lora> ")
    assert main(["chat", *ask, *lora, "--compare"]) == 0
    assert capsys.readouterr().out == base + adapted
    typed = iter(["What is 3 plus 1?", "/lora", "/new", "What is 3 plus 1?", "/what", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", "--base", "base", "--max-new-tokens", "12", *lora]) == 0
    said = capsys.readouterr().out
    assert adapted in said and base in said and "(the adapter is off)" in said
    assert said.count("/quit leaves") == 2  # the greeting, and the answer to an unknown command
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    assert main(["chat", "--base", "base"]) == 0


@pytest.fixture
def asked(monkeypatch):
    """The conversations that the model is asked to go on with."""
    conversations = []

    def record(model, tokenizer, batch, **options):
        conversations.append([turn["content"] for turn in batch[0]])
        return ["Yes."]

    monkeypatch.setattr(module, "answer", record)
    return conversations


def type_in(monkeypatch, content, encoding, errors):
    stdin = io.TextIOWrapper(io.BytesIO(content), encoding=encoding, errors=errors)
    monkeypatch.setattr(sys, "stdin", stdin)


# As Python opens the standard input under a UTF-8 locale, and under C.
LOCALES = [("utf-8", "strict"), ("ascii", "surrogateescape")]


@pytest.mark.parametrize(("encoding", "errors"), LOCALES)
def test_half_a_character_is_asked_for_again_and_the_talk_goes_on(
    here, capsys, monkeypatch, asked, encoding, errors
):
    half = "好".encode()[:2]
    type_in(monkeypatch, b"one\n" + half + b"\ntwo \xff\nthree\n", encoding, errors)
    assert main(["chat", "--base", "base"]) == 0
    assert capsys.readouterr().out.count("half a character perhaps; type it again") == 2
    assert asked[1:] == [["one"], ["one", "Yes.", "three"]]  # the first checks the options


@pytest.mark.parametrize(("encoding", "errors"), LOCALES)
def test_chinese_arrives_whatever_the_locale(here, monkeypatch, asked, encoding, errors):
    type_in(monkeypatch, "你好\n".encode(), encoding, errors)
    assert main(["chat", "--base", "base"]) == 0
    assert asked[-1] == ["你好"]


def test_a_prompt_of_bytes(here, capsys, asked):
    """As an argument comes that is not of the locale's encoding."""
    prompt = "你好".encode().decode("ascii", "surrogateescape")
    assert main(["chat", "--base", "base", "--prompt", prompt]) == 0
    assert asked[-1] == ["你好"]
    assert main(["chat", "--base", "base", "--prompt", os.fsdecode(b"a\xe5")]) == 2
    assert "--prompt: that line is not whole UTF-8" in capsys.readouterr().err
