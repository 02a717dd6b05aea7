"""Save and load an adapter, and nothing else of the model.

Three kinds, told apart by the path:

- ``.pth`` / ``.pt``: torch's format, the plain dictionary ``{"<module>.lora.A.weight": tensor}``.
  It says nothing of alpha or dropout; on a model without LoRA it loads with scale 1.
- ``.safetensors``: the same keys; rank, alpha, rsLoRA and dropout of each module as metadata.
- an existing directory, or a new path without a suffix: PEFT's two files, see `peft_reading`.
"""

from __future__ import annotations

import json
import os
import pickle
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..config import LayerConfig
from ..linear.module import DTYPES, LoRALinear
from .peft_reading import read_directory, write_directory
from .sharding import cut_like, is_sharded, is_writer, refuse_flattened, reshard, whole
from .surgery import _require_lora, insert_lora, lora_layers, strip_wrappers

_SUFFIXES = {"A": ".lora.A.weight", "B": ".lora.B.weight"}
_METADATA, _VERSION = "lora_kernels", 1
Value = TypeVar("Value")


class AdapterMismatchError(ValueError):
    """An adapter file does not fit the model, or is not an adapter; the model is unchanged."""


def lora_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """``{"<module>.lora.A.weight": [R, K], "<module>.lora.B.weight": [N, R]}``, detached.

    Wrapper prefixes are dropped from the names. The tensors share storage with the model; those of
    a sharded model (FSDP2) are gathered, for which every process must make this call.

    Raises:
        ValueError: the model carries no LoRA, or FSDP1 has flattened it.
    """
    layers = _by_clean_name(_require_lora(model, "lora_state_dict"))
    return {key: whole(factor.detach()) for key, factor in _factors(model, layers).items()}


def save_lora(model: nn.Module, path: str | os.PathLike[str], *, fold_scale: bool = False) -> None:
    """Write the adapter to ``path``, in its own dtype.

    ``.pth``, ``.pt`` and ``.safetensors`` are files; an existing directory, or a new path without
    a suffix, becomes an adapter in PEFT's format (other files in it are left alone). What is
    written appears whole or not at all. Missing parent directories are made.

    Under DDP, call it on one process. Of a sharded model (FSDP2) it gathers the factors, so every
    process must call it; the first writes, the others may return before it has.

    Args:
        model: carries LoRA.
        path: where to.
        fold_scale: of a directory only: multiply the scale into B (in float32 or wider, rounded
            once to its dtype) and pad every rank with zeros to the widest, so that ``r`` and
            ``lora_alpha`` are the same everywhere and make a scale of 1. For servers that pass
            over ``rank_pattern``, ``alpha_pattern`` or ``use_rslora``; to train on, save without.

    Raises:
        ValueError: another suffix, the model carries no LoRA, FSDP1 has flattened it, or PEFT's
            format cannot hold it: dropout or rsLoRA differ between modules, or the model itself is
            the LoRALinear.
    """
    path = Path(path)
    kind = _kind(path)
    layers = _by_clean_name(_require_lora(model, "save_lora"))
    factors = _factors(model, layers)
    if kind == "directory":
        write_directory(path, model, layers, fold_scale)
        return
    if fold_scale:
        raise ValueError(f"fold_scale is for a directory in PEFT's format, got {str(path)!r}")
    state = {key: whole(factor.detach()).cpu().contiguous() for key, factor in factors.items()}
    if not is_writer(factors.values()):
        return
    if kind == "torch":
        # A tensor that is a view would drag its whole storage into the file.
        plain = {key: tensor.clone() for key, tensor in state.items()}
        write_atomically(path, lambda temporary: torch.save(plain, temporary))
    else:
        modules = {name: asdict(layer.lora_config) for name, layer in layers.items()}
        metadata = {
            "format": "pt",
            _METADATA: json.dumps({"version": _VERSION, "modules": modules}),
        }
        write_atomically(path, lambda temporary: save_file(state, temporary, metadata))


