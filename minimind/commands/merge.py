"""`minimind merge`: an adapter folded into its base, for good."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lora_kernels import lora_layers, merge_lora

from ..data.tokenizer import save_tokenizer
from ..files import clear_up, staged
from ..model.checkpoint import load_adapter, save_model
from ..model.transformer import MiniMindLM
from ..settings import Settings
from ..training.directory import unused
from ..training.loop import DTYPES
from ..training.prepare import load_base, user_errors
from ..training.report import command_line


def merge(options: argparse.Namespace) -> None:
    """Fold ``options.lora`` into its base, in float32, and save the plain model.

    Raises:
        UsageError: a file or an option is wrong; nothing has been written then.
    """
    with user_errors():
        if options.lora is None:
            raise ValueError("merge needs an adapter; name one by --lora")
        if options.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {options.dtype!r}")
        out = Path(options.out)
        for line in clear_up(out):
            print(line, flush=True)
        unused(out)
        model, tokenizer = load_base(Settings(base=options.base, tokenizer=options.tokenizer))
        load_adapter(model, options.lora)
        dtype = DTYPES[options.dtype]
        report = fold(model, dtype)
        with staged(out, unused) as stage:
            save_model(model, stage, dtype)
            save_tokenizer(tokenizer, stage)
    print("\n".join(report))
    print(f"wrote {out}/\nnext:  {command_line('chat', '--base', out)}")


def fold(model: MiniMindLM, dtype: torch.dtype) -> list[str]:
    """Fold the model's adapter in, in float32, and say what saving in ``dtype`` loses of it.

    Returns:
        A line for each module: the distance between the merged weight and itself in ``dtype``, as
        a share of what the adapter adds.

    Raises:
        ValueError: a merged weight would not be finite.
    """
    deltas = {name: layer.delta_weight() for name, layer in lora_layers(model).items()}
    merged = merge_lora(model)
    name_of_dtype = str(dtype).removeprefix("torch.")
    lines = [f"merged {len(merged)} modules in float32; what is lost by saving in {name_of_dtype}:"]
    for name in merged:
        weight = model.get_parameter(f"{name}.weight").detach()
        size = deltas[name].norm()
        lost = (weight.to(dtype).float() - weight).norm() / size if size else 0.0
        lines.append(f"  {name}: {lost:.2%} of the adapter's own size")
    return lines
