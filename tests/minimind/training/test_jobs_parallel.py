"""The `minimind` command in several processes: one run, one voice, and an end for everybody."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT
from safetensors.torch import load_file
from tiny_cli import finetune, talk, write
from tiny_minimind import one_thread  # noqa: F401 - as in the processes; acts by itself
from tiny_processes import in_processes

from minimind import load_model
from minimind.cli import main
from minimind.training import jobs
from minimind.training.loop import Trainer

RESULTS = ["adapter.safetensors", "answers.jsonl", "loss.png", "metrics.jsonl", "run.json"]
CLOSE = {"rtol": 1e-4, "atol": 1e-6}  # float32 sums in another order, after some Adam steps


@pytest.fixture
def uneven(here):
    """28 conversations to learn: batches of 5 end in 3, which 2 processes cannot share evenly."""
    write("data.jsonl", [talk(f"What is {i} plus 1?", f"It is {i + 1}.") for i in range(31)])
    return here


OPTIONS = ("--batch-size", "5", "--accumulation-steps", "2", "--log-interval", "1", "--epochs", "1")


def metrics(directory):
    """Each row's step or event, and its other values by name."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    names = [row.pop("event", row.get("step")) for row in rows]
    return names, [{k: v or 0 for k, v in r.items() if k != "tokens_per_second"} for r in rows]


def assert_same_run(ours, theirs):
    """Of two output directories: the same files, curve, answers and weights."""
    assert sorted(p.name for p in ours.iterdir()) == RESULTS
    (names, rows), (expected_names, expected) = metrics(ours), metrics(theirs)
    assert names == expected_names and rows == [pytest.approx(row, rel=1e-5) for row in expected]
    assert (ours / "answers.jsonl").read_text() == (theirs / "answers.jsonl").read_text()
    found, wanted = (load_file(directory / "adapter.safetensors") for directory in (ours, theirs))
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        # Of a gradient next to nothing Adam takes the sign and little else, which float32 sums in
        # another order decide: so it goes for a few elements, and not for the whole.
        near = torch.isclose(found[name], tensor, **CLOSE).double().mean()
        assert near >= 0.99, f"{name}: {near:.2%} of its elements are close"
        off = (found[name] - tensor).norm() / tensor.norm()
        assert off <= CLOSE["rtol"], f"{name}: off by {off:.1e} of its norm"


def finetune_watched(strategy, *options):
    """`finetune`, in which nobody but the first process may write."""
    if os.environ["RANK"] != "0":
        writers = ["write_rows", "write_json", "write_atomically", "write_results", "Report"]
        for name in writers + ["save_lora"] * (strategy == "ddp"):  # sharded, it gathers
            setattr(jobs, name, None)
    return finetune("--parallel", strategy, *options)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_it_is_the_run_of_one_process(uneven, capsys, strategy):
    assert finetune("--out", "one", *OPTIONS) == 0
    alone = capsys.readouterr().out
    first, second = in_processes(
        finetune_watched, strategy, "--out", "two", "--save-interval", "1", *OPTIONS
    )
    assert (first.result, second.result) == (0, 0)
    assert "3/3" in first.err and (second.out, second.err) == ("", "")
    expected = alone.replace("one/", "two/").splitlines()
    expected.insert(2, f"  processes   2 ({strategy})")
    assert first.out.splitlines() == expected
    assert_same_run(uneven / "two", uneven / "one")
    run = json.loads((uneven / "two" / "run.json").read_text())
    assert run["processes"] == {"count": 2, "parallel": strategy}


def test_sft_of_a_sharded_model_writes_all_of_it(uneven):
    sft = ["sft", "--base", "base", "--data", "data.jsonl", "--dtype", "float32", *OPTIONS]
    assert main([*sft, "--out", "one"]) == 0
    in_processes(main, [*sft, "--out", "two", "--parallel", "fsdp"])
    ours, theirs = (load_file(Path(d) / "model.safetensors") for d in ("two", "one"))
    # Stored in bfloat16: an element in the last place of float32 may round the other way.
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)
    assert load_model(uneven / "two").config.dim == 64
    names = [sorted(p.name for p in Path(d).iterdir()) for d in ("two", "one")]
    assert names[0] == names[1]


def own_arguments(arguments, changed):
    """`finetune`, the second process with arguments of its own."""
    return finetune(*(changed if os.environ["RANK"] == "1" else arguments))


