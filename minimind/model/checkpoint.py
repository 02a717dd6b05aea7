"""Read and write MiniMind's weights: whole, checked, or not at all.

A file's era is told from the names and shapes of its tensors (`eras`); a configuration
that lies with it is read in whichever words it is written.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_kernels import AdapterMismatchError, load_lora, read_adapter

from ..files import staged
from .config import LMConfig
from .eras import (
    ERAS,
    CheckpointError,
    adapter_eras,
    file_arguments,
    infer_arguments,
    recognise_era,
    some,
)
from .reading import config_of, describe, hold_against, on_meta, read_json, read_tensors
from .transformer import MiniMindLM

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
ADAPTER_NAME = "adapter.safetensors"
_PICKLED_WEIGHTS_NAME = "pytorch_model.bin"  # of transformers directories, before safetensors


def load_model(
    path: str | os.PathLike[str],
    config: LMConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> MiniMindLM:
    """Build a model of any era from a weight file or a directory.

    The era is told from the names and shapes alone. Every name, shape and value is checked before
    the model exists. Prefixes that wrappers leave (``module.``, ``_orig_mod.``) are dropped, and so
    are tables that old files carry but that are computed anew (``pos_cis``, masks). Nothing in a
    file is executed.

    Args:
        path: ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file, or a directory with
            ``model.safetensors`` or ``pytorch_model.bin``: what `save_model` or ``save_pretrained``
            wrote, of a MiniMind or of a Llama or Qwen3 that one was made into.
        config: the sizes, as a configuration, a dictionary or the path of a JSON file; in the words
            of `LMConfig`, or of the original's or transformers' ``config.json``. None looks beside
            the weights for ``<stem>.config.json``, then ``config.json``, and failing both infers
            the sizes from the shapes. Some leave no trace there: rotary base, norm epsilon, longest
            sequence and experts per token take the era's usual values (`eras.untraceable` lists
            them). So does the number of heads before 2026-03, 8 query and 2 key heads, where the
            shapes allow it; where they do not, it is asked for.
        dtype: of the model's weights; None is float32, whatever the file holds.

    Returns:
        The model on the CPU, in eval mode; ``model.config.era`` is its era.

    Raises:
        FileNotFoundError: no such weight or configuration file.
        CheckpointError: unreadable, of no era or another than the configuration says, incomplete,
            mis-shaped or not finite.
    """
    path = weights_path(path)
    state = read_tensors(path)
    try:
        era = recognise_era({name: tuple(tensor.shape) for name, tensor in state.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None
    lm_config, source = _find_config(config, path, state, era)
    hold_against(lm_config, state, source, path)
    # Nothing is drawn or allocated for weights that are about to be replaced.
    with on_meta(source):
        model = MiniMindLM(lm_config)
    tied = lm_config.tie_word_embeddings
    if tied:
        _complete_tied(state, _tied_names(era), path)
    _check_names_and_shapes(state, model.state_dict(), path, source)
    state = _converted(state, dtype or torch.float32, path)
    model.load_state_dict(state, assign=True)
    if tied:
        _tie(model)
    return model.eval()


def adapter_path(path: str | os.PathLike[str]) -> Path:
    """``path``, or the adapter in it where it is the directory of a run of `minimind finetune`.

    Raises:
        CheckpointError: that is a link that leads out of the directory.
    """
    path = Path(path)
    if not os.path.lexists(path / ADAPTER_NAME):
        return path
    refuse_escape(path, ADAPTER_NAME)
    return path / ADAPTER_NAME


def load_adapter(model: MiniMindLM, path: str | os.PathLike[str]) -> list[str]:
    """`lora_kernels.load_lora`, which says so if the adapter is of another era than the model.

    Args:
        path: as there, or the directory of a run.

    Raises:
        AdapterMismatchError, FileNotFoundError, ValueError: as `load_lora` and `adapter_path`.
    """
    path = adapter_path(path)
    try:
        return load_lora(model, path)
    except AdapterMismatchError:
        eras = adapter_eras(read_adapter(path)[0])
        if not eras or model.config.era in eras:
            raise
        raise AdapterMismatchError(
            f"{path} is an adapter for a MiniMind of {' or '.join(eras)}, the base is of "
            f"{model.config.era}, whose modules have other names; take the base that it was "
            "trained on"
        ) from None


def save_model(
    model: MiniMindLM, directory: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors``, both or neither.

    The directory can be read by :func:`load_model` and by ``MiniMindLM.from_pretrained``. The
    tensor that embedding and head share is written once.

    Args:
        model: the model, without LoRA (merge it first).
        directory: made if it does not exist.
        dtype: of the written weights; None keeps each tensor's own.

    Raises:
        ValueError: the model's tensors are not those of its configuration.
    """
    with torch.device("meta"):
        expected = MiniMindLM(model.config).state_dict()
    state = model.state_dict()
    if strangers := sorted(state.keys() ^ expected.keys()):
        raise ValueError(
            f"model must have the tensors of its configuration alone, got a difference in "
            f"{some(strangers)}; merge or remove adapters and unwrap the model before saving"
        )
    embedding, head = _tied_names(model.config.era)
    if state[embedding].data_ptr() == state[head].data_ptr():
        del state[head]
    state = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = state[embedding].dtype
    with staged(Path(directory)) as stage:
        stage.mkdir()
        save_file(state, stage / WEIGHTS_NAME, {"format": "pt"})
        (stage / CONFIG_NAME).write_text(config.to_json_string(), encoding="utf-8")


