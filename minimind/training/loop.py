"""The one training loop: schedule, accumulation, clipping, mixed precision, resume points.

It knows nothing of LoRA: which parameters learn, and what is saved, are arguments.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lora_kernels.adapters import whole

from ..data.sft import LengthGroupedBatches, SFTDataset
from ..settings import TrainingConfig
from .bad_steps import refuse_other_moments, samples_in_words
from .parallel import ALONE, Processes, sharded_like

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


# Skipped in a row, this many steps are no accident; float16's scale would have fallen to nothing.
MOST_SKIPPED = 50


class TrainingError(ValueError):
    """Training cannot go on; the message says why and what to change.

    Of several processes, all raise it or none.
    """


@dataclass(frozen=True)
class Progress:
    """What one optimizer step tells.

    ``loss`` and ``aux_loss`` are means over its supervised tokens; ``tokens`` counts all that the
    model read, padding included. ``skipped`` says that the parameters were left as they were,
    ``scale`` is what float16's losses are multiplied by.
    """

    step: int
    total_steps: int
    epoch: int
    loss: float
    aux_loss: float
    lr: float
    tokens: int
    seconds: float
    skipped: bool = False
    scale: float | None = None


def learning_rate(step: int, total_steps: int, lr: float, warmup_steps: int = 0) -> float:
    """MiniMind's cosine: from ``1.1·lr`` down to ``lr/10`` at ``total_steps``.

    Args:
        step: optimizer steps done with this one, from 1.
        total_steps: steps of the whole run.
        lr: peak rate; the first step of a long run takes 1.1 times as much, as MiniMind's does.
        warmup_steps: the curve is multiplied by ``step / warmup_steps`` up to there.
    """
    cosine = lr / 10 + lr / 2 * (1 + math.cos(math.pi * step / total_steps))
    return cosine * min(1.0, step / warmup_steps) if warmup_steps else cosine


def steps_per_epoch(dataset: SFTDataset, config: TrainingConfig) -> int:
    """Optimizer steps an epoch, the shorter window at its end included."""
    batches = math.ceil(len(dataset) / config.batch_size)
    return math.ceil(batches / config.accumulation_steps)


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it faster than float32, else float32.

    On Apple's GPUs that depends on chip and system, so that float32 stays unless asked otherwise.
    """
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "cpu":
        # Conversions without instructions for it cost more than they save.
        flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        if any(flags.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16")):
            return torch.bfloat16
    return torch.float32


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[Any]:
    """Mixed precision in ``dtype``; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype)


def make_loader(
    dataset: SFTDataset, batches: LengthGroupedBatches, num_workers: int = 0
) -> DataLoader[Any]:
    """Batches ``(X, Y, loss_mask)``, ``[B, longest]`` int64 each."""
    return DataLoader(
        dataset,
        batch_sampler=batches,  # type: ignore[arg-type]
        num_workers=num_workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # of its own: the loader would draw from the global one
    )


class Trainer:
    """The loop and everything that a resume point must hold.

    Args:
        model: called with ``(X, labels=Y, loss_mask=…)``, gives ``.loss`` (mean over supervised
            tokens) and ``.aux_loss``; already on ``device``.
        parameters: what AdamW updates.
        dataset: the samples.
        config: how.
        device, dtype: where, and the autocast dtype (float32: none). float16 scales the loss.
        processes: those that share the work; ``model`` is then what `Processes.spread` returned.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Sequence[nn.Parameter],
        dataset: SFTDataset,
        config: TrainingConfig,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        processes: Processes = ALONE,
    ) -> None:
        self.processes = processes
        self.model, self.parameters, self.config = model, list(parameters), config
        self.dataset, self.device, self.dtype = dataset, device, dtype
        self.batches = LengthGroupedBatches(dataset.lengths, config.batch_size, config.seed)
        self.loader = make_loader(dataset, self.batches, config.num_workers)
        self.steps_per_epoch = steps_per_epoch(dataset, config)
        self.total_steps = self.steps_per_epoch * config.epochs
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.step = 0
        self.updating = False  # while true, the parameters are between two steps
        self.draws = False  # whether the steps have drawn random numbers
        self.skipped, self._in_a_row = 0, 0  # steps that left the parameters as they were
        # Of the moment before an unfinished step, which a resumed run does again.
        self._rng_before: dict[str, Tensor] | None = None

    def run(self, after_step: Callable[[Progress], None] | None = None) -> None:
        """Train from the current step to the end, calling ``after_step`` after each.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.model.train()
        first_epoch, done = divmod(self.step, self.steps_per_epoch)
        for epoch in range(first_epoch, self.config.epochs):
            self.batches.set_epoch(epoch)
            for index, window in enumerate(self._windows()):
                if epoch == first_epoch and index < done:
                    continue
                progress = self._step(window, epoch)
                if after_step is not None:
                    after_step(progress)

    def _windows(self) -> Iterator[list[list[Tensor]]]:
        window: list[list[Tensor]] = []
        for batch in self.loader:
            window.append(batch)
            if len(window) == self.config.accumulation_steps:
                yield window
                window = []
        if window:
            yield window

    def _step(self, window: list[list[Tensor]], epoch: int) -> Progress:
        start = time.perf_counter()
        self._rng_before = before = self._rng()
        lr = learning_rate(
            self.step + 1, self.total_steps, self.config.lr, self.config.warmup_steps
        )
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        # The mean over the tokens of the window, whatever their share of each batch.
        supervised = sum(int(mask[:, 1:].sum()) for _, _, mask in window)
        loss = torch.zeros((), device=self.device)
        aux_loss = torch.zeros((), device=self.device)
        for index, batch in enumerate(window):
            rows, counted = self.processes.rows(batch)
            share = int(rows[2][:, 1:].sum()) / supervised if counted else 0.0
            aux_share = counted / len(batch[0])
            # Only out of pinned memory, which is CUDA's, may a copy be left to itself.
            pinned = self.device.type == "cuda"
            x, y, mask = (t.to(self.device, non_blocking=pinned) for t in rows)
            with self.processes.accumulating(self.model, more=index + 1 < len(window)):
                with autocast(self.device, self.dtype):
                    output = self.model(x, labels=y, loss_mask=mask)
                    part = output.loss * share
                    aux_part = output.aux_loss * aux_share / len(window)
                # The processes' gradients are averaged, the sum is wanted.
                self.scaler.scale((part + aux_part) * self.processes.size).backward()
            loss += part.detach()
            aux_loss += aux_part.detach()
        self.draws |= any(not torch.equal(before[name], now) for name, now in self._rng().items())
        self.scaler.unscale_(self.optimizer)
        limit = self.config.grad_clip or math.inf
        norm = whole(nn.utils.clip_grad_norm_(self.parameters, limit)).item()
        mean_loss, mean_aux_loss = self.processes.sum(loss.item(), aux_loss.item())
        # The scaler of float16 expects overflowing gradients now and then, and skips the update.
        finite_gradient = math.isfinite(norm) or self.scaler.is_enabled()
        bad = not (math.isfinite(mean_loss) and finite_gradient)
        if bad and not self.config.skip_bad_steps:
            raise TrainingError(
                f"the loss is {mean_loss}, its gradient's norm {norm} at step {self.step + 1}; "
                f"lower lr (now {self.config.lr:g}), clip harder, or use float32; the step read "
                f"{self._samples(window)}; the weights are those of step {self.step}"
            )
        self.updating = True
        scale = self.scaler.get_scale()
        if not bad:
            self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = bad or self.scaler.get_scale() < scale
        self.skipped += skipped
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._rng_before = None
        self.updating = False
        if self._in_a_row >= MOST_SKIPPED:
            raise TrainingError(
                f"{self._in_a_row} steps in a row were skipped, up to step {self.step}, since "
                "their loss or gradient was not finite; lower lr, or use float32 or bfloat16"
            )
        return Progress(
            step=self.step,
            total_steps=self.total_steps,
            epoch=epoch + 1,
            loss=mean_loss,
            aux_loss=mean_aux_loss,
            lr=lr,
            tokens=sum(x.numel() for x, _, _ in window),
            seconds=time.perf_counter() - start,
            skipped=skipped,
            scale=self.scaler.get_scale() if self.scaler.is_enabled() else None,
        )

    def _samples(self, window: list[list[Tensor]]) -> str:
        first = self.step % self.steps_per_epoch * self.config.accumulation_steps
        batches = itertools.islice(self.batches, first, first + len(window))
        numbers = [number for batch in batches for number in batch]
        rows = [] if self.processes.several else [r for b in window for r in zip(*b, strict=True)]
        with autocast(self.device, self.dtype):
            return samples_in_words(self.model, numbers, rows, self.device)

    def state_dict(self) -> dict[str, Any]:
        """All that, with the parameters, makes a resumed run equal an unbroken one.

        Of several processes, all must call it; the first one's is the one to keep.
        """
        mine, *others = self.processes.gather(self._rng_before or self._rng())
        return {
            "step": self.step,
            "total_steps": self.total_steps,
            "data": self.dataset.fingerprint(),
            "optimizer": self.processes.whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "draws": self.draws,
            "skipped": self.skipped,
            "others": others,
            **mine,
        }

    def _rng(self) -> dict[str, Tensor]:
        state = {"rng": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda_rng"] = torch.cuda.get_rng_state(self.device)
        elif self.device.type == "mps":
            state["mps_rng"] = torch.mps.get_rng_state()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up a run where `state_dict` left it.

        With as many processes as then, the same bits follow; with another number the same curve, up
        to the order of sums, unless the steps draw random numbers.

        Raises:
            TrainingError: the state is of a run on other data, with another number of steps, or
                with dropout and another number of processes.
        """
        if state["data"] != self.dataset.fingerprint():
            raise TrainingError(
                "the training data is not what the unfinished run had; bring it back or start anew"
            )
        if state["total_steps"] != self.total_steps:
            raise TrainingError(
                f"the resume point is of a run of {state['total_steps']} steps, this one has "
                f"{self.total_steps}; resume with the same data and settings"
            )
        draws, others = state.get("draws", True), state.get("others", [])
        size, rank = self.processes.size, self.processes.rank
        if draws and len(others) + 1 != size:
            raise TrainingError(
                f"the resume point is of a run of {len(others) + 1} processes with dropout, which "
                f"{size} would draw differently; resume with {len(others) + 1}"
            )
        self.step, self.draws, self.skipped = state["step"], draws, state.get("skipped", 0)
        refuse_other_moments(state["optimizer"], self.optimizer, self.parameters)
        self.optimizer.load_state_dict(sharded_like(state["optimizer"], self.parameters))
        self.scaler.load_state_dict(state["scaler"])
        if rank > len(others):
            return  # one more than there were: its own seed is as good
        rng = others[rank - 1] if rank else state
        torch.set_rng_state(rng["rng"])
        if "cuda_rng" in rng and self.device.type == "cuda":
            torch.cuda.set_rng_state(rng["cuda_rng"], self.device)
        if "mps_rng" in rng and self.device.type == "mps":
            torch.mps.set_rng_state(rng["mps_rng"])


