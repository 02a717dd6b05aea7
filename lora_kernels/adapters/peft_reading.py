"""An adapter as PEFT's two files, written and read without PEFT.

``adapter_model.safetensors`` has the keys ``base_model.model.<module>.lora_A.weight [R, K]`` and
``.lora_B.weight [N, R]``; ``adapter_config.json`` alone knows alpha. The names of modules in
``rank_pattern`` and ``alpha_pattern`` are regular expressions, matched from a dot or the beginning
to the end; a leading ``^`` leaves only the beginning, so that a name written here is one module's.

What does not fit raises a plain ValueError, to which `storage` adds the path.
"""

from __future__ import annotations

import json
import math
import os
import re
import reprlib
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from ..config import LayerConfig, check_alpha, check_dropout, check_rank
from ..linear.module import LoRALinear
from .sharding import is_writer, whole
from .surgery import strip_wrappers

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLE = "adapter_model.bin"
_PREFIX = "base_model.model."
_FACTORS = {"A": ".lora_A.weight", "B": ".lora_B.weight"}

# Fields of adapter_config.json that leave what a loaded adapter computes as it is: they say where
# it came from, which modules were chosen (the tensors say that too), or how it was initialised.
# fmt: off
_INERT = {
    "auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_ga_config",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}
_READ = {
    "alpha_pattern", "bias", "init_lora_weights", "lora_alpha", "lora_dropout", "peft_type", "r",
    "rank_pattern", "use_rslora",
}
# fmt: on
_REFUSED = {
    "alora_invocation_tokens": "LoRA that starts at certain tokens is not supported",
    "arrow_config": "routing between adapters is not supported",
    "fan_in_fan_out": "transposed weights are not supported",
    "layer_replication": "it repeats layers of the base model",
    "lora_bias": "a bias in the LoRA branch is not supported",
    "megatron_config": "Megatron's layers are not supported",
    "modules_to_save": "whole modules beside the adapter are not supported; merge them in PEFT",
    "target_parameters": "LoRA on bare parameters is not supported",
    "trainable_token_indices": "trained tokens beside the adapter are not supported",
    "use_dora": "DoRA is not supported; merge it in PEFT",
}
_PLAIN_INITS = (True, False, None, "gaussian", "eva", "orthogonal")
_STRANGE_KEYS = {
    "lora_embedding_": "LoRA on an embedding",
    "lora_magnitude_vector": "DoRA",
    ".lora_B.bias": "lora_bias",
}


def write_directory(
    directory: Path, model: nn.Module, layers: Mapping[str, LoRALinear], fold_scale: bool = False
) -> None:
    """Write the adapter of ``model``, its LoRALinears by clean name, into ``directory``.

    Both files appear or neither; whatever else is in the directory is left alone. Of a sharded
    model every process gathers, and the first writes.

    Raises:
        ValueError: PEFT's format cannot say it, or the place is taken. Nothing is written then.
    """
    tensors, config = _contents(model, layers, fold_scale)
    if not is_writer(layer.lora.A.weight for layer in layers.values()):
        return
    text = json.dumps(config, indent=2) + "\n"
    _write_all(directory, {TENSORS: save(tensors, {"format": "pt"}), CONFIG: text.encode()})


