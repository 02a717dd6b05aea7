"""PEFT's two files of an adapter, read without PEFT.

``adapter_model.safetensors``, or ``.bin`` up to PEFT 0.5, has the keys
``base_model.model.<module>.lora_A.weight [R, K]`` and ``.lora_B.weight [N, R]``;
``adapter_config.json`` alone knows alpha. The names of modules in ``rank_pattern`` and
``alpha_pattern`` are regular expressions, matched from a dot or the beginning to the end; a
leading ``^`` leaves only the beginning, so that a name written here is one module's.

What does not fit raises a plain ValueError, to which `reading` adds the path.
"""

from __future__ import annotations

import json
import os
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import BIASES, LayerConfig, check_alpha, check_dropout, check_rank
from .checksums import refuse_other_bytes
from .content import Content
from .files import refuse_strange_file
from .patterns import NamePatterns
from .targets import strip_wrappers
from .tensor_files import LazyTensors, read_pickled

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLE = "adapter_model.bin"
PREFIX = "base_model.model."
DELTA = ".token_adapter.trainable_tokens_delta"
# PEFT's own parts of names: with bias="all" it saves a module's bias by all of them.
_BASE, _SAVED, _ORIGINAL = ".base_layer.", ".modules_to_save.", ".original_module."
FACTORS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}

