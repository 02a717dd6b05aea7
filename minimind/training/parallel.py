"""One run over several processes, as ``torchrun`` starts them.

It is the run that one process would make. Each process reads every batch and takes its share of
the rows; gradients and losses are summed, weighted by what they are means over. So the schedule,
the curve and the results are those of one process, up to the order of sums, and nobody can be left
waiting by data that does not divide evenly. Two things are each process's own: dropout's draws, and
the balancing loss of experts where it is not a mean over sequences (``seq_aux`` false).

``ddp`` keeps the whole model in each process. ``fsdp`` keeps a part in each, gathers one block at a
time, and computes each block's activations anew in the backward pass: under autocast they hold
copies of the gathered weights, which would add up to the model that did not fit.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lora_kernels.adapters import cut_like, is_sharded, whole

Value = TypeVar("Value")

# Held to the end. Where a DDP model has the last reference, torch frees the group while it holds
# Python's lock, and waits for the group's threads, which may be waiting for the lock.
_groups: list[Any] = []


@dataclass(frozen=True)
class Processes:
    """The processes of a run and this one's place among them; by default it is alone.

    Methods that exchange something say so; every process must call those, in the same order.

    Args:
        rank: this process, from 0; the first one prints and writes.
        size: how many there are.
        local_rank: this process among those of its machine.
        strategy: ``ddp`` or ``fsdp``; of no meaning to a process alone.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    strategy: str = "ddp"

    @property
    def first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        """Whether there are others."""
        return self.size > 1

    @property
    def sharded(self) -> bool:
        """Whether each process holds a part of the model only."""
        return self.several and self.strategy == "fsdp"

    def launcher(self, program: str) -> str:
        """What to type to start ``program`` this way again."""
        if not self.several:
            return program
        return f"torchrun --nproc-per-node {self.size} -m minimind"

    def check(self, batch_size: int) -> None:
        """Raise ValueError where the processes and what was asked of them do not fit."""
        if self.strategy == "fsdp" and not self.several:
            raise ValueError(
                "--parallel fsdp spreads the model over several processes and there is one; start "
                "with torchrun --nproc-per-node N -m minimind, or leave the option out"
            )
        if batch_size < self.size:
            raise ValueError(
                f"--batch-size {batch_size} is divided among {self.size} processes; give each at "
                "least one conversation, or start fewer"
            )

    def place(self, device: torch.device) -> torch.device:
        """The device of this process: on machines with GPUs, the one of its local rank.

        Raises:
            ValueError: there is none for it, or ``device`` is one certain GPU.
        """
        if self.several and device.type == "mps":
            raise ValueError(
                f"{self.size} processes cannot share Apple's GPU, whose tensors torch does not "
                "send between them; use one process, or --device cpu"
            )
        if not self.several or device.type != "cuda":
            return device
        count = torch.cuda.device_count()
        if device.index is not None:
            raise ValueError(
                f"device {device} is one GPU for {self.size} processes; use --device cuda"
            )
        if self.local_rank >= count:
            raise ValueError(
                f"this machine has {count} CUDA GPUs and more processes; each needs its own: start "
                f"with torchrun --nproc-per-node {count}, or use --device cpu"
            )
        device = torch.device("cuda", self.local_rank)
        torch.cuda.set_device(device)
        return device

    def seed(self, seed: int) -> None:
        """Give each process draws of its own; the first keeps those that it has."""
        if not self.first:
            torch.manual_seed(seed + self.rank)

    # --- exchanges --------------------------------------------------------------------------------

    def gather(self, value: Value) -> list[Value]:
        """What each process passed, by rank. An exchange."""
        if not self.several:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum(self, *values: float) -> tuple[float, ...]:
        """The sums over the processes, in float64 and the same everywhere. An exchange."""
        if not self.several:
            return values
        sums = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(sums)
        return tuple(sums.tolist())

    def any(self, flag: bool) -> bool:
        """Whether any process passed true. An exchange."""
        return self.sum(float(flag))[0] > 0

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make an error of one process inside the ``with`` an error of all: nobody is left waiting.

        The end of it is an exchange; there must be none inside.

        Raises:
            ValueError: another process failed; the message is that one's.
        """
        if not self.several:
            yield
            return
        error = None
        try:
            yield
        except Exception as raised:
            error = raised
        failures = self.gather(None if error is None else str(error) or repr(error))
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise ValueError(f"process {rank} of {self.size}: {failure}")

    # --- the model and its batches ----------------------------------------------------------------

    def spread(self, model: Any, device: torch.device) -> nn.Module:
        """``model`` on ``device``, ready to train with the others: what is to be called.

        Args:
            model: a MiniMindLM on the CPU, the same in every process; of FSDP, which moves and
                shards it in place block by block, it is returned itself.
        """
        if not self.several:
            return model.to(device)
        # Imported here: a process alone would wait half a second for what it does not need.
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel

        if not self.sharded:
            model.to(device)
            return DistributedDataParallel(
                model, device_ids=[device] if device.type == "cuda" else None
            )
        checkpoint = getattr(
            model, "activation_checkpointing_enable", model.gradient_checkpointing_enable
        )
        checkpoint({"use_reentrant": False})
        mesh = init_device_mesh(device.type, (self.size,))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model

    def rows(self, batch: Sequence[Tensor]) -> tuple[list[Tensor], int]:
        """This process's rows of a batch's tensors, and how many of them count.

        Where there are fewer rows than processes, the others take the first row, of which they
        count none: all must take part in the exchanges of forward and backward.
        """
        if not self.several:
            return list(batch), len(batch[0])
        counted = len(range(self.rank, len(batch[0]), self.size))
        rows = slice(self.rank, None, self.size) if counted else slice(0, 1)
        return [tensor[rows] for tensor in batch], counted

    def accumulating(self, model: nn.Module, more: bool) -> contextlib.AbstractContextManager[Any]:
        """Around forward and backward: no exchange of gradients while ``more`` are to be added.

        FSDP exchanges them each time, or it would have to hold whole gradients.
        """
        if more and self.several and not self.sharded:
            return model.no_sync()  # type: ignore[operator]
        return contextlib.nullcontext()

    def whole(self, state: Any) -> Any:
        """A nested ``state`` with its sharded tensors gathered, on the CPU. An exchange under FSDP.

        Only the first process, which writes it, keeps their values.
        """
        if isinstance(state, dict):
            return {key: self.whole(value) for key, value in state.items()}
        if isinstance(state, list):
            return [self.whole(value) for value in state]
        if not (isinstance(state, Tensor) and is_sharded(state)):
            return state
        gathered = whole(state.detach())
        return gathered.cpu() if self.first else torch.empty(0)


ALONE = Processes()


def sharded_like(optimizer: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimizer's whole ``state_dict()`` with its tensors sharded as ``parameters`` are."""
    state = {
        index: {
            name: cut_like(parameters[index], value)
            if is_sharded(parameters[index]) and value.shape == parameters[index].shape
            else value
            for name, value in values.items()
        }
        for index, values in optimizer["state"].items()
    }
    return {**optimizer, "state": state}


@contextlib.contextmanager
def join(strategy: str = "ddp") -> Iterator[Processes]:
    """The processes that ``torchrun`` started with this one, or this one alone.

    What the others would print to standard output, the first one prints.
    """
    size = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if size == 1:
        yield Processes(strategy=strategy)
        return
    # Both: tensors on the CPU carry what the processes have to say to each other.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    _groups.append(dist.group.WORLD)
    processes = Processes(dist.get_rank(), size, int(os.environ["LOCAL_RANK"]), strategy)
    with contextlib.ExitStack() as stack:
        if not processes.first:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield processes
    # Not after an error: leaving is an exchange too, and somebody may not come.
    dist.destroy_process_group()
