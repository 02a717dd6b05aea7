"""The `minimind` command where it is killed, stopped, or cannot write."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from killed import killed_at
from places import ROOT
from safetensors.torch import load_file
from tiny_cli import finetune, talk, write
from tiny_minimind import one_thread  # noqa: F401 - children by fork want one; acts by itself

from minimind.cli import main
from minimind.files import hold, release
from minimind.training import jobs
from minimind.training.loop import Trainer

RESULTS = ["adapter.safetensors", "answers.jsonl", "loss.png", "metrics.jsonl", "run.json"]
FULL = OSError(errno.ENOSPC, "No space left on device")


def records(directory):
    rows = [json.loads(x) for x in Path(directory, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]


def assert_same_run(ours, theirs):
    assert sorted(p.name for p in Path(ours).iterdir()) == RESULTS
    assert records(ours) == records(theirs)
    assert Path(ours, "answers.jsonl").read_text() == Path(theirs, "answers.jsonl").read_text()
    found, wanted = (load_file(Path(d, "adapter.safetensors")) for d in (ours, theirs))
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], t) for name, t in wanted.items())


OPTIONS = ("--log-interval", "4", "--save-interval", "5", "--epochs", "1")  # seven steps


def test_killed_at_any_write_a_run_goes_on_or_begins_anew(here, capsys):
    write("data.jsonl", [talk(f"What is {i} plus 1?", f"It is {i + 1}.") for i in range(31)])
    assert finetune("--out", "whole", *OPTIONS) == 0
    resumed = anew = 0
    for count in range(1, 200, 2):
        out = f"o/{count}"
        if not killed_at(count, here / "o", finetune, "--out", out, *OPTIONS):
            break
        if Path(out, "resume.pt").exists():
            assert main(["finetune", "--resume", out]) == 0, count
            resumed += 1
        elif not Path(out, "adapter.safetensors").exists():
            assert finetune("--out", out, *OPTIONS) == 0, count
            anew += 1
        assert_same_run(out, "whole")
    assert resumed > 5 and anew > 5
    assert_same_run(out, "whole")


def signalled(patch, step, signum):
    real = Trainer._step

    def stepping(self, *arguments):
        if self.step == step:
            os.kill(os.getpid(), signum)
        return real(self, *arguments)

    patch.setattr(Trainer, "_step", stepping)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_a_signal_ends_the_step_and_the_run_resumes(here, monkeypatch, capsys, name, code):
    assert finetune("--out", "whole", "--log-interval", "4") == 0
    before = signal.getsignal(getattr(signal, name))
    with monkeypatch.context() as patch:
        signalled(patch, 5, getattr(signal, name))
        assert finetune("--out", "o", "--log-interval", "4") == code
    assert signal.getsignal(getattr(signal, name)) == before
    by = "" if name == "SIGINT" else f" by {name}"
    assert f"stopped{by}; go on with: minimind finetune --resume o" in capsys.readouterr().out
    assert torch.load("o/resume.pt", weights_only=True)["trainer"]["step"] == 6
    assert [row.get("step") for row in records("o")] == [None, 4, 6]
    assert main(["finetune", "--resume", "o"]) == 0
    assert_same_run("o", "whole")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_signal_in_evaluation(here, monkeypatch, capsys, when):
    assert finetune("--out", "whole", *OPTIONS) == 0
    look = jobs.look

    def looking(job, questions, moment):
        if moment == when:
            os.kill(os.getpid(), signal.SIGTERM)
        return look(job, questions, moment)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "look", looking)
        assert finetune("--out", "o", *OPTIONS) == 143
    said = capsys.readouterr().out
    if when == "before":
        assert "stopped (SIGTERM) before training began" in said and not Path("o").exists()
        return
    assert "stopped by SIGTERM after training; the last resume point stands, go on with" in said
    assert torch.load("o/resume.pt", weights_only=True)["trainer"]["step"] == 7
    assert main(["finetune", "--resume", "o"]) == 0
    assert_same_run("o", "whole")


def test_an_ignored_hangup_stays_ignored(here, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        signalled(monkeypatch, 3, signal.SIGHUP)
        assert finetune("--out", "o", *OPTIONS) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def full_for(patch, name, times=1):
    """Let the writing of ``name`` fail for want of room, so many times."""
    real, failed = jobs.write_atomically, 0

    def writing(path, write):
        nonlocal failed
        if path.name == name and failed < times:
            failed += 1
            raise FULL
        return real(path, write)

    patch.setattr(jobs, "write_atomically", writing)
    patch.setattr("minimind.training.report.write_atomically", writing)
    patch.setattr("lora_kernels.adapters.storage.write_atomically", writing)


def test_a_failed_resume_point_does_not_end_the_run(here, monkeypatch, capsys):
    assert finetune("--out", "whole", *OPTIONS) == 0
    full_for(monkeypatch, "resume.pt", times=9)
    assert finetune("--out", "o", *OPTIONS) == 0
    said = capsys.readouterr().err
    assert "no resume point of step 5 could be written ([Errno 28] No space left" in said
    assert_same_run("o", "whole")


def test_a_disk_that_fills_up_within_a_point_is_called_full(here, monkeypatch, capsys):
    def filling(state, file):
        try:
            raise FULL
        finally:  # as torch does, whose archive must be ended
            raise RuntimeError("unexpected pos 704 vs 598")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.torch, "save", filling)
        assert finetune("--out", "o", *OPTIONS) == 0
    said = capsys.readouterr().err
    assert "step 5 could be written ([Errno 28] No space left on device); there is no" in said
    assert sorted(p.name for p in Path("o").iterdir()) == RESULTS


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("adapter.safetensors", "the trained weights"),
        ("answers.jsonl", "the results"),
        ("loss.png", "the results"),
    ],
)
def test_what_cannot_be_saved_is_said_and_saved_later(here, monkeypatch, capsys, name, what):
    assert finetune("--out", "whole", *OPTIONS) == 0
    with monkeypatch.context() as patch:
        full_for(patch, name)
        assert finetune("--out", "o", *OPTIONS) == 2
    said = capsys.readouterr().err
    assert f"minimind finetune: {what} could not be written to o ([Errno 28] No space" in said
    assert "go on with: minimind finetune --resume o" in said and "Traceback" not in said
    assert main(["finetune", "--resume", "o"]) == 0
    assert_same_run("o", "whole")


@pytest.mark.parametrize("act", ["deleted", "renamed"])
def test_a_directory_that_goes_away_is_made_anew(here, monkeypatch, capsys, act):
    assert finetune("--out", "whole", *OPTIONS) == 0
    real = Trainer._step

    def stepping(self, *arguments):
        if self.step in (3, 6):
            Path("o").rename(f"away-{act}-{self.step}")
        return real(self, *arguments)

    monkeypatch.setattr(Trainer, "_step", stepping)
    assert finetune("--out", "o", *OPTIONS) == 0
    assert (
        "o was moved or deleted while the run used it; it is made anew" in capsys.readouterr().err
    )
    assert_same_run("o", "whole")


def test_an_unwritable_out_is_said_before_anything_is_evaluated(here, monkeypatch, capsys):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("minimind.training.directory.tempfile.TemporaryFile", refused)
    assert finetune("--out", "o") == 2
    said = capsys.readouterr()
    assert "nothing can be written in o ([Errno 13] Permission denied); choose" in said.err
    assert "evaluating" not in said.out


def test_a_run_that_is_going_on_is_not_disturbed(here, capsys):
    Path("o").mkdir()
    Path("o/run.json").write_text("{}")
    lock = hold(here / "o")
    assert finetune("--out", "o") == 2
    assert "a run is going on in o; wait for it" in capsys.readouterr().err
    release(lock)
    assert Path("o/run.json").read_text() == "{}"
    assert finetune("--out", "o", "--epochs", "1") == 0
    assert "had ended before its first resume point; it begins anew" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["notes.txt", "resume.pt", "adapter.safetensors"])
def test_what_is_not_left_by_a_dead_run_is_kept(here, capsys, name):
    Path("o").mkdir()
    for each in ("run.json", name):
        Path("o", each).write_text("mine")
    assert finetune("--out", "o") == 2
    assert "nothing was overwritten" in capsys.readouterr().err
    assert Path("o/run.json").read_text() == "mine"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full")
def test_a_full_standard_output(here):
    environment = {"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"}
    start = [sys.executable, "-m", "minimind"]
    training = ["finetune", "--base", "base", "--data", "data.jsonl", "--epochs", "1", "--out", "o"]
    for command, code, words in (
        (["info"], 1, "minimind info: [Errno 28] No space left on device\n"),
        (training, 0, "training"),
    ):
        with open("/dev/full", "w") as full:
            done = subprocess.run(
                [*start, *command], env=environment, stdout=full, stderr=subprocess.PIPE, text=True
            )
        assert done.returncode == code and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert sorted(p.name for p in Path("o").iterdir()) == RESULTS


def test_bfloat16_without_instructions_for_it_is_warned_of(here, monkeypatch, capsys):
    for best, warned in ((torch.float32, True), (torch.bfloat16, False)):
        monkeypatch.setattr("minimind.training.prepare.best_dtype", lambda device, b=best: b)
        assert finetune("--out", f"o{warned}", "--dtype", "bfloat16", "--epochs", "1") == 0
        said = capsys.readouterr().err
        assert ("--dtype auto takes float32 here" in said) == warned
    assert finetune("--out", "p", "--epochs", "1") == 0  # float32
    assert "warning" not in capsys.readouterr().err


def test_a_killed_sft_leaves_no_part_of_a_model_and_goes_on(here, capsys):
    command = [
        "sft",
        "--base",
        "base",
        "--data",
        "data.jsonl",
        "--dtype",
        "float32",
        "--batch-size",
    ]
    command = [*command, "4", *OPTIONS, "--out"]
    assert main([*command, "whole"]) == 0
    expected = {p.name for p in Path("whole").iterdir()}
    taken = 0
    for count in range(20, 200, 5):
        out = f"o/{count}"
        died = killed_at(count, here / "o", main, [*command, out])
        if Path(out, "model.safetensors").exists():
            taken += died
            assert Path(out, "tokenizer.json").exists() and Path(out, "config.json").exists()
        if Path(out, "resume.pt").exists():
            assert main(["sft", "--resume", out]) == 0
        elif died and not Path(out, "model.safetensors").exists():
            assert main([*command, out]) == 0
        assert {p.name for p in Path(out).iterdir()} == expected
        ours, theirs = (load_file(Path(d, "model.safetensors")) for d in (out, "whole"))
        assert all(torch.equal(ours[name], t) for name, t in theirs.items())
        if not died:
            break
    assert taken > 2 and not died