def load_lora(model: nn.Module, path: str | os.PathLike[str], *, strict: bool = True) -> list[str]:
    """Load the adapter at ``path`` into ``model``; on a model without LoRA, apply it first.

    Every key, shape, dtype and value is checked before the model is touched. Tensors are cast to
    the dtype and device of the model's factors. Files are read without unpickling code. Into a
    sharded model (FSDP2) each process loads its own part; LoRA must be on it already.

    Args:
        model: carries LoRA on the same modules, or none at all.
        path: a file that `save_lora` wrote, a ``.pth`` of the same keys, or a directory with
            PEFT's ``adapter_model.safetensors`` and ``adapter_config.json``.
        strict: demand that the file and the model's adapter have the same modules. If false,
            modules on one side only are left alone; shapes must fit still.

    Returns:
        The names of the modules loaded, in module order.

    Raises:
        FileNotFoundError: no such file.
        AdapterMismatchError: what is missing, unexpected, mis-shaped or not finite, by name; or
            what PEFT's config asks for that is not plain LoRA.
        ValueError: another suffix, or FSDP1 has flattened the model.
    """
    path = Path(path)
    pairs, described = read_adapter(path)
    by_clean_name = {strip_wrappers(name): name for name, _ in model.named_modules()}
    layers = _by_clean_name(lora_layers(model))
    _factors(model, layers)
    fresh = not layers
    if fresh:
        wanted = {
            name: described.get(name, LayerConfig(rank=pair["A"].shape[0]))
            for name, pair in pairs.items()
            if strict or name in by_clean_name
        }
        layers = _trial_layers(model, wanted, by_clean_name, path)
    missing = [name for name in layers if name not in pairs]
    unexpected = [name for name in pairs if name not in layers]
    problems = []
    if strict and missing:
        problems.append(f"missing from the file: {_listed(missing)}")
    if strict and unexpected:
        problems.append(f"in the file but without LoRA in the model: {_listed(unexpected)}")
    loaded = [name for name in by_clean_name if name in layers and name in pairs]
    if not loaded and not problems:
        problems.append("the file and the model have no module in common")
    for name in loaded:
        problems += _differences(name, layers[name], pairs[name], described.get(name), fresh)
    if problems:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
        )
    if fresh:
        insert_lora(model, {by_clean_name[name]: wanted[name] for name in loaded})
        layers = _by_clean_name(lora_layers(model))
    with torch.no_grad():
        for name in loaded:
            for factor, tensor in pairs[name].items():
                weight = getattr(layers[name].lora, factor).weight
                weight.copy_(cut_like(weight, tensor))
    return loaded


def read_adapter(
    path: str | os.PathLike[str],
) -> tuple[dict[str, dict[str, Tensor]], dict[str, LayerConfig]]:
    """What an adapter holds: ``{module: {"A": [R, K], "B": [N, R]}}`` and, where the file
    says it, ``{module: LayerConfig}``. Wrapper prefixes are dropped from the names.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora`.
    """
    path = Path(path)
    state, described = _read(path)
    return _pairs(state, path), described


def holds_adapter(path: str | os.PathLike[str]) -> bool:
    """Whether the names in a file, or a directory in PEFT's format, are an adapter's.

    Raises:
        FileNotFoundError, AdapterMismatchError, ValueError: as `load_lora` on unreadable files.
    """
    return any(key.endswith(tuple(_SUFFIXES.values())) for key in _read(Path(path))[0])


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary name beside ``path`` and rename the result onto it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give this one the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _factors(model: nn.Module, layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """A and B of each layer by their keys, sharded where the model is; refuses FSDP1's."""
    reshard(model)
    factors = {}
    for name, layer in layers.items():
        for factor, suffix in _SUFFIXES.items():
            factors[name + suffix] = weight = getattr(layer.lora, factor).weight
            refuse_flattened(name, weight)
    return factors


def _kind(path: Path) -> str:
    if path.is_dir() or not (path.suffix or path.exists()):
        return "directory"
    if path.suffix in (".pth", ".pt"):
        return "torch"
    if path.suffix == ".safetensors":
        return "safetensors"
    raise ValueError(
        "path must end in .pth, .pt or .safetensors, or for PEFT's format be a directory (one with "
        f"a dot in its name must exist), got {str(path)!r}"
    )


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, LayerConfig]]:
    """The tensors, wrapper prefixes dropped, and the layers that metadata or config describe."""
    kind = _kind(path)
    if kind == "directory":
        try:
            state, described = read_directory(path)
            return _by_clean_name(state), described
        except ValueError as error:
            raise AdapterMismatchError(f"{path}: {error}") from None
    if not path.is_file():
        raise FileNotFoundError(f"no adapter file at {path}; check the path")
    described = {}
    try:
        if kind == "torch":
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
        else:
            with safetensors.safe_open(str(path), framework="pt", device="cpu") as file:
                content = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                described = _described((file.metadata() or {}).get(_METADATA))
    except Exception as error:  # damaged files raise anything at all in torch.load
        if isinstance(error, pickle.UnpicklingError) and "global" in str(error).lower():
            raise AdapterMismatchError(
                f"{path} is not a plain dictionary of tensors: it holds pickled objects, which "
                "could run code and are never loaded"
            ) from None
        # torch's own words on a pickle advise to load it unsafely.
        said = "" if isinstance(error, pickle.UnpicklingError) else f" ({_first_line(error)})"
        raise AdapterMismatchError(
            f"{path} cannot be read as an adapter file, it may be damaged or of another kind{said}"
            "; fetch it again, or write it anew with save_lora"
        ) from None
    if not isinstance(content, Mapping):
        raise AdapterMismatchError(
            f"{path} holds a {type(content).__name__}, not a dictionary of tensors"
        )
    try:
        return _by_clean_name({str(key): value for key, value in content.items()}), described
    except ValueError as error:
        raise AdapterMismatchError(f"{path}: {error}") from None


