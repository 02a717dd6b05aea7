"""`minimind finetune --lora`: an adapter is trained on, not begun anew."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from tiny_cli import finetune

from lora_kernels import (
    apply_lora,
    load_lora,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    save_lora,
)
from minimind.cli import main
from minimind.model.checkpoint import load_model
from minimind.training.loop import Trainer


def adapter(here, path, **settings):
    """One with a B that is not zero, on modules that are not the default ones."""
    torch.manual_seed(3)
    model = load_model(here / "base")
    settings = {"rank": 4, "alpha": 6, "target_modules": ["wv", "wq"], **settings}
    apply_lora(model, verbose=False, **settings)
    for parameter in lora_parameters(model):
        torch.nn.init.normal_(parameter, std=0.02)
    save_lora(model, here / path)
    return model


def losses(here, run):
    rows = [json.loads(line) for line in (here / run / "metrics.jsonl").read_text().splitlines()]
    return {row["event"]: row["heldout_loss"] for row in rows if "event" in row}


@pytest.mark.parametrize("path", ["a.safetensors", "a.pth", "a"])
def test_it_starts_where_the_adapter_stands(here, capsys, path):
    scale = 1.0 if path == "a.pth" else 1.5  # a .pth does not say alpha
    source = adapter(here, path)
    assert finetune("--out", "o", "--lora", path, "--lr", "1e-9") == 0
    said = capsys.readouterr().out
    assert f"  adapter     {path}: rank 4, scale {scale:g}\n" in said
    assert said.count("apply lora on module") == 2
    assert json.loads((here / "o" / "run.json").read_text())["settings"]["lora"] == path
    trained = load_model(here / "base")
    load_lora(trained, here / "o" / "adapter.safetensors")
    assert {(x.rank, x.scale) for x in lora_layers(trained).values()} == {(4, scale)}
    for key, tensor in lora_state_dict(source).items():
        torch.testing.assert_close(lora_state_dict(trained)[key], tensor, rtol=0, atol=1e-6)


def test_two_runs_go_further_than_one(here):
    assert finetune("--out", "one") == 0
    assert finetune("--out", "two", "--lora", "one/adapter.safetensors") == 0
    one, two = losses(here, "one"), losses(here, "two")
    assert two["before"] == pytest.approx(one["after"], rel=1e-6)
    assert two["after"] < one["after"] < one["before"]


def test_a_runs_directory_stands_for_its_adapter(here, capsys):
    assert finetune("--out", "one") == 0
    assert finetune("--out", "two", "--lora", "one") == 0
    assert losses(here, "two")["before"] == pytest.approx(losses(here, "one")["after"], rel=1e-6)
    capsys.readouterr()
    said = []
    for path in ("two", "two/adapter.safetensors"):
        asked = [
            "chat",
            "--base",
            "base",
            "--lora",
            path,
            "--prompt",
            "你好",
            "--max-new-tokens",
            "3",
        ]
        assert main(asked) == 0
        said.append(capsys.readouterr().out)
    assert said[0] == said[1]
    assert main(["merge", "--base", "base", "--lora", "two", "--out", "merged"]) == 0
    (here / "two" / "adapter.safetensors").rename(here / "away.safetensors")
    (here / "two" / "adapter.safetensors").symlink_to(here / "away.safetensors")
    assert main(["chat", "--base", "base", "--lora", "two", "--prompt", "你好"]) == 2
    assert "is a link to" in capsys.readouterr().err


def test_dropout_is_this_runs(here):
    adapter(here, "a.safetensors", dropout=0.4)
    assert finetune("--out", "o", "--lora", "a.safetensors", "--dropout", "0.1") == 0
    model = load_model(here / "base")
    load_lora(model, here / "o" / "adapter.safetensors")
    assert {x.dropout for x in lora_layers(model).values()} == {0.1}


def test_an_interrupted_run_goes_on(here, monkeypatch):
    adapter(here, "a.safetensors")
    assert finetune("--out", "whole", "--lora", "a.safetensors") == 0
    step = Trainer._step

    def interrupted(self, *arguments):
        if self.step == 2:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert finetune("--out", "broken", "--lora", "a.safetensors") == 130
    assert main(["finetune", "--resume", "broken"]) == 0
    whole, broken = (
        torch.cat([t.flatten() for t in loaded(here, run).values()]) for run in ("whole", "broken")
    )
    assert torch.equal(whole, broken)


def loaded(here, run):
    model = load_model(here / "base")
    load_lora(model, here / run / "adapter.safetensors")
    return lora_state_dict(model)


REFUSED = {
    "another rank": (["--rank", "8"], "--rank 8 does not fit --lora a.safetensors, which has 4 on"),
    "another alpha": (["--alpha", "8"], "--alpha 8 does not fit --lora a.safetensors, which has 6"),
    "modules": (["--targets", "wq"], "--targets wq and --lora a.safetensors, which is on "),
    "no file": (["--lora", "b.safetensors"], "no adapter file at b.safetensors"),
    "another base": (["--lora", "wide.safetensors"], "does not fit the model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_before_anything_is_written(here, capsys, case):
    options, message = REFUSED[case]
    adapter(here, "a.safetensors")
    state = {f"layers.0.attention.wq.lora.{f}.weight": torch.ones(2, 2) for f in "AB"}
    save_file(state, here / "wide.safetensors")
    assert finetune("--out", "o", "--lora", "a.safetensors", *options) == 2
    assert message in capsys.readouterr().err
    assert not (here / "o").exists()


def test_what_agrees_may_be_said(here):
    adapter(here, "a.safetensors")
    assert finetune("--out", "o", "--lora", "a.safetensors", "--rank", "4", "--alpha", "6") == 0