@torch.no_grad()
def evaluate(
    model: nn.Module,
    dataset: SFTDataset,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 32,
    processes: Processes = ALONE,
) -> float:
    """Mean cross entropy per supervised token of ``dataset``, in nats; leaves the mode as it was.

    Several processes share the batches, and all must call this; each gets the same mean.

    Raises:
        TrainingError: the loss is not finite.
    """
    training = model.training
    model.eval()
    order = sorted(range(len(dataset)), key=dataset.lengths.__getitem__)
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    losses, counts = [0.0] * len(batches), [0.0] * len(batches)
    try:
        for start in range(0, len(batches), processes.size):
            # Who is left over in the last round does its last batch too: all must take part.
            index = min(start + processes.rank, len(batches) - 1)
            batch = dataset.__getitems__(batches[index])
            x, y, mask = (torch.stack(t).to(device) for t in zip(*batch, strict=True))
            tokens = int(mask[:, 1:].sum())
            with autocast(device, dtype):
                loss = model(x, labels=y, loss_mask=mask).loss.item() * tokens
            if index == start + processes.rank:
                losses[index], counts[index] = loss, float(tokens)
    finally:
        model.train(training)
    total = 0.0
    for loss in processes.sum(*losses):
        total += loss
    if not math.isfinite(total):
        raise TrainingError("the model's loss is not finite; its weights may be damaged")
    return total / sum(processes.sum(*counts))
