"""The work behind `minimind finetune` and `minimind sft`: train, compare, write down."""

from __future__ import annotations

import contextlib
import json
import platform
import shlex
import signal
import threading
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

from lora_kernels import __version__, explain, lora_layers, lora_state_dict, save_lora
from lora_kernels.adapters import write_atomically

from ..data.sft import SFTDataset
from ..data.tokenizer import TOKENIZER_DIRECTORY, save_tokenizer
from ..data.turns import TEXT, Sample
from ..files import staged
from ..model.checkpoint import save_model
from ..model.generate import answer
from ..model.transformer import MiniMindLM
from .loop import Progress, evaluate
from .prepare import ADAPTER, RESUME, RUN, Job
from .report import (
    ANSWERS,
    METRICS,
    PLOT,
    Report,
    Side,
    append,
    command_line,
    compare,
    plot_loss,
    program,
    read_metrics,
    written,
)

MOST_ANSWERED = 100


def run(job: Job) -> None:
    """Train a prepared job, evaluate before and after, and write the results.

    Of several processes all call it; the first prints and writes.

    Raises:
        TrainingError: the loss is not finite.
        KeyboardInterrupt: after a resume point has been written.
    """
    print(describe(job), flush=True)
    first = job.processes.first
    questions, expected = heldout_questions(job.heldout)
    prompts = [question[-1]["content"] for question in questions]
    try:
        before = job.resumed["before"] if job.resumed else look(job, questions, "before")
    except BaseException:
        with contextlib.suppress(OSError):
            job.out.rmdir()  # still empty: nobody need clean up after a run that never began
        raise
    metrics = job.out / METRICS
    if first:
        write_json(job.out / RUN, resolved(job))
        if not job.resumed:
            append(metrics, {"event": "before", **_losses(before)})
    every, trainer = job.settings.save_interval, job.trainer
    report = None
    if first:
        report = Report(job.out, trainer.step, trainer.total_steps, job.settings.log_interval)
    agreed = not job.processes.several

    try:
        with report or contextlib.nullcontext(), deferred_interrupt() as interrupted:

            def after_step(progress: Progress) -> None:
                nonlocal agreed
                if report is not None:
                    report.step(progress)
                if every and progress.step % every == 0:
                    save_resume_point(job, before)
                if job.processes.any(interrupted.is_set()):
                    agreed = True
                    raise KeyboardInterrupt

            trainer.run(after_step)
    except KeyboardInterrupt:
        if trainer.updating or not agreed:
            print("\nstopped within a step; the last resume point, if there is one, stands")
            raise
        save_resume_point(job, before)
        launcher = job.processes.launcher(program())
        again = f"{launcher} {job.command} --resume {shlex.quote(str(job.out))}"
        again += " --parallel fsdp" if job.processes.sharded else ""
        print(f"\nstopped; go on with: {again}")
        raise
    save_weights(job)
    after = look(job, questions, "after")
    if first:
        write_results(job, prompts, expected, before, after)


def write_results(
    job: Job,
    prompts: list[str],
    expected: list[str],
    before: dict[str, Any],
    after: dict[str, Any],
) -> None:
    """Write what the run came to, print it, and take the resume point away."""
    metrics = job.out / METRICS
    append(metrics, {"event": "after", **_losses(after)})
    for row in zip(prompts, expected, before["answers"], after["answers"], strict=True):
        append(
            job.out / ANSWERS,
            dict(zip(("prompt", "expected", "before", "after"), row, strict=True)),
        )
    (job.out / RESUME).unlink(missing_ok=True)
    plot_loss(read_metrics(metrics), job.out / PLOT, f"minimind {job.command}: {job.settings.data}")
    print("\nbefore -> after")
    print(compare(Side(**before), Side(**after), prompts, expected))
    print(closing(job))