def _contents(
    model: nn.Module, layers: Mapping[str, LoRALinear], fold_scale: bool = False
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What the two files hold: the tensors, copied to the CPU, and the config."""
    if "" in layers:
        raise ValueError(
            "model itself is a LoRALinear, for which PEFT's format has no name; put it into a "
            "module first, or save to a .safetensors file"
        )
    configs = {name: layer.lora_config for name, layer in layers.items()}
    dropout = _common("dropout", {name: layer.dropout for name, layer in configs.items()})
    ranks = {name: layer.rank for name, layer in configs.items()}
    factors = {name: (_copy(layer.lora.A), _copy(layer.lora.B)) for name, layer in layers.items()}
    if fold_scale:
        widest, use_rslora = max(ranks.values()), False
        factors = {
            name: _folded(name, *factors[name], configs[name].scale, widest) for name in layers
        }
        ranks = dict.fromkeys(layers, widest)
        alphas: dict[str, float] = dict.fromkeys(layers, widest)
    else:
        # Without alpha the scale is 1, with rsLoRA and without.
        scaled = {n: c.use_rslora for n, c in configs.items() if c.alpha is not None}
        use_rslora = _common("use_rslora", scaled) if scaled else False
        alphas = {
            n: (math.sqrt(c.rank) if use_rslora else c.rank) if c.alpha is None else c.alpha
            for n, c in configs.items()
        }
    rank, rank_pattern = _default_and_pattern(ranks)
    alpha, alpha_pattern = _default_and_pattern(
        {n: int(a) if float(a).is_integer() else a for n, a in alphas.items()}
    )
    base = _innermost(model)
    config = {
        "peft_type": "LORA",
        "task_type": _task_type(base),
        "base_model_name_or_path": _base_name(base),
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(layers),
        "exclude_modules": _namesakes(model, layers),
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "modules_to_save": None,
    }
    return {
        _PREFIX + name + suffix: tensor
        for name, pair in factors.items()
        for suffix, tensor in zip(_FACTORS.values(), pair, strict=True)
    }, config


def read_directory(directory: Path) -> tuple[dict[str, Tensor], dict[str, LayerConfig]]:
    """The tensors, renamed ``<module>.lora.A.weight`` and so on, and each module's configuration.

    Raises:
        FileNotFoundError: neither file is there.
        ValueError: the adapter is incomplete, damaged, or of a kind that is not supported.
    """
    there = [name for name in (TENSORS, CONFIG) if os.path.lexists(directory / name)]
    if TENSORS not in there and (directory / _PICKLE).exists():
        raise ValueError(
            f"{_PICKLE} is a pickle, which could run code and is never loaded; if you trust it, "
            f"load it in PEFT and save it again, which writes {TENSORS}"
        )
    if not there:
        raise FileNotFoundError(
            f"no adapter at {directory}: neither {TENSORS} nor {CONFIG} is there; check the path"
        )
    for name in (TENSORS, CONFIG):
        if name not in there:
            raise ValueError(f"{name} is missing, only {there[0]} is there; copy both files")
        _refuse_strange_file(directory, name)
    resolve = _resolver(_read_config(directory / CONFIG))
    state: dict[str, Tensor] = {}
    described: dict[str, LayerConfig] = {}
    problems: list[str] = []
    content = _read_tensors(directory / TENSORS)
    for key, tensor in content.items():
        # A prefix may stand before PEFT's own, too, if the wrapped model was saved.
        head, prefix, rest = key.partition(_PREFIX)
        factor = next((f for f, suffix in _FACTORS.items() if rest.endswith(suffix)), None)
        name = rest.removesuffix(_FACTORS[factor]) if factor else ""
        if not name or strip_wrappers(head):
            kind = next((k for part, k in _STRANGE_KEYS.items() if part in key), None)
            wanted = f"this is {kind}" if kind else f"keys are {_PREFIX}<module>.lora_A.weight, B"
            problems.append(f"unexpected key {key!r} ({wanted})")
            continue
        other = _FACTORS["B" if factor == "A" else "A"]
        if f"{head}{prefix}{name}{other}" not in content:
            problems.append(f"missing key {head}{prefix}{name}{other}")
        layer = resolve(name)
        described[strip_wrappers(name)] = layer
        state[f"{head}{name}.lora.{factor}.weight"] = tensor
        if tensor.dim() == 2 and tensor.shape[0 if factor == "A" else 1] != layer.rank:
            problems.append(
                f"{key}: {CONFIG} says rank {layer.rank}, found shape {list(tensor.shape)}"
            )
    if problems:
        raise ValueError("\n  ".join(["not a LoRA adapter that can be loaded", *problems]))
    return state, described


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except Exception as error:  # of the library's own making, and its readers' kinds
        raise ValueError(f"{path.name} cannot be read, it may be damaged: {error}") from None


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
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: trained biases are not supported")
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
    patterns: dict[str, list[tuple[re.Pattern[str], Any]]] = {}
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
            patterns[field] = [
                (re.compile(rf"(.*\.)?({key})$"), check(value, f"{field}[{key!r}]"))
                for key, value in entries.items()
            ]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{CONFIG}: {error}") from None
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{CONFIG}: {field} has a key that is no pattern: {error}") from None

    def first(field: str, name: str, otherwise: Any) -> Any:
        return next((value for key, value in patterns[field] if key.match(name)), otherwise)

    return lambda name: replace(
        default,
        rank=first("rank_pattern", name, default.rank),
        alpha=first("alpha_pattern", name, default.alpha),
    )


def _refuse_strange_file(directory: Path, name: str) -> None:
    try:
        target = (directory / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is a link that leads nowhere: {error}") from None
    if not target.is_relative_to(directory.resolve()):
        raise ValueError(
            f"{name} is a link to {target}, outside the directory, and is not followed; "
            "copy the file itself there (of a download cache, make a real copy)"
        )
    if not target.is_file():
        raise ValueError(f"{name} is not a file")


def _common(field: str, values: Mapping[str, Any]) -> Any:
    """The one value that all have, or an error that names who has which."""
    if len(set(values.values())) > 1:
        groups: dict[Any, list[str]] = {}
        for name, value in values.items():
            groups.setdefault(value, []).append(name)
        listed = "; ".join(f"{value} on {', '.join(names)}" for value, names in groups.items())
        fold = " with fold_scale=True, or" if field == "use_rslora" else ""
        raise ValueError(
            f"PEFT's format has one {field} for all modules, the model has {listed}; "
            f"save{fold} to a .safetensors file, which keeps each"
        )
    return next(iter(values.values()))


def _default_and_pattern(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The commonest value, and the names that have another, longest name first."""
    default = Counter(values.values()).most_common(1)[0][0]
    others = sorted((n for n in values if values[n] != default), key=lambda n: (-len(n), n))
    return default, {f"^{re.escape(name)}": values[name] for name in others}


def _copy(factor: nn.Linear) -> Tensor:
    weight = whole(factor.weight.detach())
    return weight.cpu().clone(memory_format=torch.contiguous_format)


def _folded(name: str, a: Tensor, b: Tensor, scale: float, rank: int) -> tuple[Tensor, Tensor]:
    """Factors of rank ``rank`` whose product is ``scale·B·A``: the rest is zeros."""
    wide = torch.promote_types(b.dtype, torch.float32)
    scaled = (b.to(wide) * scale).to(b.dtype)
    if not torch.isfinite(scaled).all():
        raise ValueError(
            f"fold_scale: {scale:g} times B of {name!r} is not finite in {b.dtype}; "
            "save without fold_scale"
        )
    missing = rank - a.shape[0]
    return F.pad(a, (0, 0, 0, missing)), F.pad(scaled, (0, missing))


def _innermost(model: nn.Module) -> nn.Module:
    """The model inside the wrappers that leave names alone."""
    return [module for name, module in model.named_modules() if not strip_wrappers(name)][-1]


def _task_type(base: nn.Module) -> str | None:
    if not callable(getattr(base, "prepare_inputs_for_generation", None)):
        return None
    two_parts = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return "SEQ_2_SEQ_LM" if two_parts else "CAUSAL_LM"


def _base_name(base: nn.Module) -> str | None:
    name = getattr(getattr(base, "config", None), "name_or_path", None)
    return name if isinstance(name, str) and name else None


def _namesakes(model: nn.Module, layers: Iterable[str]) -> str | None:
    """A regular expression for the modules whose names merely end in an adapted one's."""
    own = {f"{name}{inner}" for name in layers for inner in ("", ".lora", ".lora.A", ".lora.B")}
    endings = tuple(f".{name}" for name in layers)
    names = {strip_wrappers(name) for name, _ in model.named_modules()} - own
    return "|".join(re.escape(n) for n in sorted(names) if n.endswith(endings)) or None


def _write_all(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write the files so that all appear or none, in this order."""
    for name in files:
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a directory; choose another path")
    fresh = not directory.exists()
    directory.parent.mkdir(parents=True, exist_ok=True)
    stage = (directory.parent if fresh else directory) / f".{directory.name}.{secrets.token_hex(8)}"
    stage.mkdir()
    try:
        for name, content in files.items():
            with open(stage / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if fresh:
            stage.rename(directory)
        else:
            _swap(stage, directory, list(files))
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, directory: Path, names: list[str]) -> None:
    """Move ``names`` from ``stage`` into ``directory``, or put everything back as it was.

    The old files leave first, and the config is the first to leave and the last to come: if the
    machine stops meanwhile, one is missing, and what is there cannot be taken for an adapter.
    """
    moves = [
        (directory / name, stage / f"old-{name}")
        for name in reversed(names)
        if os.path.lexists(directory / name)
    ] + [(stage / name, directory / name) for name in names]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise
