"""`minimind chat`."""

from __future__ import annotations

from tiny_cli import finetune

from minimind.cli import main


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
