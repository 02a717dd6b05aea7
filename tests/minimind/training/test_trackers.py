"""Metrics reported to TensorBoard and Weights & Biases, by stand-ins for both."""

from __future__ import annotations

import importlib
import importlib.util
import json
import types
from pathlib import Path

import pytest
from tiny_cli import finetune

from minimind.cli import main
from minimind.training import jobs
from minimind.training.trackers import Trackers, parse_trackers


class Written:
    """What a stand-in was told; one for all that are made of it."""

    def __init__(self):
        self.made, self.scalars, self.texts, self.closed = [], [], [], 0

    def writer(self, folder, purge_step=None):
        self.made.append((folder, purge_step))
        Path(folder).mkdir(exist_ok=True)
        (Path(folder) / "events").write_text("some")
        return self

    def init(self, **more):
        self.made.append(more)
        return self

    def add_text(self, name, text):
        self.texts.append((name, text))

    def add_scalar(self, name, value, step):
        self.scalars.append((step, name, value))

    def log(self, values, step):
        self.scalars += [(step, name, value) for name, value in values.items()]

    def close(self):
        self.closed += 1

    finish = close


@pytest.fixture
def stand_ins(monkeypatch):
    """Both packages as if they were installed."""
    found = {"tensorboard": Written(), "wandb": Written()}
    real_spec, real_import = importlib.util.find_spec, importlib.import_module
    modules = {
        "torch.utils.tensorboard": types.SimpleNamespace(SummaryWriter=found["tensorboard"].writer),
        "wandb": types.SimpleNamespace(init=found["wandb"].init),
    }
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *m: name in found or real_spec(name, *m)
    )
    monkeypatch.setattr(
        importlib, "import_module", lambda name, *m: modules.get(name) or real_import(name, *m)
    )
    return found


def losses(here, out="o"):
    rows = [json.loads(line) for line in (here / out / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "step" in row], rows[0], rows[-1]


def test_both_are_told_what_the_records_say(here, stand_ins):
    options = ["--report-to", "tensorboard,wandb", "--log-interval", "2"]
    assert finetune("--out", "o", *options) == 0
    trained, before, after = losses(here)
    for name, told in stand_ins.items():
        assert [(step, v) for step, key, v in told.scalars if key == "loss"] == trained
        ends = [(step, v) for step, key, v in told.scalars if key == "heldout_loss"]
        last = trained[-1][0]
        assert ends == [(0, before["heldout_loss"]), (last, after["heldout_loss"])], name
        assert not [key for _, key, _ in told.scalars if key in ("step", "event")]
        assert told.closed == 1
    assert stand_ins["tensorboard"].made == [("o/tensorboard", None)]
    assert "settings" in stand_ins["tensorboard"].texts[0][0]
    (made,) = stand_ins["wandb"].made
    assert made["dir"] == "o" and made["config"]["settings"]["report_to"] == "tensorboard,wandb"


def test_a_run_that_goes_on_tells_its_steps_once(here, stand_ins, monkeypatch):
    real = jobs.save_resume_point

    def save(job, before, report):
        saved = real(job, before, report)
        if job.trainer.step == 4:
            raise KeyboardInterrupt
        return saved

    monkeypatch.setattr(jobs, "save_resume_point", save)
    options = ["--report-to", "tensorboard", "--log-interval", "2", "--save-interval", "4"]
    finetune("--out", "o", *options)
    told = stand_ins["tensorboard"]
    assert told.closed == 1
    monkeypatch.setattr(jobs, "save_resume_point", real)
    assert main(["finetune", "--resume", "o"]) == 0
    assert told.made == [("o/tensorboard", None), ("o/tensorboard", 5)]
    assert [(step, v) for step, key, v in told.scalars if key == "loss"] == losses(here)[0]
    assert len([key for _, key, _ in told.scalars if key == "heldout_loss"]) == 2


def test_a_tracker_that_fails_stops_nothing(here, stand_ins, monkeypatch, capsys):
    def fail(*arguments, **more):
        raise ConnectionError("no network")

    monkeypatch.setattr(stand_ins["wandb"], "log", fail)
    assert finetune("--out", "o", "--report-to", "wandb", "--log-interval", "2") == 0
    said = capsys.readouterr().err
    assert said.count("nothing more is reported to wandb") == 1 and "no network" in said
    assert len(losses(here)[0]) > 2


def test_one_that_cannot_begin_leaves_the_other(stand_ins, tmp_path):
    def fail(**more):
        raise PermissionError("no account")

    warned = []
    importlib.import_module("wandb").init = fail
    trackers = Trackers(["wandb", "tensorboard"], warned.append)
    trackers.start(tmp_path, {}, 0)
    trackers.log(1, {"loss": 2.0})
    trackers.close()
    trackers.close()
    assert len(warned) == 1 and "no account" in warned[0]
    told = stand_ins["tensorboard"]
    assert told.scalars == [(1, "loss", 2.0)] and told.closed == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("tensorboard", "needs the package tensorboard; install it with: pip install tensorboard"),
        ("wandb", "needs the package wandb; install it with: pip install wandb"),
        ("mlflow", "must name tensorboard or wandb, or both with a comma between, got 'mlflow'"),
        (",wandb", "must name tensorboard or wandb, or both with a comma between, got ''"),
    ],
)
def test_what_is_not_there_is_refused(monkeypatch, names, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"--report-to .*{message}"):
        parse_trackers(names)


def test_it_is_refused_before_anything_is_written(here, capsys):
    assert finetune("--out", "o", "--report-to", "mlflow") == 2
    assert "--report-to must name" in capsys.readouterr().err and not (here / "o").exists()


def test_neither_is_the_default():
    assert parse_trackers(None) == parse_trackers("") == []


def test_what_a_killed_run_told_tensorboard_does_not_hold_its_place(here, stand_ins):
    assert finetune("--out", "o", "--report-to", "tensorboard", "--epochs", "1") == 0
    for name in ("adapter.safetensors", "answers.jsonl", "loss.png"):
        (here / "o" / name).unlink()
    assert finetune("--out", "o", "--epochs", "1") == 0
    assert not (here / "o" / "tensorboard").exists()
