"""The `minimind` command on a tiny model: what it writes and what it says."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file
from tiny_cli import finetune, make_base, talk, write

from lora_kernels import load_lora, lora_state_dict
from minimind import load_model, load_tokenizer
from minimind.cli import main
from minimind.data.tokenizer import save_tokenizer
from minimind.settings import Settings
from minimind.training.loop import Trainer
from minimind.training.prepare import load_base

RESULTS = ["adapter.safetensors", "answers.jsonl", "loss.png", "metrics.jsonl", "run.json"]


def test_finetune_writes_its_results_and_says_where(here, capsys):
    base_bytes = (here / "base" / "model.safetensors").read_bytes()
    assert finetune("--out", "o", "--log-interval", "3", "--rank", "4", "--alpha", "8") == 0
    said = capsys.readouterr()
    assert sorted(p.name for p in (here / "o").iterdir()) == RESULTS
    assert (here / "base" / "model.safetensors").read_bytes() == base_bytes
    for words in (
        "device      cpu",
        "dtype       float32\n",
        "path        reference: x is on cpu",
        "data        data.jsonl: 27 conversations",
        "held out    3\n",
        "apply lora on module: layers.0.attention.wq\n",
        "apply lora on module: layers.0.attention.wo\n",
        "1,024 of them LoRA",
        "held-out loss ",
        "> What is",
        "before: ",
        "after: ",
        "wrote o/",
        "next:  minimind chat --base base --lora o/adapter.safetensors --compare",
    ):
        assert words in said.out, words
    for words in ("loss ", "lr ", "tokens/s", "14/14"):
        assert words in said.err, words
    adapter = load_file(here / "o" / "adapter.safetensors")
    assert sum(t.numel() for t in adapter.values()) == 1024
    rows = [json.loads(line) for line in (here / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("step", r.get("event")) for r in rows] == ["before", 3, 6, 9, 12, 14, "after"]
    assert rows[-1]["heldout_loss"] < rows[0]["heldout_loss"]
    run = json.loads((here / "o" / "run.json").read_text())
    assert run["settings"]["rank"] == 4 and run["settings"]["lr"] == 0.01
    assert run["dtype"] == "float32" and run["adapted"][0] == "layers.0.attention.wq"
    answers = [json.loads(line) for line in (here / "o" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and set(answers[0]) == {"prompt", "expected", "before", "after"}


def test_without_out_the_next_free_directory_is_taken(here):
    for expected in ("out/data-1", "out/data-2"):
        assert finetune("--epochs", "1") == 0
        assert (here / expected / "adapter.safetensors").exists()


def test_options_reach_the_run(here, capsys):
    assert finetune(
        "--out", "o", "--targets", "w1,attention.wv", "--dropout", "0.1", "--accumulation-steps",
        "2", "--epochs", "1", "--max-length", "38", "--seed", "3",
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "apply lora on module: layers.0.attention.wv\n" in said
    assert "apply lora on module: layers.0.feed_forward.w1\n" in said
    assert "steps       4 (1 epochs)" in said and "cut at 38 tokens" in said


@pytest.mark.parametrize("options", [[], ["--use-moe"]], ids=["dense", "moe"])
def test_a_random_base(here, capsys, options):
    code = finetune("--base", "random", "--dim", "64", "--n-layers", "1", "--out", "o", *options)
    assert code == 0
    assert ("MoE" in capsys.readouterr().out) == bool(options)


def test_an_interrupted_run_resumes_to_the_same_bits(here, monkeypatch, capsys):
    options = ("--dropout", "0.2", "--log-interval", "1")
    assert finetune("--out", "whole", *options) == 0
    step = Trainer._step

    def interrupted(self, *arguments):
        if self.step == 9:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert finetune("--out", "broken", *options) == 130
    assert "go on with: minimind finetune --resume broken" in capsys.readouterr().out
    assert not (here / "broken" / "adapter.safetensors").exists()
    assert main(["finetune", "--resume", "broken"]) == 0
    whole, broken = (load_file(here / d / "adapter.safetensors") for d in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    rows = [
        json.loads(line) for line in (here / "broken" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows if "step" in r] == list(range(1, 15))
    assert sorted(p.name for p in (here / "broken").iterdir()) == RESULTS


def test_ctrl_c_waits_for_the_step_and_the_run_resumes(here, monkeypatch, capsys):
    assert finetune("--out", "whole") == 0
    step = Trainer._step

    def interrupted(self, *arguments):
        if self.step == 5:
            os.kill(os.getpid(), signal.SIGINT)  # within the sixth step, which is finished
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert finetune("--out", "broken") == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.load(here / "broken" / "resume.pt", weights_only=True)["trainer"]["step"] == 6
    assert main(["finetune", "--resume", "broken"]) == 0
    whole, broken = (load_file(here / d / "adapter.safetensors") for d in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_resume_refuses_other_data_and_damaged_runs(here, monkeypatch, capsys):
    def stop(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop)
        assert finetune("--out", "o") == 130
    data, run = (here / "data.jsonl").read_text(), (here / "o" / "run.json").read_text()
    (here / "data.jsonl").write_text(data.replace("It is", "It was"))
    assert main(["finetune", "--resume", "o"]) == 2
    assert "not what the unfinished run had" in capsys.readouterr().err
    (here / "data.jsonl").write_text(data)
    (here / "o" / "run.json").write_text(run.replace('"rank": 16', '"rank": 8'))
    assert main(["finetune", "--resume", "o"]) == 2
    assert "cannot be resumed" in capsys.readouterr().err
    (here / "o" / "run.json").write_text(run[:50])
    assert main(["finetune", "--resume", "o"]) == 2
    assert "damaged" in capsys.readouterr().err
    (here / "o" / "run.json").write_text(run)
    assert main(["sft", "--resume", "o"]) == 2
    assert "a run of `minimind finetune`" in capsys.readouterr().err
    assert main(["finetune", "--resume", "o"]) == 0
    assert main(["finetune", "--resume", "o"]) == 2
    assert "that run is finished" in capsys.readouterr().err


def test_a_run_that_never_began_leaves_nothing(here, monkeypatch):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("minimind.training.jobs.evaluate", stop)
    assert finetune("--out", "o") == 130
    assert not (here / "o").exists()


def test_a_weight_file_as_base_brings_its_folders_tokenizer(here, capsys):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "quiet")
    save_tokenizer(tokenizer, here / "base")
    assert finetune("--base", "base/model.safetensors", "--dim", "64", "--out", "o$1$") == 0
    assert "next:  minimind chat --base base/model.safetensors" in capsys.readouterr().out
    _, tokenizer = load_base(Settings(base="base/model.safetensors"))
    assert "quiet" in tokenizer.chat_template


def test_a_terminal_without_chinese_gets_question_marks(here):
    write("data.jsonl", [talk(f"{i}加一等于几？", f"等于{i + 1}。") for i in range(30)])
    run = subprocess.run(
        [sys.executable, "-m", "minimind", "finetune", "--base", "base", "--data", "data.jsonl",
         "--epochs", "1", "--out", "o"],
        env={"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii", "PATH": ""},
        capture_output=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert b"> " in run.stdout and b"???" in run.stdout


def test_a_resume_point_is_written_on_the_way(here, monkeypatch):
    def stop(self, *arguments):
        if self.step == 8:
            raise SystemError("the machine died")
        return step(self, *arguments)

    step = Trainer._step
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Trainer, "_step", stop)
        finetune("--out", "o", "--save-interval", "5")
    state = torch.load(here / "o" / "resume.pt", weights_only=True)
    assert state["trainer"]["step"] == 5
    assert main(["finetune", "--resume", "o"]) == 0


def test_sft_trains_a_whole_model_that_chat_takes(here, capsys):
    assert main(
        ["sft", "--data", "data.jsonl", "--dim", "64", "--n-layers", "1", "--epochs", "1",
         "--out", "m", "--dtype", "float32"]
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "all trained" in said and "next:  minimind chat --base m" in said
    model = load_model(here / "m")
    assert model.config.dim == 64
    stored = load_file(here / "m" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert main(["chat", "--base", "m", "--prompt", "hello", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("base> ")


def test_a_loss_that_is_not_finite_stops_the_run(here, capsys):
    assert finetune("--out", "o", "--lr", "1e30", "--epochs", "5", "--grad-clip", "0") == 2
    said = capsys.readouterr().err
    assert "lower lr" in said and "the step read " in said
    assert "; there is no resume point" in said
    assert not (here / "o" / "adapter.safetensors").exists()


def test_an_adapter_of_another_model_is_refused(here, capsys):
    assert finetune("--out", "o") == 0
    make_base(here / "thin", dim=32)
    capsys.readouterr()
    assert main(["chat", "--base", "thin", "--lora", "o/adapter.safetensors"]) == 2
    assert "expected [16, 32], found [16, 64]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "sft", "chat", "merge", "export", "info"])
def test_help_is_there(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    said = capsys.readouterr().out
    assert f"usage: minimind {command}" in said
    for option in re.split(r"\n  (?=-)", said):
        assert option.count("(default:") <= 1, option


def test_ctrl_c_while_torch_is_imported_ends_in_silence(monkeypatch, capsys):
    class Interrupting:
        def find_spec(self, name, *_):
            if name == "minimind.training.loop":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "minimind.training.loop")
    monkeypatch.setattr(sys, "meta_path", [Interrupting(), *sys.meta_path])
    try:
        code = main(["info"])
    except KeyboardInterrupt:  # which would end pytest
        pytest.fail("it came out")
    assert code == 130 and capsys.readouterr().err == ""


def test_the_walkthroughs_options_are_all_there(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    said = capsys.readouterr().out
    names = """data out base tokenizer epochs batch-size lr warmup-steps accumulation-steps
        grad-clip max-length rank alpha dropout targets device dtype num-workers log-interval
        skip-bad-steps save-interval seed resume dim n-layers use-moe"""
    for name in names.split():
        assert f"--{name} " in said, name


def test_lora_state_is_all_that_changes(here):
    assert finetune("--out", "o") == 0
    model = load_model(here / "base")
    before = {name: p.clone() for name, p in model.named_parameters()}
    load_lora(model, here / "o" / "adapter.safetensors")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any(t.abs().max() > 0 for n, t in lora_state_dict(model).items() if ".B." in n)
