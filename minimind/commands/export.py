"""`minimind export`: a model in the format of transformers, or as the original's `.pth`."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from lora_kernels import __version__, disable_lora, lora_layers, save_lora

from ..data.tokenizer import save_tokenizer
from ..files import clear_up, staged
from ..model.checkpoint import CONFIG_NAME, WEIGHTS_NAME, load_adapter
from ..model.hub_format import Layout, config_json, copy_adapter, exact_layout, hub_tensors
from ..model.transformer import MiniMindLM
from ..settings import Settings
from ..training.loop import DTYPES
from ..training.prepare import load_base, user_errors
from ..training.report import command_line
from .merge import fold

MANIFEST, GENERATION, ADAPTER = "export.json", "generation_config.json", "adapter"
# Of the largest logit: float32 sums in another order differ by less than a tenth of this.
TOLERANCE = 1e-4


class ExportError(ValueError):
    """What was about to be written does not compute what the model does."""


def export(options: argparse.Namespace) -> None:
    """Write ``options.base``, with ``options.lora`` folded in or beside it, to ``options.out``.

    Raises:
        UsageError: a file or an option is wrong; nothing has been written then.
    """
    with user_errors():
        if options.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {options.dtype!r}")
        if options.merge and options.lora is None:
            raise ValueError("--merge needs an adapter to fold in; name one by --lora")
        if options.to == "pth" and options.lora is not None and not options.merge:
            raise ValueError(
                "a .pth holds a model alone, and adapters for it stay files of their own; fold "
                "this one in by --merge, or leave --lora out"
            )
        out, dtype = Path(options.out), DTYPES[options.dtype]
        for line in clear_up(out):
            print(line, flush=True)
        (unused_file if options.to == "pth" else replaceable)(out)
        model, tokenizer = load_base(Settings(base=options.base, tokenizer=options.tokenizer))
        if options.to == "hf":
            exact_layout(model.config)  # said before the adapter is read
        if options.lora is not None:
            load_adapter(model, options.lora)
        lines = fold(model, dtype) if options.merge else []
        if options.to == "pth":
            write_pth(model, out, dtype)
            lines.append(f"wrote {out}: MiniMind {model.config.era} under the original's names")
        else:
            lines += write_hub(model, tokenizer, out, dtype)
    print("\n".join(lines))


def write_pth(model: MiniMindLM, path: Path, dtype: torch.dtype) -> None:
    """Write the plain state dict of the model, under its era's names, whole or not at all.

    Raises:
        ValueError: a weight is too large for ``dtype``.
    """
    copies = {
        tensor.data_ptr(): tensor.detach().to("cpu", dtype).clone()
        for tensor in model.state_dict().values()
    }
    state = {name: copies[tensor.data_ptr()] for name, tensor in model.state_dict().items()}
    if lost := [name for name, tensor in state.items() if not bool(tensor.isfinite().all())]:
        raise ValueError(f"{lost[0]} is too large for {dtype}; choose another --dtype")
    with staged(path, unused_file) as stage:
        torch.save(state, stage)


def write_hub(model: MiniMindLM, tokenizer: Any, out: Path, dtype: torch.dtype) -> list[str]:
    """Write a transformers directory, with the adapter of the model beside it if it has one.

    All is written next to ``out`` first, loaded by transformers and compared with the model; then
    it takes its place. The model's weights are rounded to ``dtype`` on the way.

    Returns:
        What was written and how it was checked, as lines.

    Raises:
        ValueError: no architecture is exact, ``out`` is taken, or the adapter cannot stay apart.
        ExportError: transformers computes something else from the files.
    """
    layout = exact_layout(model.config)
    replaceable(out)
    adapted = bool(lora_layers(model))
    name_of_dtype = str(dtype).removeprefix("torch.")
    with staged(out, replaceable) as stage:
        stage.mkdir()
        tensors = hub_tensors(model, layout, dtype)
        save_file(tensors, stage / WEIGHTS_NAME, {"format": "pt"})
        _write_json(
            stage / CONFIG_NAME, _with_ids(config_json(model.config, layout, dtype), tokenizer)
        )
        _write_json(stage / GENERATION, _with_ids({"do_sample": False}, tokenizer))
        save_tokenizer(tokenizer, stage)
        _check_tokenizer(tokenizer, stage)
        exact = _logits(model)
        _round(model, dtype)
        twin, difference = _check_logits(model, layout, stage, adapted)
        if adapted:
            twin.config._name_or_path = str(out)
            folded = not _says_its_scale(twin)
            save_lora(twin, stage / ADAPTER, fold_scale=folded)
        files = sorted(str(f.relative_to(stage)) for f in stage.rglob("*") if f.is_file())
        manifest = {
            "written_by": f"lora_kernels {__version__}",
            "era": model.config.era,
            "architecture": layout.architecture,
            "dtype": name_of_dtype,
            "files": [*files, MANIFEST],
        }
        _write_json(stage / MANIFEST, manifest)
    moved = (_logits(model) - exact).abs().max()
    lines = [
        f"wrote {out}/: {layout.architecture} in {name_of_dtype}, tokenizer, chat template, "
        "generation config",
        f"  rounding to {name_of_dtype} moves a logit by up to {moved:.2g} "
        f"(of {exact.abs().max():.3g})",
        f"  checked: transformers {transformers.__version__} gives the same logits from these "
        f"files, to {difference:.1g}",
    ]
    if adapted:
        lines.append(
            f"  {ADAPTER}/: the adapter for it, in PEFT's format, names and rows translated"
            + ("; scale multiplied into B, for readers that know r and lora_alpha alone" * folded)
        )
    if layout.model_type in ("llama", "qwen3", "qwen3_moe"):
        lines.append(f"next:  {command_line('chat', '--base', out)}")
    return lines


def _says_its_scale(model: torch.nn.Module) -> bool:
    """Whether one ``lora_alpha``, by each tensor's rank, is the scale of every layer.

    That is how llama.cpp takes it, whatever ``use_rslora`` and the patterns say.
    """
    configs = [layer.lora_config for layer in lora_layers(model).values()]
    return not any(c.use_rslora for c in configs) and len({c.scale * c.rank for c in configs}) == 1


def unused_file(path: Path) -> None:
    """Raise ValueError unless ``path`` is a new file's name that ends in ``.pth``."""
    if path.suffix != ".pth":
        raise ValueError(f"--to pth writes a .pth file, got {path}; give a name that ends in .pth")
    if os.path.lexists(path):
        raise ValueError(f"{path} exists; nothing was overwritten. Choose another name")


