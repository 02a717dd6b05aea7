"""`minimind info`: what a model, an adapter, data or this machine is."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

from lora_kernels import __version__, explain, holds_adapter, read_adapter

from ..data.tokenizer import load_tokenizer
from ..model.checkpoint import adapter_path, config_beside, load_model, weights_path
from ..model.eras import adapter_eras, untraceable
from ..training.loop import best_dtype
from ..training.prepare import choose_cache, choose_device, user_errors
from .looking import described, in_colour, is_data


def info(options: argparse.Namespace) -> None:
    """Say what a model, an adapter, data or this machine is.

    Raises:
        UsageError: the path is none of these, or cannot be read.
    """
    with user_errors():
        if options.path is None:
            lines = _machine()
        elif is_data(options.path):
            lines = described(
                options.path,
                load_tokenizer(options.tokenizer),
                options.max_length,
                options.format,
                options.skip_bad,
                choose_cache(options.cache, options.no_cache),
                in_colour(),
            )
        elif not Path(options.path).exists():
            raise FileNotFoundError(f"nothing at {options.path}; check the path")
        elif _is_adapter(adapter_path(options.path)):
            lines = _adapter(adapter_path(options.path))
        else:
            lines = _model(Path(options.path))
    print("\n".join(lines))


def _machine() -> list[str]:
    device = choose_device("auto")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{device}"
    return [
        f"lora_kernels  {__version__}",
        f"torch         {torch.__version__}",
        f"transformers  {transformers.__version__}",
        f"device        {name} ({torch.get_num_threads()} CPU threads)",
        f"dtype         {str(best_dtype(device)).removeprefix('torch.')}",
        f"path          {explain(torch.empty(0, device=device))}",
    ]


def _is_adapter(path: Path) -> bool:
    if path.is_dir():
        return (path / "adapter_config.json").exists()
    return path.suffix in (".safetensors", ".pth", ".pt") and holds_adapter(path)


def _adapter(path: Path) -> list[str]:
    pairs, described = read_adapter(path)
    count = sum(tensor.numel() for pair in pairs.values() for tensor in pair.values())
    eras = " or ".join(adapter_eras(pairs))
    lines = [
        f"LoRA adapter {path}: {count:,} parameters on {len(pairs)} modules"
        + (f" of a MiniMind of {eras}" if eras else "")
    ]
    for name, pair in pairs.items():
        scale = f", scale {described[name].scale:g}" if name in described else ""
        dtype = str(pair["A"].dtype).removeprefix("torch.")
        lines.append(f"  {name}: rank {pair['A'].shape[0]}{scale}, {dtype}")
    return lines


def _model(path: Path) -> list[str]:
    model = load_model(path)
    config = model.config
    lines = [
        f"MiniMind {config.era} model {path}: {sum(p.numel() for p in model.parameters()):,} "
        "parameters",
        f"  dim {config.dim}, {config.n_layers} layers, {config.n_heads} heads, "
        f"{config.n_kv_heads} key-value heads, hidden {config.hidden_dim}, "
        f"vocabulary {config.vocab_size}{', mixture of experts' if config.use_moe else ''}",
    ]
    if config_beside(weights_path(path)) is None:
        assumed = (f"{n} {getattr(config, n)}" for n in untraceable(config.era, config.use_moe))
        lines.append(f"  not in the file, taken as usual then: {', '.join(assumed)}")
    return lines