def _by_clean_name(named: Mapping[str, Value]) -> dict[str, Value]:
    """The same values by their names without wrapper prefixes.

    Raises:
        ValueError: two names become one.
    """
    clean: dict[str, Value] = {}
    for name, value in named.items():
        if strip_wrappers(name) in clean:
            raise ValueError(
                f"{strip_wrappers(name)!r} is there twice, with and without a wrapper's prefix"
            )
        clean[strip_wrappers(name)] = value
    return clean


def _described(metadata: str | None) -> dict[str, LayerConfig]:
    if metadata is None:
        return {}
    content = json.loads(metadata)
    if content["version"] != _VERSION:
        raise ValueError(
            f"its metadata is of version {content['version']}, this library reads {_VERSION}"
        )
    modules = content["modules"]
    return {name: LayerConfig(**layer) for name, layer in modules.items()}


def _pairs(state: Mapping[str, Any], path: Path) -> dict[str, dict[str, Tensor]]:
    """Sort ``state`` into ``{module: {"A": …, "B": …}}``, or say what is wrong with it."""
    problems = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        factor = next((f for f, suffix in _SUFFIXES.items() if key.endswith(suffix)), None)
        if factor is None:
            problems.append(f"unexpected key {key!r} (keys end in .lora.A.weight, .lora.B.weight)")
        elif not isinstance(tensor, Tensor) or tensor.dtype not in DTYPES:
            came = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            problems.append(f"{key}: expected a floating-point tensor, found {came}")
        elif tensor.layout != torch.strided:
            problems.append(f"{key}: expected a dense tensor, found {tensor.layout}")
        elif tensor.dim() != 2 or 0 in tensor.shape:
            problems.append(f"{key}: expected a matrix, found shape {tuple(tensor.shape)}")
        elif not torch.isfinite(tensor).all():
            problems.append(f"{key}: holds NaN or infinity")
        else:
            pairs.setdefault(key.removesuffix(_SUFFIXES[factor]), {})[factor] = tensor
    for name, pair in pairs.items():
        problems += [
            f"missing key {name}{suffix}"
            for factor, suffix in _SUFFIXES.items()
            if factor not in pair and name + suffix not in state
        ]
    if problems or not pairs:
        what = "\n  ".join(problems) if problems else "it holds no tensors"
        raise AdapterMismatchError(
            f"{path} is not a LoRA adapter that can be loaded; nothing was changed.\n  {what}"
        )
    return pairs


def _trial_layers(
    model: nn.Module,
    wanted: Mapping[str, LayerConfig],
    by_clean_name: Mapping[str, str],
    path: Path,
) -> dict[str, LoRALinear]:
    """What the layers would be, on the meta device, to hold the file against."""
    problems, layers = [], {}
    modules = dict(model.named_modules())
    for name, layer in wanted.items():
        module = modules.get(by_clean_name.get(name, ""))
        if name not in by_clean_name:
            problems.append(f"the model has no module {name!r}")
        elif type(module) is not nn.Linear:
            problems.append(f"{name!r} is a {type(module).__name__}, not an nn.Linear")
        elif is_sharded(module.weight):
            problems.append(f"{name!r} is sharded already; load the adapter before fully_shard")
        elif module.weight.is_meta:
            problems.append(f"{name!r} is on the meta device; give the model memory first")
        else:
            layers[name] = LoRALinear(
                module.in_features,
                module.out_features,
                rank=layer.rank,
                alpha=layer.alpha,
                dropout=layer.dropout,
                use_rslora=layer.use_rslora,
                device="meta",
                dtype=module.weight.dtype,
            )
    if problems:
        raise AdapterMismatchError(
            f"{path} does not fit the model; nothing was loaded.\n  " + "\n  ".join(problems)
        )
    return layers


def _differences(
    name: str,
    layer: LoRALinear,
    pair: Mapping[str, Tensor],
    described: LayerConfig | None,
    fresh: bool,
) -> list[str]:
    problems = []
    for factor, suffix in _SUFFIXES.items():
        weight = getattr(layer.lora, factor).weight
        if weight.shape != pair[factor].shape:
            problems.append(
                f"{name}{suffix}: expected {list(weight.shape)}, found {list(pair[factor].shape)}"
            )
        elif not torch.isfinite(pair[factor].to(weight.dtype)).all():
            problems.append(f"{name}{suffix}: too large for the model's {weight.dtype}")
        if weight.is_meta and not fresh:
            problems.append(f"{name}{suffix}: is on the meta device; give the model memory first")
    if described is not None and described.scale != layer.scale:
        problems.append(
            f"{name}: the file was trained with scale {described.scale:g} (rank {described.rank}, "
            f"alpha {described.alpha}), the model has {layer.scale:g}; apply LoRA with that alpha"
        )
    return problems


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _first_line(error: Exception) -> str:
    return (str(error) or repr(error)).splitlines()[0]
