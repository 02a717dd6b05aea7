"""LoRA linears at nearly the cost of the frozen layer."""

from .adapters.accelerate import PeftReport, accelerate_peft
from .adapters.storage import AdapterMismatchError, load_lora, lora_state_dict, save_lora
from .adapters.surgery import (
    apply_lora,
    disable_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
)
from .config import LoRAConfig
from .dispatch import explain, use_backend
from .linear.autograd import lora_linear
from .linear.module import LoRA, LoRALinear

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
    "load_lora",
    "lora_linear",
    "lora_parameters",
    "lora_state_dict",
    "mark_only_lora_as_trainable",
    "merge_lora",
    "merged_lora",
    "remove_lora",
    "save_lora",
    "use_backend",
]
