"""Weight and configuration files of strangers: read as plain tensors, and held against themselves.

Nothing is executed. What a file says of its sizes is held against the tensors that it holds before
anything of these sizes is made.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from lora_kernels.adapters import (
    pass_on_what_is_no_damage,
    refuse_overlapping,
    strange_tensor,
    strip_wrappers,
)

from .config import LMConfig
from .eras import CheckpointError, some

_DERIVED = re.compile(r"(^|\.)(pos_cis|freqs_cos|freqs_sin|inv_freq|mask|causal_mask)$")
# Made without a question, each in a millisecond.
_MOST_MODULES = 1000
# What transformers would make something of, of any size, and MiniMind has no use for.
_NOT_OURS = ("num_labels", "id2label", "label2id", "layer_types")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file under their bare names, or CheckpointError."""
    try:
        if path.suffix == ".safetensors":
            content = load_file(path, device="cpu")
        elif path.suffix in (".pth", ".pt", ".bin"):
            content = torch.load(path, map_location="cpu", weights_only=True)
        else:
            raise CheckpointError(
                f"{path}: expected a .pth, .pt, .bin or .safetensors file, got {path.suffix!r}; "
                "rename the file after what it holds"
            )
    except CheckpointError:
        raise
    except BaseException as error:  # the readers raise whatever a garbled byte leads them to
        pass_on_what_is_no_damage(error, path)
        # torch's own words on a pickle advise to load it unsafely.
        torch_says = isinstance(error, pickle.UnpicklingError) or not str(error)
        detail = "no detail" if torch_says else str(error).splitlines()[0]
        raise CheckpointError(
            f"{path} could not be read as plain tensors ({type(error).__name__}: {detail}); "
            "the file is damaged, "
            "incomplete or of another kind: fetch or save it again"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(
            f"{path}: expected a dictionary of names and tensors, got {describe(content)}; save "
            "the model's state_dict() alone"
        )
    state: dict[str, Tensor] = {}
    for name, tensor in content.items():
        if strange := strange_tensor(tensor):
            raise CheckpointError(f"{path}: {name}: {strange}; save plain tensors")
        bare = strip_wrappers(name)
        if _DERIVED.search(bare):
            continue
        if bare in state:
            raise CheckpointError(
                f"{path}: {bare} is there twice, once under a wrapper's prefix; save the unwrapped "
                "model's state_dict()"
            )
        state[bare] = tensor
    try:
        refuse_overlapping(content, path)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return state


def read_json(path: Path) -> Any:
    """What a configuration file holds, or FileNotFoundError or CheckpointError."""
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}; check the path")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); correct it or pass config as a dictionary"
        ) from error


def config_of(arguments: Mapping[str, Any]) -> LMConfig:
    """The configuration that a file's arguments make, without what only transformers reads.

    Raises:
        ValueError, TypeError: they make none.
    """
    plain = (str, int, float, type(None))
    kept = {
        name: value
        for name, value in arguments.items()
        if name not in _NOT_OURS and (isinstance(value, plain) or name == "architectures")
    }
    try:
        return LMConfig(**kept)
    except (TypeError, ValueError, MemoryError):
        raise
    except Exception as error:  # transformers raises anything at all on what it does not expect
        raise ValueError(f"transformers cannot take it ({error!r})") from error


def hold_against(config: LMConfig, state: Mapping[str, Tensor], source: str, path: Path) -> None:
    """Raise CheckpointError where a configuration is of many more modules than the file has names.

    Less than that is said by name, once the modules are there to be compared.
    """
    most = max(_MOST_MODULES, len(state))
    experts = config.n_routed_experts + config.n_shared_experts if config.use_moe else 1
    if config.n_layers * experts > most:
        of_experts = f" of {experts} experts" if config.use_moe else ""
        raise CheckpointError(
            f"{path} does not fit {source}: expected {config.n_layers} layers{of_experts}, the "
            f"file has {len(state)} tensors; pass the config that the weights were trained with"
        )


@contextmanager
def on_meta(source: str) -> Iterator[None]:
    """Make modules without memory; what torch refuses is CheckpointError."""
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: no model can be made of it ({error})") from error


def describe(content: Any) -> str:
    """What something is, in a few words."""
    if isinstance(content, Mapping):
        return f"a dictionary with {some([str(key)[:80] for key in list(content)[:50]])}"
    return f"a {type(content).__name__}"