def test_a_mistake_is_said_once_and_ends_all(uneven):
    for arguments, words in (
        (("--data", "nowhere.jsonl"), "minimind finetune: no data file at nowhere.jsonl"),
        (("--batch-size", "1"), "--batch-size 1 is divided among 2 processes; give each"),
        (("--lr", "1e30", "--grad-clip", "0"), "the loss is nan"),
    ):
        first, second = in_processes(finetune, "--out", "o", *arguments, check=False)
        assert (first.result, second.code) == (2, 2)
        assert words in first.err and second.err == ""
    assert not (uneven / "o" / "adapter.safetensors").exists()


def test_a_mistake_of_one_is_everybodys(uneven):
    write("other.jsonl", [talk("What is 1 plus 1?", "Two, I think.")] * 31)
    for changed, words in (
        ("nowhere.jsonl", "process 1 of 2: no data file at nowhere.jsonl"),
        ("other.jsonl", "process 1 of 2 reads other data"),
    ):
        ended = in_processes(
            own_arguments, ("--out", "o"), ("--out", "o", "--data", changed), check=False
        )
        assert (ended[0].result, ended[1].code) == (2, 2)
        assert words in ended[0].err and ended[1].err == ""
        assert not (uneven / "o").exists()


def test_fsdp_needs_several_processes(here, capsys):
    assert finetune("--parallel", "fsdp", "--out", "o") == 2
    assert "spreads the model over several processes and there is one" in capsys.readouterr().err
    assert not (here / "o").exists()


def burst(strategy):
    """`finetune`, in which the second process fails within its third step."""
    step = Trainer._step

    def failing(self, *arguments):
        if self.step == 2 and self.processes.rank == 1:
            raise MemoryError("not a byte left")
        return step(self, *arguments)

    Trainer._step = failing
    return finetune("--out", "o", "--parallel", strategy)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_that_fails_leaves_nobody_waiting(here, strategy):
    first, second = in_processes(burst, strategy, check=False, timeout=60)
    assert second.code == 1 and "MemoryError: not a byte left" in second.err
    assert first.code == 1  # gloo tells it that the other one has gone; torchrun would end it
    assert not (here / "o" / "adapter.safetensors").exists()


def interrupted(*options):
    """`finetune`, in which Ctrl-C reaches the second process alone, within its third step."""
    step = Trainer._step

    def stepping(self, *arguments):
        if self.step == 2 and self.processes.rank == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *arguments)

    Trainer._step = stepping
    return finetune("--out", "broken", *options)


@pytest.mark.parametrize(("strategy", "then"), [("ddp", "alone"), ("fsdp", "ddp"), ("ddp", "fsdp")])
def test_an_interrupted_run_goes_on_under_any_strategy(uneven, strategy, then):
    options = (*OPTIONS, "--epochs", "2")
    assert finetune("--out", "whole", *options) == 0
    first, second = in_processes(interrupted, "--parallel", strategy, *options)
    assert (first.result, second.result) == (130, 130)
    again = "torchrun --nproc-per-node 2 -m minimind finetune --resume broken"
    again += " --parallel fsdp" * (strategy == "fsdp")
    assert f"go on with: {again}\n" in first.out
    assert torch.load("broken/resume.pt", weights_only=True)["trainer"]["step"] == 3
    if then == "alone":
        assert main(["finetune", "--resume", "broken"]) == 0
    else:
        in_processes(main, ["finetune", "--resume", "broken", "--parallel", then])
    assert_same_run(uneven / "broken", uneven / "whole")


def test_torchrun(uneven):
    assert finetune("--out", "one", *OPTIONS) == 0
    environment = {
        "PYTHONPATH": str(ROOT),
        "PATH": os.environ["PATH"],
        "OMP_NUM_THREADS": "1",
    }
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command = ["finetune", "--base", "base", "--data", "data.jsonl", "--dtype", "float32"]
    run = subprocess.run(
        [*torchrun, "--standalone", "-m", "minimind", *command, "--lr", "0.01", *OPTIONS, "--out",
         "two"],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("minimind finetune\n") == 1 and "processes   2 (ddp)" in run.stdout
    assert "Warning" not in run.stderr and "warn" not in run.stderr.lower()
    assert_same_run(uneven / "two", uneven / "one")
