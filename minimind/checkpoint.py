"""Read and write MiniMind's weights: whole, checked, or not at all.

A file's era is told from the names and shapes of its tensors. This version runs the weights of
2025-02 and says so of the others.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lora_kernels.adapters.storage import write_atomically
from lora_kernels.adapters.surgery import strip_wrappers

from .config import LMConfig
from .model import MiniMindLM

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
SUPPORTED_ERA = "2025-02"

_DERIVED = re.compile(r"(^|\.)(pos_cis|freqs_cos|freqs_sin|inv_freq|mask|causal_mask)$")
_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_ERA_MARKS = {
    "2026-03": re.compile(r"\.self_attn\.[qk]_norm\.weight$"),
    "2025-04": re.compile(r"\.self_attn\.[qkvo]_proj\.weight$"),
    "2025-02": re.compile(r"(^|\.)layers\.\d+\.attention\.w[qkvo]\.weight$"),
}


class CheckpointError(ValueError):
    """A weight or configuration file that cannot be used; the text says why and what to do."""


def recognise_era(names_to_shapes: Mapping[str, Sequence[int]]) -> str:
    """Tell which MiniMind a state dict belongs to.

    Args:
        names_to_shapes: tensor names, without wrapper prefixes, and their shapes.

    Returns:
        ``"2025-02"`` (``layers.N.attention.wq``, interleaved rotary pairs), ``"2025-04"``
        (``model.layers.N.self_attn.q_proj``, half-split pairs) or ``"2026-03"`` (the same with a
        norm on each query and key head).

    Raises:
        CheckpointError: none of them, or a mixture.
    """
    matrices = [name for name, shape in names_to_shapes.items() if len(shape) == 2]
    vectors = [name for name, shape in names_to_shapes.items() if len(shape) == 1]
    found = {
        era
        for era, mark in _ERA_MARKS.items()
        if any(mark.search(name) for name in (vectors if era == "2026-03" else matrices))
    }
    if "2026-03" in found:
        found.discard("2025-04")  # the later era kept the projections' names
    if len(found) == 1:
        return found.pop()
    if any(".lora." in name or "lora_A" in name for name in names_to_shapes):
        raise CheckpointError(
            "these tensors are a LoRA adapter, not a model; load the base model's weights first, "
            "then put the adapter on it with lora_kernels.load_lora"
        )
    raise CheckpointError(
        f"expected the weights of one MiniMind, got names that fit "
        f"{'several: ' + ', '.join(sorted(found)) if found else 'none'} "
        f"({_some(sorted(names_to_shapes)) or 'no tensors at all'}); check that this is the file "
        "you meant"
    )


def load_model(
    path: str | os.PathLike[str],
    config: LMConfig | Mapping[str, Any] | str | os.PathLike[str] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> MiniMindLM:
    """Build a model from a weight file, or from a directory that ``save_model`` wrote.

    Every name, shape and value is checked before the model exists. Prefixes that wrappers leave
    (``module.``, ``_orig_mod.``) are dropped, and so are tables that old files carry but that are
    computed anew (``pos_cis``, masks). Nothing in a file is executed.

    Args:
        path: ``.pth``, ``.pt``, ``.bin`` or ``.safetensors`` file, or a directory with
            ``model.safetensors``.
        config: the sizes, as a configuration, a dictionary or the path of a JSON file. None looks
            beside the weights for ``<stem>.config.json``, then ``config.json``, and failing both
            infers the sizes from the shapes. The number of heads leaves no trace in the shapes:
            every model published in 2025-02 has 8 query and 2 key heads, so that is assumed where
            the shapes allow it, and asked for where they do not.
        dtype: of the model's weights; None is float32, whatever the file holds.

    Returns:
        The model on the CPU, in eval mode.

    Raises:
        FileNotFoundError: no such weight or configuration file.
        CheckpointError: unreadable, of another era, incomplete, mis-shaped or not finite.
    """
    weights_path = _weights_path(Path(path))
    state = _read_tensors(weights_path)
    try:
        era = recognise_era({name: tuple(tensor.shape) for name, tensor in state.items()})
    except CheckpointError as error:
        raise CheckpointError(f"{weights_path}: {error}") from None
    if era != SUPPORTED_ERA:
        raise CheckpointError(
            f"{weights_path} holds weights of MiniMind {era}; this version runs {SUPPORTED_ERA} "
            f"weights only; take a {SUPPORTED_ERA} file or a later version of this package"
        )
    lm_config, source = _find_config(config, weights_path, state)
    # Nothing is drawn or allocated for weights that are about to be replaced.
    with torch.device("meta"):
        model = MiniMindLM(lm_config)
    tied = lm_config.tie_word_embeddings
    if tied:
        _complete_tied(state, weights_path)
    _check_names_and_shapes(state, model.state_dict(), weights_path, source)
    state = _converted(state, dtype or torch.float32, weights_path)
    model.load_state_dict(state, assign=True)
    if tied:
        model.output.weight = model.tok_embeddings.weight
    return model.eval()


def save_model(
    model: MiniMindLM, directory: str | os.PathLike[str], dtype: torch.dtype | None = None
) -> None:
    """Write ``config.json`` and ``model.safetensors``, each complete or not at all.

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
            f"{_some(strangers)}; merge or remove adapters and unwrap the model before saving"
        )
    if model.output.weight is model.tok_embeddings.weight:
        del state[_HEAD]
    state = {
        name: tensor.detach().to("cpu", dtype or tensor.dtype).contiguous()
        for name, tensor in state.items()
    }
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = state[_EMBEDDING].dtype
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    text = config.to_json_string()
    write_atomically(
        folder / WEIGHTS_NAME, lambda temporary: save_file(state, temporary, {"format": "pt"})
    )
    write_atomically(
        folder / CONFIG_NAME, lambda temporary: temporary.write_text(text, encoding="utf-8")
    )