@contextlib.contextmanager
def deferred_interrupt() -> Iterator[threading.Event]:
    """Note the first Ctrl-C instead of raising, so that no optimizer step is cut in two.

    The second one raises at once.
    """
    noted = threading.Event()

    def note(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        noted.set()

    if threading.current_thread() is not threading.main_thread():
        yield noted  # only the main thread may set handlers, and only it gets Ctrl-C
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def describe(job: Job) -> str:
    """What is about to happen, as text."""
    cpu = f" ({torch.get_num_threads()} threads)"
    gpu = f" ({torch.cuda.get_device_name(job.device)})" if job.device.type == "cuda" else ""
    weights = next(job.model.parameters()).dtype
    config, settings, train = job.model.config, job.settings, job.train
    name = str(job.dtype).removeprefix("torch.")
    total = sum(p.numel() for p in job.model.parameters())
    trained = sum(p.numel() for p in job.trainer.parameters)
    left = f", {train.cut} cut at {train.max_length} tokens" if train.cut else ""
    left += f", {train.dropped} left out (nothing to learn in them)" if train.dropped else ""
    lines = [
        f"minimind {job.command}",
        f"  device      {job.device}{gpu or cpu}",
        f"  dtype       {name}"
        + ("" if job.dtype == weights else f" products, {str(weights)[6:]} weights"),
        f"  base        {settings.base or ('shipped' if job.lora else 'random')} "
        f"({'' if config.era == '2025-02' else config.era + ', '}"
        f"dim {config.dim}, {config.n_layers} layers{', MoE' if config.use_moe else ''})",
        f"  data        {settings.data}: {len(train):,} {_of_form(train.form)}, "
        f"{sum(train.lengths):,} tokens{left}",
        f"  held out    {len(job.heldout) if job.heldout else 'nothing (fewer than 20 samples)'}",
        f"  steps       {job.trainer.total_steps:,} ({settings.epochs} epochs)",
    ]
    if settings.base not in (None, "random") and job.tokenizer.name_or_path == str(
        TOKENIZER_DIRECTORY
    ):
        lines.insert(4, "  tokenizer   shipped: none beside the base (--tokenizer names another)")
    if job.lora:
        first: Any = job.model.get_submodule(job.adapted[0])
        # Of a sharded layer the parts stand in for the plain tensors that FSDP gathers for a call.
        tensors = (first.weight, first.weight, first.lora.A.weight, first.lora.B.weight)
        path = explain([t.to_local() for t in tensors] if job.processes.sharded else first)
        lines.insert(3, f"  path        {path}")
        if settings.lora is not None:
            lines.insert(4, f"  adapter     {settings.lora}: {_ranks(job)}")
        lines += [f"apply lora on module: {name}" for name in job.adapted]
        lines.append(
            f"parameters: {total:,} in all, {trained:,} of them LoRA ({trained / total:.2%})"
        )
    else:
        lines.append(f"parameters: {total:,}, all trained")
    if job.processes.several:
        lines.insert(2, f"  processes   {job.processes.size} ({job.processes.strategy})")
    return "\n".join(lines)


def _of_form(form: str) -> str:
    """What samples of a form are called, and the form where that does not say it."""
    plain = {"conversations": "conversations", TEXT: "texts"}
    return plain.get(form, f"conversations (read as {form})")


def _ranks(job: Job) -> str:
    layers = lora_layers(job.model).values()
    ranks = ", ".join(map(str, sorted({layer.rank for layer in layers})))
    return f"rank {ranks}, scale {', '.join(f'{s:g}' for s in sorted({x.scale for x in layers}))}"


def closing(job: Job) -> str:
    """Where the results are and what to do next, as text."""
    records = written(job.out, RUN, METRICS, ANSWERS, PLOT)
    if not job.lora:
        return (
            f"\nwrote {job.out}/: model.safetensors, config.json, tokenizer, {records}\n"
            f"next:  {command_line('chat', '--base', job.out)}"
        )
    if job.settings.base == "random":
        return f"\nwrote {job.out}/: {ADAPTER}, for the random weights of this run alone"
    options = ["--base", job.settings.base] if job.settings.base else []
    options += ["--tokenizer", job.settings.tokenizer] if job.settings.tokenizer else []
    adapter = job.out / ADAPTER
    return (
        f"\nwrote {job.out}/: {ADAPTER} ({adapter.stat().st_size / 1024:.0f} KiB), {records}\n"
        f"next:  {command_line('chat', *options, '--lora', adapter, '--compare')}"
    )


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
    print(f"evaluating {when} training ...", flush=True)

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
            save_lora(job.model, job.out / ADAPTER)
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


def save_resume_point(job: Job, before: dict[str, Any]) -> None:
    """Write all that an unbroken continuation needs. Of several processes, all call it."""
    weights = lora_state_dict(job.model) if job.lora else job.model.state_dict()
    state = {
        "weights": job.processes.whole(weights),
        "trainer": job.trainer.state_dict(),
        "before": before,
    }
    if job.processes.first:
        write_atomically(job.out / RESUME, lambda temporary: torch.save(state, temporary))
