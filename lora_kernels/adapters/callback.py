"""The adapter beside every checkpoint that transformers' Trainer writes.

Imported when `LoRACallback` is first asked for: the package does not need transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback

from ..linear.factors import DEFAULT
from .reading import beside
from .sharding import is_sharded
from .storage import save_lora
from .surgery import lora_parameters


class LoRACallback(TrainerCallback):
    """Saves the adapter into each ``checkpoint-<step>`` and, at the end, into ``output_dir``.

    ``Trainer(model, args, …, callbacks=[LoRACallback()])``. What Trainer itself saves is the model
    with A and B as further tensors, which says nothing of alpha; `load_lora` takes the directory
    of either kind, and this file first.

    Args:
        name: of the file (``.safetensors`` or ``.pth``), or without a suffix of a directory in
            PEFT's format. By default ``lora.safetensors``, or ``lora.<adapter>.safetensors`` of an
            adapter that has a name: `load_lora` finds these by itself, of another give it the path.
        adapter: the name of the one that is saved; of several give a callback for each.

    Raises:
        ValueError: at the beginning of training where the model carries no such adapter; and as
            `save_lora`.
    """

    def __init__(self, name: str | None = None, adapter: str = DEFAULT) -> None:
        self.name, self.adapter = beside(adapter) if name is None else name, adapter

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        lora_parameters(kwargs["model"], self.adapter)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(kwargs["model"], Path(args.output_dir, f"checkpoint-{state.global_step}"), state)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._save(kwargs["model"], Path(args.output_dir), state)

    def _save(self, model: nn.Module, directory: Path, state: Any) -> None:
        # What is sharded, all gather and one writes; copies of one model, one writes by itself.
        if state.is_world_process_zero or any(
            map(is_sharded, lora_parameters(model, self.adapter))
        ):
            save_lora(model, directory / self.name, name=self.adapter)