def weights_path(path: str | os.PathLike[str]) -> Path:
    """The weight file that ``path`` is or, as a directory, holds.

    Raises:
        FileNotFoundError: there is none.
        CheckpointError: it is split into several, or a link that leads out of the directory.
    """
    path = Path(path)
    if path.is_dir():
        for name in (WEIGHTS_NAME, _PICKLED_WEIGHTS_NAME):
            if os.path.lexists(path / name):
                refuse_escape(path, name)
                return path / name
        if split := next(path.glob("*.index.json"), None):
            raise CheckpointError(
                f"{path} holds weights in several files ({split.name}); save them as one, by "
                "save_pretrained with a larger max_shard_size"
            )
        raise FileNotFoundError(
            f"{path} has no {WEIGHTS_NAME}; give the weight file itself, or a directory that "
            "save_model or save_pretrained wrote"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}; check the path")
    return path


def refuse_escape(directory: Path, name: str) -> None:
    """Raise CheckpointError if ``name`` in ``directory`` is a link that leads out of it.

    A link from a hub download's snapshot into the blobs beside it stays inside the download.
    """
    target, inside = (directory / name).resolve(), [directory.resolve()]
    if inside[0].parent.name == "snapshots":
        inside.append(inside[0].parent.parent / "blobs")
    if not any(target.is_relative_to(folder) for folder in inside):
        raise CheckpointError(
            f"{directory / name} is a link to {target}, outside the directory, and is not "
            "followed; copy the file itself there"
        )


def config_beside(weights: Path) -> Path | None:
    """The configuration file that lies beside a weight file, if one does."""
    for name in (f"{weights.stem}.config.json", CONFIG_NAME):
        if os.path.lexists(weights.with_name(name)):
            refuse_escape(weights.parent, name)
            return weights.with_name(name)
    return None


def _find_config(
    config: Any, weights: Path, state: Mapping[str, Tensor], era: str
) -> tuple[LMConfig, str]:
    """The configuration and, for messages, where it came from."""
    if isinstance(config, LMConfig):
        if config.era != era:
            raise CheckpointError(
                f"{weights} holds weights of MiniMind {era}, the given configuration is of "
                f"{config.era}; pass LMConfig(era={era!r}, ...)"
            )
        return config, "the given configuration"
    if isinstance(config, Mapping):
        source = "the given configuration"
        return _config_from(config, source, state, era), source
    if isinstance(config, (str, os.PathLike)):
        return _read_config(Path(config), state, era), str(config)
    if config is not None:
        raise TypeError(
            f"config must be an LMConfig, a dictionary, a path or None, got "
            f"{type(config).__name__}; pass LMConfig(...)"
        )
    if beside := config_beside(weights):
        return _read_config(beside, state, era), str(beside)
    try:
        arguments = infer_arguments(era, {n: tuple(t.shape) for n, t in state.items()})
        inferred = LMConfig(**arguments, tie_word_embeddings=_looks_tied(state, era))
    except ValueError as error:
        raise CheckpointError(f"{weights}: {error}") from None
    return inferred, "sizes inferred from the file's own shapes"


