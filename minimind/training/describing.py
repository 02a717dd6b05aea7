"""What a run says of itself: what is about to happen, and where the results are."""

from __future__ import annotations

from typing import Any

import torch

from lora_kernels import explain, lora_layers

from ..data.sft import SFTDataset
from ..data.tokenizer import TOKENIZER_DIRECTORY
from ..data.turns import TEXT
from ..model.checkpoint import ADAPTER_NAME
from .directory import RUN
from .prepare import Job
from .report import ANSWERS, METRICS, PLOT, command_line, written


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
        f"{train.tokens:,} tokens{left}",
        *_skipped(train),
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


def _skipped(train: SFTDataset) -> list[str]:
    """What to say of rows that were passed over."""
    count, first = train.skipped.count, train.skipped.first
    said = [f"  skipped     {count:,} rows that cannot be used; the first:"] if count else []
    return said + [f"              {message}" for _, message in first]


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
    if skipped := job.trainer.skipped:
        records += (
            f"\n{skipped} of {job.trainer.total_steps} steps were skipped: their loss or gradient "
            "was not finite"
        )
    if not job.lora:
        return (
            f"\nwrote {job.out}/: model.safetensors, config.json, tokenizer, {records}\n"
            f"next:  {command_line('chat', '--base', job.out)}"
        )
    if job.settings.base == "random":
        return f"\nwrote {job.out}/: {ADAPTER_NAME}, for the random weights of this run alone"
    options = ["--base", job.settings.base] if job.settings.base else []
    options += ["--tokenizer", job.settings.tokenizer] if job.settings.tokenizer else []
    adapter = job.out / ADAPTER_NAME
    return (
        f"\nwrote {job.out}/: {ADAPTER_NAME} ({adapter.stat().st_size / 1024:.0f} KiB), {records}\n"
        f"next:  {command_line('chat', *options, '--lora', adapter, '--compare')}"
    )
