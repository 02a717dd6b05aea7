"""Save and load an adapter, and nothing else of the model.

Three kinds, told apart by the path:

- ``.pth`` / ``.pt``: torch's format, the plain dictionary ``{"<module>.lora.A.weight": tensor}``.
  It says nothing of alpha or dropout; on a model without LoRA it loads with scale 1.
- ``.safetensors``: the same keys; rank, alpha, rsLoRA and dropout of each module as metadata, and
  which tensors are no factors but trained whole.
- an existing directory, or a new path without a suffix: PEFT's two files, see `peft_reading`.

Read, but not written, are also checkpoints of the whole model with its LoRALinears in it, as
``save_pretrained`` and transformers' Trainer make them: files and directories.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..linear.factors import DEFAULT, check_adapter_name, factor_dtype
from . import checksums
from .carried import Part, adapters_in_use, parts, refuse_inside_block, require_parts
from .changing import change_of, write_together
from .content import Content
from .files import write_atomically
from .fitting import fit
from .peft_experts import with_expert_names
from .peft_writing import write_directory
from .reading import (
    METADATA,
    SUFFIXES,
    VERSION,
    AdapterMismatchError,
    kind_of,
    read_content,
    without_wrappers,
)
from .renaming import with_todays_names
from .sharding import cut_like, is_writer, refuse_emptied, refuse_flattened, reshard, whole
from .surgery import insert_lora
from .tokens import insert_tokens
from .wholes import insert_wholes, use_wholes, whole_slots, whole_tensors


def lora_state_dict(model: nn.Module, name: str = DEFAULT) -> dict[str, Tensor]:
    """``{"<module>.lora.A.weight": [R, K], "<module>.lora.B.weight": [N, R]}``, detached, and what
    is trained whole under the names that it has in the model's own state dict.

    Wrapper prefixes are dropped from the names. The tensors share storage with the model; those of
    a sharded model (FSDP2) are gathered, for which every process must make this call.

    Args:
        model: carries LoRA.
        name: of the adapter, which is no part of the keys.

    Raises:
        ValueError: the model carries no LoRA or none of this name, or FSDP1 has flattened it,
            or DeepSpeed's ZeRO-3 has emptied it.
    """
    layers = without_wrappers(require_parts(model, name, "lora_state_dict"))
    tensors = {**_factors(model, layers), **_wholes(model, name)}
    return {key: whole(tensor.detach()) for key, tensor in tensors.items()}


def save_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    name: str = DEFAULT,
    fold_scale: bool = False,
) -> None:
    """Write an adapter to ``path``, in its own dtype.

    ``.pth``, ``.pt`` and ``.safetensors`` are files; an existing directory, or a new path without
    a suffix, becomes an adapter in PEFT's format (other files in it are left alone). What is
    written appears whole or not at all. Missing parent directories are made.

    Under DDP, call it on one process. Of a sharded model (FSDP2) it gathers the factors, so every
    process must call it; the first writes, the others may return before it has.

    Args:
        model: carries LoRA.
        path: where to.
        name: of the adapter, whether it is in use or not. It is no part of what is written.
        fold_scale: of a directory only: multiply the scale into B (in float32 or wider, rounded
            once to its dtype) and pad every rank with zeros to the widest, so that ``r`` and
            ``lora_alpha`` are the same everywhere and make a scale of 1. For servers that pass
            over ``rank_pattern``, ``alpha_pattern`` or ``use_rslora``; to train on, save without.

    Raises:
        ValueError: another suffix, the model carries no LoRA or none of this name, FSDP1 has
            flattened it, ZeRO-3 has emptied it, or PEFT's format cannot hold it: dropout or rsLoRA
            differ between modules, or the model itself is the LoRALinear.
    """
    path = Path(path)
    kind = kind_of(path)
    layers = without_wrappers(require_parts(model, name, "save_lora"))
    factors, wholes = _factors(model, layers), _wholes(model, name)
    if kind == "directory":
        write_directory(path, model, layers, name, fold_scale)
        return
    if fold_scale:
        raise ValueError(f"fold_scale is for a directory in PEFT's format, got {str(path)!r}")
    frozen = [key for key, slot in whole_slots(model, name).items() if slot.is_frozen(name)]
    if kind == "torch" and frozen:
        raise ValueError(
            f"a {path.suffix} file cannot say that {frozen[0]!r} is the base's; save to a "
            ".safetensors file or a directory"
        )
    # A tensor that is a view would drag its whole storage into the file, or be refused.
    state = {
        key: whole(tensor.detach()).cpu().clone(memory_format=torch.contiguous_format)
        for key, tensor in {**factors, **wholes}.items()
    }
    if not is_writer(factors.values()):
        return
    if kind == "torch":
        write_atomically(path, lambda temporary: torch.save(state, temporary))
        return
    description: dict[str, Any] = {
        "version": VERSION,
        "modules": {module: asdict(part.config) for module, part in layers.items()},
    }
    if wholes:
        trained = [name for name in wholes if name not in frozen]
        description |= {"whole": trained, "copies": frozen}
    metadata = {"format": "pt", METADATA: json.dumps(description)}
    write_atomically(path, lambda temporary: checksums.write(temporary, state, metadata))


def load_lora(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    strict: bool = True,
    name: str = DEFAULT,
    lora_dtype: torch.dtype | str | None = None,
) -> list[str]:
    """Load the adapter at ``path`` into ``model``; on a model without it, apply it first.

    The first adapter of a model is in use at once; a further one, by another name, waits for
    `use_lora`, and what the model computes stays as it is.

    Every key, shape, dtype and value is checked before the model is touched. Tensors are cast to
    the dtype and device of the model's factors. Files are read without unpickling code. Into a
    sharded model (FSDP2) each process loads its own part; LoRA must be on it already.

    Args:
        model: carries an adapter of this name on the same modules, or none of this name at all.
        path: a file that `save_lora` wrote, a ``.pth`` of the same keys, or a directory with
            PEFT's ``adapter_model.safetensors`` (or ``.bin``) and ``adapter_config.json``. Also a
            checkpoint of the whole model with LoRA in it (``save_pretrained``, Trainer's
            ``checkpoint-<step>``): A and B are taken out of it, and what the model trains whole,
            or a classifier's head; its other tensors are passed over. In such a directory
            ``lora.safetensors`` of `LoRACallback` comes first (``lora.<name>.safetensors`` of
            another adapter), which knows alpha; the checkpoint does not, and on a model without
            LoRA it loads with scale 1. Of a checkpoint that holds several, the one of this name is
            taken, or else ``default``; what they train whole is there of those in use alone.
        strict: demand that the file and the model's adapter have the same modules. If false,
            modules on one side only are left alone; shapes must fit still.
        name: of the adapter in the model. Files do not hold it.
        lora_dtype: of the A and B that loading makes: a dtype, ``"file"`` for the file's own, or
            None for each weight's, and float32 where that has 16 bits. Those that the model has
            keep theirs.

    Returns:
        The names of the modules loaded, in module order.

    Raises:
        FileNotFoundError: no such file.
        AdapterMismatchError: what is missing, unexpected, mis-shaped or not finite, by name; or
            what PEFT's config asks for that is not plain LoRA.
        TypeError: lora_dtype is none of these.
        ValueError: another suffix, FSDP1 has flattened the model, ZeRO-3 has emptied it, an
            adapter cannot be called so, or one would have to be put in inside `disable_lora` or
            `merged_lora`.
    """
    path = Path(path)
    check_adapter_name(name)
    if lora_dtype != "file":
        factor_dtype(torch.float32, lora_dtype)  # type: ignore[arg-type]
    content = read_content(path, name)
    with change_of(model):
        return _load(model, path, content, strict, name, lora_dtype)


def _load(
    model: nn.Module,
    path: Path,
    content: Content,
    strict: bool,
    name: str,
    lora_dtype: torch.dtype | str | None,
) -> list[str]:
    try:
        content = with_expert_names(model, with_todays_names(model, content))
    except ValueError as error:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  {error}"
        ) from None
    _factors(model, without_wrappers(parts(model, name)))  # refuses what cannot be written to
    _wholes(model, name)
    loaded, inserted, dtypes, wholes = fit(model, path, content, strict, name, lora_dtype)
    if inserted or wholes.inserted or wholes.tokens:
        refuse_inside_block(model, "load_lora of a new adapter")
    if inserted:
        try:
            insert_lora(model, inserted, name, dtypes)
        except (TypeError, ValueError) as error:
            raise AdapterMismatchError(
                f"{path} does not fit the model; nothing was loaded.\n  {error}"
            ) from None
        if content.base and not content.described:
            warnings.warn(
                f"{path} is a checkpoint of the whole model, which says neither alpha nor "
                "modules_to_save: A and B were loaded with scale 1, and nothing whole but a "
                "classifier's head; call apply_lora with the settings of the training first",
                stacklevel=3,
            )
    insert_wholes(model, wholes.inserted, name, frozen=wholes.frozen)
    insert_tokens(model, wholes.tokens, name)
    if wholes.inserted or wholes.tokens:
        use_wholes(model, adapters_in_use(model))
    if wholes.frozen:
        warnings.warn(
            f"{path} holds {', '.join(wholes.frozen)} of its base, which differs from the "
            "model's: it is used with the adapter; disable_lora and remove_lora bring back yours",
            stacklevel=3,
        )
    layers = without_wrappers(parts(model, name))
    targets = whole_tensors(model, name)
    pairs = [(targets[key], tensor) for key, tensor in wholes.loaded.items()]
    for module in loaded:
        for factor, tensor in content.pairs[module].items():
            pairs.append((getattr(layers[module].lora, factor).weight, tensor))
    write_together([(target, cut_like(target, tensor)) for target, tensor in pairs])
    return loaded


def _factors(model: nn.Module, layers: Mapping[str, Part]) -> dict[str, Tensor]:
    """A and B of each layer by their keys, sharded where it is so; refuses FSDP1's and ZeRO-3's."""
    reshard(model)
    factors = {}
    for name, layer in layers.items():
        for factor, suffix in SUFFIXES.items():
            factors[name + suffix] = weight = getattr(layer.lora, factor).weight
            refuse_emptied({name + suffix: weight}, "lora_parameters(model)")
            refuse_flattened(name, weight)
    return factors


def _wholes(model: nn.Module, name: str) -> dict[str, Tensor]:
    """`whole_tensors`; refuses ZeRO-3's."""
    wholes = whole_tensors(model, name)
    refuse_emptied(wholes, "lora_parameters(model)")
    return wholes