def _weights_path(path: Path) -> Path:
    if path.is_dir():
        if not (path / WEIGHTS_NAME).is_file():
            raise FileNotFoundError(
                f"{path} has no {WEIGHTS_NAME}; give the weight file itself, or a directory that "
                "save_model or save_pretrained wrote"
            )
        return path / WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(f"no weight file at {path}; check the path")
    return path


def _read_tensors(path: Path) -> dict[str, Tensor]:
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
    except Exception as error:  # the readers raise whatever a garbled byte leads them to
        raise CheckpointError(
            f"{path} could not be read as plain tensors ({type(error).__name__}: "
            f"{str(error).splitlines()[0] if str(error) else 'no detail'}); the file is damaged, "
            "incomplete or of another kind: fetch or save it again"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in content.items()
    ):
        raise CheckpointError(
            f"{path}: expected a dictionary of names and tensors, got {_describe(content)}; save "
            "the model's state_dict() alone"
        )
    state: dict[str, Tensor] = {}
    for name, tensor in content.items():
        bare = strip_wrappers(name)
        if _DERIVED.search(bare):
            continue
        if bare in state:
            raise CheckpointError(
                f"{path}: {bare} is there twice, once under a wrapper's prefix; save the unwrapped "
                "model's state_dict()"
            )
        state[bare] = tensor
    return state


def _find_config(
    config: Any, weights_path: Path, state: Mapping[str, Tensor]
) -> tuple[LMConfig, str]:
    """The configuration and, for messages, where it came from."""
    if isinstance(config, LMConfig):
        return config, "the given configuration"
    if isinstance(config, Mapping):
        return _config_from(config, "the given configuration"), "the given configuration"
    if isinstance(config, (str, os.PathLike)):
        return _read_config(Path(config)), str(config)
    if config is not None:
        raise TypeError(
            f"config must be an LMConfig, a dictionary, a path or None, got "
            f"{type(config).__name__}; pass LMConfig(...)"
        )
    for name in (f"{weights_path.stem}.config.json", CONFIG_NAME):
        if (neighbour := weights_path.with_name(name)).is_file():
            return _read_config(neighbour), str(neighbour)
    return _infer_config(state, weights_path), "sizes inferred from the file's own shapes"