def _read_config(path: Path, state: Mapping[str, Tensor], era: str) -> LMConfig:
    return _config_from(read_json(path), str(path), state, era)


def _config_from(content: Any, source: str, state: Mapping[str, Tensor], era: str) -> LMConfig:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source}: expected a JSON object of LMConfig's arguments, got {describe(content)}; "
            'write it as {"dim": 512, "n_layers": 8}'
        )
    try:
        arguments = file_arguments(content, era)
        if "hidden_size" in content:  # words in which nothing said of tying has no one meaning
            arguments.setdefault("tie_word_embeddings", _looks_tied(state, era))
        return config_of(arguments)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _tied_names(era: str) -> tuple[str, str]:
    """The names of the two tensors that are one where embedding and head are tied."""
    names = ERAS[era].names
    return names.path(f"{names.embedding}.weight"), f"{names.head}.weight"


def _looks_tied(state: Mapping[str, Tensor], era: str) -> bool:
    here = [state[name] for name in _tied_names(era) if name in state]
    return len(here) < 2 or here[0].shape != here[1].shape or bool(_same(*here))


def _same(one: Tensor, other: Tensor) -> bool:
    # NaN differs from itself but has a message of its own.
    return torch.equal(one.float().nan_to_num(), other.float().nan_to_num())


def _tie(model: MiniMindLM) -> None:
    head: Any = model.get_output_embeddings()
    head.weight = model.get_input_embeddings().weight


def _complete_tied(state: dict[str, Tensor], names: tuple[str, str], path: Path) -> None:
    """Let the one tensor that the file has stand for both names; two must agree."""
    here = [state[name] for name in names if name in state]
    if len(here) == 2 and not _same(*here):
        raise CheckpointError(
            f"{path}: {' and '.join(names)} differ, expected one shared tensor; pass config "
            "with tie_word_embeddings=False if they were trained apart"
        )
    if here:
        state.update(dict.fromkeys(names, here[0]))


def _check_names_and_shapes(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, source: str
) -> None:
    missing = [f"{name} {list(expected[name].shape)}" for name in expected if name not in state]
    unexpected = [f"{name} {list(state[name].shape)}" for name in state if name not in expected]
    misshaped = [
        f"{name} expected {list(expected[name].shape)} found {list(state[name].shape)}"
        for name in expected
        if name in state and state[name].shape != expected[name].shape
    ]
    groups = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    faults = [f"{kind}: {some(names)}" for kind, names in groups.items() if names]
    if faults:
        raise CheckpointError(
            f"{path} does not fit {source}; {'; '.join(faults)}; pass the config that the weights "
            "were trained with, or fetch the file again if it is incomplete"
        )


def _converted(state: Mapping[str, Tensor], dtype: torch.dtype, path: Path) -> dict[str, Tensor]:
    """Own copies in ``dtype``; shared tensors are converted once, and every value is finite."""
    copies: dict[int, Tensor] = {}
    bad = []
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise CheckpointError(
                f"{path}: {name} must be floating point, got {tensor.dtype}; dequantise the "
                "weights first"
            )
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().to(dtype, copy=True).contiguous()
            if not bool(torch.isfinite(copies[id(tensor)]).all()):
                bad.append(name)
    if bad:
        raise CheckpointError(
            f"{path}: NaN or infinite values as {dtype} in {some(bad)}; the training that wrote "
            "them diverged or the dtype is too narrow: take an earlier checkpoint or a wider dtype"
        )
    return {name: copies[id(tensor)] for name, tensor in state.items()}
