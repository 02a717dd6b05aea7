"""What PEFT's files say of the parameters that are trained whole, and of the task."""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection
from typing import Any

from torch import nn

from ..linear.factors import DEFAULT
from .fitting_tokens import INDEX, WEIGHT
from .peft_reading import DELTA
from .targets import strip_wrappers
from .wholes import is_inside, names_inside, whole_slots, whole_tensors

# By the end of a class's name; PEFT trains the heads of the first three whole by itself.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# What PEFT cannot wrap.
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def whole_fields(
    model: nn.Module, layers: Collection[str], adapter: str = DEFAULT
) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields of the config, and the name in the file of each tensor that is trained whole.

    Raises:
        ValueError: PEFT would take another module for one of them, too.
    """
    slots = whole_slots(model, adapter)
    tokens = {
        name.removesuffix(INDEX): tensor.tolist()
        for name, tensor in whole_tensors(model, adapter).items()
        if name.endswith(INDEX)
    }
    slots = {name: slot for name, slot in slots.items() if not name.endswith(INDEX)}
    saved = _saved_modules(model, {n for n, slot in slots.items() if not slot.is_frozen(adapter)})
    names = {
        name: name.replace(owner, f"{owner}.base_layer", 1)
        if (owner := name.rpartition(".")[0]) in layers
        else name
        for name in slots
    }
    names = {name: key.replace(WEIGHT, DELTA) for name, key in names.items()}
    biases = {
        name
        for name, slot in slots.items()
        if slot.attribute == "bias" and not any(is_inside(name, module) for module in saved)
    }
    own = {f"{name}.bias" for name in layers}
    fields: dict[str, Any] = {
        "bias": "none" if not biases else "lora_only" if biases <= own else "all",
        "modules_to_save": saved or None,
    }
    if tokens:
        fields["trainable_token_indices"] = tokens
    tensors = [slot.value_of(adapter) for slot in slots.values()]
    if len({id(tensor) for tensor in tensors}) < len(tensors):
        fields["ensure_weight_tying"] = True
    return fields, names


def _saved_modules(model: nn.Module, trained: Collection[str]) -> list[str]:
    """The outermost modules of which everything is trained whole, by clean names."""
    saved: list[str] = []
    modules = {strip_wrappers(name): module for name, module in model.named_modules()}
    # Not of state_dict: what other adapters have in a module is none of its own.
    inside: dict[str, set[str]] = {}
    for key in names_inside(model, [""]):
        for name in itertools.accumulate(key.split(".")[:-1], "{}.{}".format):
            inside.setdefault(name, set()).add(key)
    for name, module in modules.items():
        own = inside.get(name)
        if not name or not own or isinstance(module, _CONTAINERS):
            continue
        if own <= set(trained) and not any(is_inside(name, other) for other in saved):
            saved.append(name)
    for name, module in modules.items():
        twin = next((s for s in saved if name.endswith(s) and name not in saved), None)
        if twin and module.state_dict() and not any(is_inside(name, other) for other in saved):
            raise ValueError(
                f"PEFT compares the ends of names and would take {name!r} for {twin!r}, which is "
                "trained whole; save to a .safetensors file"
            )
    return saved


def task_type(base: nn.Module, saved: Collection[str]) -> str | None:
    """PEFT's name of what a model of transformers does, or None where it cannot be told."""
    kinds = [kind.__name__ for kind in type(base).__mro__]
    task = next((t for end, t in _TASKS.items() if any(k.endswith(end) for k in kinds)), None)
    if task:
        # PEFT looks for the head in the file, whatever modules_to_save says.
        heads = [n for n, _ in base.named_children() if re.fullmatch("score|classifier", n)]
        return task if task == "QUESTION_ANS" or all(n in saved for n in heads) else None
    if callable(getattr(base, "prepare_inputs_for_generation", None)):
        two_parts = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
        return "SEQ_2_SEQ_LM" if two_parts else "CAUSAL_LM"
    return "FEATURE_EXTRACTION" if getattr(base, "base_model", None) is base else None