def _read_config(path: Path) -> LMConfig:
    if not path.is_file():
        raise FileNotFoundError(f"no configuration file at {path}; check the path")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{path} is not valid JSON ({error}); correct it or pass config as a dictionary"
        ) from error
    return _config_from(content, str(path))


def _config_from(content: Any, source: str) -> LMConfig:
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"{source}: expected a JSON object of LMConfig's arguments, got {_describe(content)}; "
            'write it as {"dim": 512, "n_layers": 8}'
        )
    try:
        return LMConfig(**{key: value for key, value in content.items() if key != "model_type"})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _infer_config(state: Mapping[str, Tensor], path: Path) -> LMConfig:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    layers = [int(found[1]) for name in shapes if (found := re.match(r"layers\.(\d+)\.", name))]
    gate = shapes.get("layers.0.feed_forward.gate.weight")
    inner = "layers.0.feed_forward." + ("w1.weight" if gate is None else "experts.0.w1.weight")
    table = shapes.get(_EMBEDDING) or shapes.get(_HEAD)
    keys = shapes.get("layers.0.attention.wk.weight")
    usual = LMConfig()
    if (
        table is None
        or keys is None
        or inner not in shapes
        or any(len(shape) != 2 for shape in (table, keys, shapes[inner]))
    ):
        raise CheckpointError(
            f"{path}: the sizes cannot be inferred, expected {_EMBEDDING}, "
            f"layers.0.attention.wk.weight and {inner}, got {_some(sorted(shapes))}; the file is "
            "incomplete"
        )
    vocab_size, dim = table
    if dim % (2 * usual.n_heads) or keys[0] * usual.n_heads != dim * usual.n_kv_heads:
        raise CheckpointError(
            f"{path}: the number of heads cannot be inferred, expected the usual {usual.n_heads} "
            f"query and {usual.n_kv_heads} key heads, got wk of shape {list(keys)} at dim {dim}; "
            "pass config with n_heads and n_kv_heads"
        )
    experts: dict[str, Any] = {}
    if gate is not None:
        shared = any(".shared_experts." in name for name in shapes)
        experts = {"use_moe": True, "n_routed_experts": gate[0], "n_shared_experts": int(shared)}
        experts["num_experts_per_tok"] = min(usual.num_experts_per_tok, gate[0])
    return LMConfig(
        dim=dim,
        vocab_size=vocab_size,
        n_layers=max(layers) + 1,
        hidden_dim=shapes[inner][0],
        **experts,
    )


def _complete_tied(state: dict[str, Tensor], path: Path) -> None:
    """Let the one tensor that the file has stand for both names; two must agree."""
    here = [state[name] for name in (_EMBEDDING, _HEAD) if name in state]
    # NaN differs from itself but has a message of its own.
    if len(here) == 2 and not torch.equal(*(tensor.float().nan_to_num() for tensor in here)):
        raise CheckpointError(
            f"{path}: {_EMBEDDING} and {_HEAD} differ, expected one shared tensor; pass config "
            "with tie_word_embeddings=False if they were trained apart"
        )
    if here:
        state[_EMBEDDING] = state[_HEAD] = here[0]


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
    faults = [f"{kind}: {_some(names)}" for kind, names in groups.items() if names]
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
            f"{path}: NaN or infinite values as {dtype} in {_some(bad)}; the training that wrote "
            "them diverged or the dtype is too narrow: take an earlier checkpoint or a wider dtype"
        )
    return {name: copies[id(tensor)] for name, tensor in state.items()}


def _some(names: Sequence[str], limit: int = 6) -> str:
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        return f"a dictionary with {_some([str(key) for key in content])}"
    return f"a {type(content).__name__}"
