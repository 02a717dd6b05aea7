"""The work behind `minimind finetune` and `minimind sft`: train, compare, write down."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import signal
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError

from lora_kernels import __version__, lora_state_dict, save_lora
from lora_kernels.adapters import write_atomically

from ..data.sft import SFTDataset
from ..data.tokenizer import save_tokenizer
from ..data.turns import Sample
from ..files import release, staged
from ..model.checkpoint import ADAPTER_NAME, save_model
from ..model.generate import answer
from ..model.transformer import MiniMindLM
from .describing import closing, describe
from .directory import RESUME, RUN
from .loop import Progress, TrainingError, evaluate
from .prepare import Job
from .report import (
    ANSWERS,
    PLOT,
    Report,
    Side,
    compare,
    plot_loss,
    program,
    say,
    warn,
    write_rows,
)
from .stopping import Stop, Stopped, stoppable
from .trackers import Trackers

MOST_ANSWERED = 100
# torch's writer raises RuntimeError, safetensors' its own, where the system says OSError.
DISK_ERRORS = (OSError, RuntimeError, SafetensorError)


def run(job: Job) -> None:
    """Train a prepared job, evaluate before and after, and write the results.

    Of several processes all call it; the first prints and writes.

    Raises:
        TrainingError: the loss is not finite, or the outcome cannot be written.
        Stopped: by Ctrl-C, SIGTERM or SIGHUP, after a resume point has been written.
    """
    try:
        with stoppable() as stop, contextlib.closing(Trackers(job.trackers, warn)) as trackers:
            _run(job, stop, trackers)
    finally:
        release(job.lock)


def _run(job: Job, stop: Stop, trackers: Trackers) -> None:
    say(describe(job))
    questions, expected = heldout_questions(job.heldout)
    prompts = [question[-1]["content"] for question in questions]
    try:
        before = job.resumed["before"] if job.resumed else look(job, questions, "before")
    except BaseException as error:
        with contextlib.suppress(OSError):
            job.out.rmdir()  # still empty: nobody need clean up after a run that never began
        if isinstance(error, KeyboardInterrupt):
            say(f"\nstopped ({error}) before training began")
        raise
    every, trainer = job.settings.save_interval, job.trainer
    report = None
    with _outcome(job, "run.json"):
        if job.processes.first:
            write_json(job.out / RUN, resolved(job))
    if job.processes.first:
        total, interval = trainer.total_steps, job.settings.log_interval
        records = _records(job, before)
        report = Report(job.out, trainer.step, total, interval, *records, told=trackers.log)
        trackers.start(job.out, resolved(job), trainer.step)
        if not job.resumed:
            trackers.log(0, _losses(before))
    agreed = not job.processes.several

    try:
        with report or contextlib.nullcontext(), stop.deferred():

            def after_step(progress: Progress) -> None:
                nonlocal agreed
                if report is not None:
                    report.step(progress)
                if every and progress.step % every == 0:
                    save_resume_point(job, before, report)
                if job.processes.any(stop.signum != 0):
                    signum = max(job.processes.gather(stop.signum))
                    agreed = True
                    raise Stopped(signum)

            trainer.run(after_step)
    except TrainingError as error:
        raise TrainingError(f"{error}; {_left(job)}") from None
    except KeyboardInterrupt as error:
        if trainer.updating or not agreed:
            say("\nstopped within a step; the last resume point, if there is one, stands")
            raise
        saved = save_resume_point(job, before, report)
        say(f"\nstopped{_by(error)}; " + (f"go on with: {_again(job)}" if saved else _left(job)))
        raise
    try:
        if every and trainer.total_steps % every:
            save_resume_point(job, before, report)  # what follows can be done again
        with _outcome(job, "the trained weights"):
            save_weights(job)
        after = look(job, questions, "after")
        with _outcome(job, "the results"):
            if report is not None:
                write_results(job, prompts, expected, before, after, report)
        trackers.log(trainer.step, _losses(after))
    except KeyboardInterrupt as error:
        say(f"\nstopped{_by(error)} after training; {_left(job)}")
        raise
    if job.processes.first:
        say("\nbefore -> after")
        say(compare(Side(**before), Side(**after), prompts, expected))
        say(closing(job))


def write_results(
    job: Job,
    prompts: list[str],
    expected: list[str],
    before: dict[str, Any],
    after: dict[str, Any],
    report: Report,
) -> None:
    """Write what the run came to, each file whole, and at last take the resume point away."""
    if not (job.out / RUN).is_file():
        write_json(job.out / RUN, resolved(job))
    names = ("prompt", "expected", "before", "after")
    rows = list(zip(prompts, expected, before["answers"], after["answers"], strict=True))
    if rows:
        write_rows(job.out / ANSWERS, (dict(zip(names, row, strict=True)) for row in rows))
    report.rows.append({"event": "after", **_losses(after)})
    report.write()
    plot_loss(report.rows, job.out / PLOT, f"minimind {job.command}: {job.settings.data}")
    (job.out / RESUME).unlink(missing_ok=True)


def _records(job: Job, before: dict[str, Any]) -> tuple[list[dict[str, Any]], list[Progress]]:
    """The records of metrics.jsonl up to where the run stands, and the steps since the last."""
    if not job.resumed:
        return [{"event": "before", **_losses(before)}], []
    state = job.resumed["report"]
    return state["rows"], [Progress(**step) for step in state["pending"]]


def _by(error: KeyboardInterrupt) -> str:
    by = getattr(error, "signum", signal.SIGINT)
    return "" if by == signal.SIGINT else f" by {signal.Signals(by).name}"


def _again(job: Job) -> str:
    launcher = job.processes.launcher(program())
    again = f"{launcher} {job.command} --resume {shlex.quote(str(job.out))}"
    return again + (" --parallel fsdp" if job.processes.sharded else "")


def _left(job: Job) -> str:
    """What can be done with what is on the disk."""
    if (job.out / RESUME).is_file():
        return f"the last resume point stands, go on with: {_again(job)}"
    return "there is no resume point"


@contextlib.contextmanager
def _outcome(job: Job, what: str) -> Iterator[None]:
    """Say what could not be written, and how to go on. An exchange.

    Raises:
        TrainingError: in every process.
    """
    try:
        with job.processes.together():
            try:
                yield
            except DISK_ERRORS as error:
                raise TrainingError(
                    f"{what} could not be written to {job.out} ({_reason(error)}); make room "
                    f"there, or make it writable; {_left(job)}"
                ) from error
    except ValueError as error:
        if isinstance(error, TrainingError) or not job.processes.several:
            raise
        raise TrainingError(str(error)) from None  # what another process says


def heldout_questions(heldout: SFTDataset | None) -> tuple[list[Sample], list[str]]:
    """How the held-out conversations open, up to the first question, and the answers to those.

    A system turn and tools are part of the opening. Texts ask nothing; answers that are calls, or
    not to be learnt, are no answers to expect.
    """
    questions, expected = [], []
    for sample in heldout.conversations if heldout else []:
        begin = int(sample[0]["role"] == "system")
        opening, told = sample[: begin + 1], sample[begin + 1 : begin + 2]
        roles = [turn["role"] for turn in (*opening[begin:], *told)]
        called = told and "tool_calls" in told[0]
        if roles == ["user", "assistant"] and not called and begin + 1 not in sample.unlearnt:
            questions.append(Sample(opening, sample.place, sample.form, sample.tools))
            expected.append(told[0]["content"])
    return questions[:MOST_ANSWERED], expected[:MOST_ANSWERED]


def look(job: Job, questions: list[Sample], when: str) -> dict[str, Any]:
    """Losses of the model as it is now, and its answers to ``questions``: a Side as a dictionary.

    The processes share the losses. Each gives all the answers, in the very batches of one process:
    other ones would round otherwise, and a greedy answer can hang on the last bit.
    """
    say(f"evaluating {when} training ...")

    def loss(dataset: SFTDataset | None) -> float | None:
        if dataset is None:
            return None
        return evaluate(job.model, dataset, job.device, job.dtype, processes=job.processes)

    sharded = job.processes.sharded
    answers = answer(job.model, job.tokenizer, questions, synced=sharded) if questions else []
    return asdict(Side(loss(job.heldout), loss(job.base_heldout), answers))


def _losses(side: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in side.items() if name.endswith("loss")}


def resolved(job: Job) -> dict[str, Any]:
    """The settings as they came out, and what they ran on."""
    shape = {"processes": {"count": job.processes.size, "parallel": job.processes.strategy}}
    return {
        "command": job.command,
        "settings": asdict(job.settings),
        "device": str(job.device),
        "dtype": str(job.dtype).removeprefix("torch."),
        "adapted": job.adapted,
        "steps": job.trainer.total_steps,
        **(shape if job.processes.several else {}),
        "versions": {
            "lora_kernels": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` to ``path``, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def save_weights(job: Job) -> None:
    """Write what was trained: the adapter alone, or the model with its tokenizer."""
    if job.lora:
        if job.processes.first or job.processes.sharded:
            save_lora(job.model, job.out / ADAPTER_NAME)
        return
    model = job.model
    if job.processes.sharded:
        state = job.processes.whole(model.state_dict())
        with torch.device("meta"):
            model = MiniMindLM(model.config)
        if job.processes.first:
            model.load_state_dict(state, assign=True)
            model.tie_weights()
    if job.processes.first:
        with staged(job.out) as stage:
            save_model(model, stage, torch.bfloat16)
            save_tokenizer(job.tokenizer, stage)


def save_resume_point(job: Job, before: dict[str, Any], report: Report | None) -> bool:
    """Write all that an unbroken continuation needs. Of several processes, all call it.

    Returns:
        Whether it was written; a warning has been printed where not.
    """
    weights = lora_state_dict(job.model) if job.lora else job.model.state_dict()
    state = {
        "weights": job.processes.whole(weights),
        "trainer": job.trainer.state_dict(),
        "before": before,
    }
    if report is None:
        return True
    state["report"] = report.state_dict()
    try:
        if not (job.out / RUN).is_file():
            warn(f"{job.out} was moved or deleted while the run used it; it is made anew")
            write_json(job.out / RUN, resolved(job))
            report.write()
        write_atomically(job.out / RESUME, lambda temporary: _save(state, temporary))
    except DISK_ERRORS as error:
        step, reason = job.trainer.step, _reason(error)
        warn(f"no resume point of step {step} could be written ({reason}); {_left(job)}")
        return False
    return True


def _save(state: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # given a path, torch says of a full disk "unexpected pos"
        torch.save(state, file)


def _reason(error: BaseException) -> BaseException:
    """What the system said, where torch's own error came of it."""
    return error.__context__ if isinstance(error.__context__, OSError) else error
