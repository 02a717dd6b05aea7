"""LoRA linears at nearly the cost of the frozen layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .adapters.accelerate import PeftReport, accelerate_peft
from .adapters.carried import lora_adapters, lora_layers
from .adapters.merging import merge_lora, merged_lora
from .adapters.reading import AdapterMismatchError, holds_adapter, read_adapter
from .adapters.selection import disable_lora, use_lora
from .adapters.storage import load_lora, lora_state_dict, save_lora
from .adapters.surgery import (
    apply_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    remove_lora,
)
from .config import LoRAConfig
from .dispatch import explain, use_backend
from .experts.autograd import lora_grouped_linear
from .group.autograd import lora_linear_group
from .group.feed_forward import lora_feed_forward
from .kernels.tuning import use_strategy
from .linear.autograd import lora_linear
from .linear.factors import LoRA
from .linear.module import LoRALinear

if TYPE_CHECKING:
    from .adapters.callback import LoRACallback as LoRACallback

__version__ = "0.1.0"

__all__ = [
    "AdapterMismatchError",
    "LoRA",
    "LoRAConfig",
    "LoRALinear",
    "PeftReport",
    "accelerate_peft",
    "apply_lora",
    "disable_lora",
    "explain",
    "holds_adapter",
    "load_lora",
    "lora_adapters",
    "lora_feed_forward",
    "lora_grouped_linear",
    "lora_layers",
    "lora_linear",
    "lora_linear_group",
    "lora_parameters",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "merged_lora",
    "read_adapter",
    "remove_lora",
    "save_lora",
    "use_backend",
    "use_lora",
    "use_strategy",
]


def __getattr__(name: str) -> Any:
    # It is no part of `__all__`: it needs transformers, which takes seconds to import.
    if name == "LoRACallback":
        from .adapters.callback import LoRACallback

        return LoRACallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