def replaceable(out: Path) -> None:
    """Raise ValueError unless ``out`` is new or empty, or an earlier export and nothing else."""
    if out.is_symlink():
        raise ValueError(f"{out} is a link, which is not followed; give the directory itself")
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file; give a directory, or --to pth for a single file")
    here = {str(f.relative_to(out)) for f in out.rglob("*") if not f.is_dir() or f.is_symlink()}
    strangers = sorted(here - _files_of_export(out))
    if strangers:
        raise ValueError(
            f"{out} holds files that are not an earlier export's ({', '.join(strangers[:3])}); "
            "nothing was overwritten. Choose another directory"
        )


def _files_of_export(out: Path) -> set[str]:
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
        ours = str(manifest["written_by"]).startswith("lora_kernels ")
        return set(manifest["files"]) if ours else set()
    except (OSError, ValueError, LookupError, TypeError):
        return set()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _with_ids(content: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """The tokenizer's special ids, by which generation begins, ends and pads."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {**content, **{name: getattr(tokenizer, name) for name in names}}


def _round(model: MiniMindLM, dtype: torch.dtype) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora." not in name:
                parameter.copy_(parameter.to(dtype))


def _probe(model: MiniMindLM) -> Tensor:
    shape = (2, min(48, model.config.max_seq_len))
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, shape, generator=generator)


@torch.no_grad()
def _logits(model: Any, probe: Tensor | None = None) -> Tensor:
    return model.eval()(input_ids=_probe(model) if probe is None else probe).logits


def _check_logits(
    model: MiniMindLM, layout: Layout, stage: Path, adapted: bool
) -> tuple[Any, float]:
    """Load what was written, put the adapter on it, and compare; the twin and the difference."""
    twin, probe = _load_twin(stage), _probe(model)
    with disable_lora(model) if adapted else contextlib.nullcontext():
        pairs = [(_logits(model), _logits(twin, probe))]
    if adapted:
        copy_adapter(model, layout, twin)
        pairs.append((_logits(model), _logits(twin, probe)))
    difference = max(float((theirs - ours).abs().max()) for ours, theirs in pairs)
    largest = max(float(ours.abs().max()) for ours, _ in pairs)
    if not difference <= TOLERANCE * max(1.0, largest):
        raise ExportError(
            f"transformers {transformers.__version__} computes other logits from the exported "
            f"{layout.architecture}, by up to {difference:.2g} of {largest:.2g}; nothing was "
            "written. Try another version of transformers, and please report this"
        )
    return twin, difference


def _load_twin(stage: Path) -> Any:
    talkative = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return transformers.AutoModelForCausalLM.from_pretrained(
            str(stage), dtype=torch.float32, local_files_only=True, attn_implementation="eager"
        )
    finally:
        if talkative:
            transformers.utils.logging.enable_progress_bar()


def _check_tokenizer(tokenizer: Any, stage: Path) -> None:
    again = transformers.AutoTokenizer.from_pretrained(str(stage), local_files_only=True)
    turns = [{"role": "user", "content": "Tea at 10:30? 两杯茶。"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    same_text = again.apply_chat_template(turns, tokenize=False, add_generation_prompt=True) == text
    ids = [t(text, add_special_tokens=False)["input_ids"] for t in (tokenizer, again)]
    if not same_text or ids[0] != ids[1]:
        raise ExportError(
            f"transformers {transformers.__version__} reads the exported tokenizer otherwise than "
            "it was; nothing was written. Please report this with the tokenizer's files"
        )