# Fields of adapter_config.json that leave what a loaded adapter computes as it is: they say where
# it came from, which modules were chosen (the tensors say that too), or how it was initialised.
# fmt: off
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type", "velora_config",
}
_READ = {
    "alpha_pattern", "bias", "ensure_weight_tying", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "peft_type", "r", "rank_pattern", "target_parameters",
    "trainable_token_indices", "use_rslora",
}
# fmt: on
_REFUSED = {
    "alora_invocation_tokens": "LoRA that starts at certain tokens is not supported",
    "arrow_config": "routing between adapters is not supported",
    "fan_in_fan_out": "transposed weights are not supported",
    "layer_replication": "it repeats layers of the base model",
    "lora_bias": "a bias in the LoRA branch is not supported",
    "megatron_config": "Megatron's layers are not supported",
    "use_dora": "DoRA is not supported; merge it in PEFT",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_STRANGE_KEYS = {
    "lora_embedding_": "LoRA on an embedding",
    "lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "lora_bias",
}


def holds_peft_files(directory: Path) -> bool:
    """Whether one of PEFT's files is there."""
    return any(os.path.lexists(directory / name) for name in (TENSORS, _PICKLE, CONFIG))


def read_directory(directory: Path) -> tuple[dict[str, Any], Content]:
    """The factors, renamed ``<module>.lora.A.weight`` and so on, and what else the files hold.

    Where both are there, ``adapter_model.safetensors`` wins over ``adapter_model.bin``.

    Raises:
        ValueError: the adapter is incomplete, damaged, or of a kind that is not supported.
    """
    old = not os.path.lexists(directory / TENSORS) and os.path.lexists(directory / _PICKLE)
    names = (_PICKLE if old else TENSORS, CONFIG)
    for name, other in (names, reversed(names)):
        if not os.path.lexists(directory / name):
            raise ValueError(f"{name} is missing, only {other} is there; copy both files")
        refuse_strange_file(directory, name)
    config = _read_config(directory / CONFIG)
    resolve, saved = _resolver(config), config.get("modules_to_save") or []
    parameters = tuple(config.get("target_parameters") or ())
    state: dict[str, Any] = {}
    described: dict[str, LayerConfig] = {}
    problems: list[str] = []
    whole: dict[str, Any] = {}
    copies: dict[str, Any] = {}
    path = directory / names[0]
    content: dict[str, Any] = {}
    if old:
        content = read_pickled(path)
    else:
        lazy = LazyTensors(path)
        content = dict(lazy)
        refuse_other_bytes(lazy.metadata, content)
    for key, tensor in content.items():
        # A prefix may stand before PEFT's own, too, if the wrapped model was saved.
        head, prefix, rest = key.partition(PREFIX)
        factor = next((f for f, suffix in FACTORS.items() if rest.endswith(suffix)), None)
        name = rest.removesuffix(FACTORS[factor]) if factor else ""
        if prefix and not factor and not strip_wrappers(head) and "lora_" not in rest:
            if rest.endswith(DELTA):
                name = f"{head}{rest.removesuffix(DELTA)}"
                whole[f"{name}.lora_tokens.weight"] = tensor
                whole[f"{name}.lora_tokens.index"] = _indices(config, strip_wrappers(name))
                continue
            if _ORIGINAL in rest:
                continue
            plain = head + rest
            for part in (f".token_adapter{_BASE}", _BASE, _SAVED):
                plain = plain.replace(part, ".")
            bias = plain.endswith(".bias") and config.get("bias", "none") != "none"
            (whole if bias or _is_saved(rest, saved) else copies)[plain] = tensor
            continue
        if not name or strip_wrappers(head):
            kind = next((k for part, k in _STRANGE_KEYS.items() if part in key), None)
            wanted = f"this is {kind}" if kind else f"keys are {PREFIX}<module>.lora_A.weight, B"
            problems.append(f"unexpected key {key!r} ({wanted})")
            continue
        other = FACTORS["B" if factor == "A" else "A"]
        if f"{head}{prefix}{name}{other}" not in content:
            problems.append(f"missing key {head}{prefix}{name}{other}")
        layer = resolve(name)
        described[strip_wrappers(name)] = layer
        state[f"{head}{name}.lora.{factor}.weight"] = tensor
        if (
            isinstance(tensor, Tensor)
            and tensor.dim() == 2
            and not parameters  # of experts: `peft_experts` holds them against the model
            and tensor.shape[0 if factor == "A" else 1] != layer.rank
        ):
            problems.append(
                f"{key}: {CONFIG} says rank {layer.rank}, found shape {list(tensor.shape)}"
            )
    asked = config.get("trainable_token_indices")
    if asked and not any(key.endswith(DELTA) for key in content):
        problems.append(
            f"trainable_token_indices is {reprlib.repr(asked)}, and no key ends in {DELTA}"
        )
    if problems:
        raise ValueError("\n  ".join(["not a LoRA adapter that can be loaded", *problems]))
    tying = bool(config.get("ensure_weight_tying"))
    return state, Content(
        described=described,
        whole=whole,
        copies=copies,
        saved=tuple(saved),
        tying=tying,
        parameters=parameters,
        resolve=resolve if parameters else None,
    )


def _indices(config: Mapping[str, Any], name: str) -> Tensor:
    """The tokens whose rows are in the file, in the order of these."""
    asked = config.get("trainable_token_indices")
    if isinstance(asked, dict):
        asked = next((rows for key, rows in asked.items() if name.endswith(key)), None)
    if not isinstance(asked, list) or not all(type(i) is int and abs(i) < 2**62 for i in asked):
        raise ValueError(
            f"{CONFIG}: trainable_token_indices is {reprlib.repr(asked)} for {name!r}, expected a "
            "list of token numbers"
        )
    return torch.tensor(asked, dtype=torch.int64)


def _is_saved(key: str, modules: Sequence[str]) -> bool:
    """Whether PEFT takes the key for one of ``modules_to_save``, whose ends it compares."""
    parts = key.split(".")
    return any(".".join(parts[:end]).endswith(tuple(modules)) for end in range(1, len(parts)))


def _read_config(path: Path) -> dict[str, Any]:
    """The config, if it describes an adapter that this library computes rightly."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{CONFIG} cannot be read, it may be damaged: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} holds a {type(config).__name__}, expected an object")
    problems = []
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}, only 'LORA' is supported")
    if config.get("bias", "none") not in BIASES:
        problems.append(f"bias is {config['bias']!r}, expected one of {', '.join(BIASES)}")
    for field in ("modules_to_save", "target_parameters"):
        names = config.get(field) or []
        if not isinstance(names, list) or not all(isinstance(n, str) and n for n in names):
            problems.append(f"{field} is {reprlib.repr(names)}, expected a list of names")
    init = config.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _PLAIN_INITS:
        problems.append(
            f"init_lora_weights is {init!r}, which may have rewritten the base weights; convert it "
            "in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
        )
    for field, value in config.items():
        if value and field in _REFUSED:
            problems.append(f"{field} is {reprlib.repr(value)}: {_REFUSED[field]}")
        elif value and field not in _INERT | _READ:
            problems.append(
                f"{field} is {reprlib.repr(value)}, a setting that this library does not know; "
                "it may change what the adapter computes"
            )
    problems += [
        f"{field} is missing" + (", which PEFT would take for 8" if field == "lora_alpha" else "")
        for field in ("r", "lora_alpha")
        if config.get(field) is None
    ]
    if problems:
        raise ValueError("\n  ".join([f"{CONFIG} describes another kind of adapter", *problems]))
    return config


def _resolver(config: Mapping[str, Any]) -> Callable[[str], LayerConfig]:
    """From a module's name to its rank and scale, as PEFT finds them: the first match wins."""
    patterns: dict[str, NamePatterns] = {}
    field = "rank_pattern"
    try:
        default = LayerConfig(
            check_rank(config["r"], "r"),
            check_alpha(config["lora_alpha"], "lora_alpha"),
            check_dropout(config.get("lora_dropout") or 0.0, "lora_dropout"),
            config.get("use_rslora") or False,
        )
        for field, check in (("rank_pattern", check_rank), ("alpha_pattern", check_alpha)):
            entries = config.get(field) or {}
            if not isinstance(entries, dict) or None in entries.values():
                raise TypeError(f"{field} must map names to numbers, got {reprlib.repr(entries)}")
            for key, value in entries.items():
                check(value, f"{field}[{reprlib.repr(key)}]")
            patterns[field] = NamePatterns(entries)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG}: {error}") from None
    except re.error as error:
        raise ValueError(
            f"{CONFIG}: {field} has a key that is no pattern of names: {error}"
        ) from None

    def resolve(name: str) -> LayerConfig:
        try:
            rank = patterns["rank_pattern"].first(name, default.rank)
            alpha = patterns["alpha_pattern"].first(name, default.alpha)
        except re.error as error:
            raise ValueError(f"{CONFIG}: rank_pattern or alpha_pattern: {error}") from None
        return replace(default, rank=rank, alpha=alpha)

    return resolve
