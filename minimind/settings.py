"""The options of `minimind finetune` and `minimind sft`, said once: type, default and help.

No torch here, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import Field, asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class TrainingConfig:
    """How to train; every number is checked on construction.

    Args:
        epochs: passes over the data.
        batch_size: samples a batch, of all processes together.
        lr: peak learning rate.
        warmup_steps: optimizer steps of linear warm-up before the cosine.
        accumulation_steps: batches an optimizer step; the last window of an epoch may be shorter.
        grad_clip: largest norm of the gradient; 0 turns clipping off.
        skip_bad_steps: pass over a step whose loss or gradient is not finite, instead of ending.
        log_interval: optimizer steps between two log records.
        save_interval: optimizer steps between two resume points; 0 saves at the end only.
        seed: order of the samples, dropout and initial values.
        num_workers: data-loading processes; 0 loads in this one.
    """

    epochs: int = 5
    batch_size: int = 16
    lr: float = 5e-4
    warmup_steps: int = 0
    accumulation_steps: int = 1
    grad_clip: float = 1.0
    skip_bad_steps: bool = False
    log_interval: int = 10
    save_interval: int = 0
    seed: int = 0
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (
            ("epochs", 1),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("accumulation_steps", 1),
            ("log_interval", 1),
            ("save_interval", 0),
            ("seed", 0),
            ("num_workers", 0),
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name} must be an integer of at least {lowest}, got {value!r}")
        if self.seed >= 2**63:
            raise ValueError(f"seed must be below 2**63, got {self.seed}")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(f"lr must be a positive number, got {self.lr}; try 5e-4")
        if not (math.isfinite(self.grad_clip) and self.grad_clip >= 0):
            raise ValueError(f"grad_clip must be 0 (off) or positive, got {self.grad_clip}; try 1")


TRACKERS = ("tensorboard", "wandb")


def _option(default: Any, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Settings:
    """Everything that decides a run; written to its output directory as ``config.json``."""

    data: str = _option(
        "identity",
        "what to learn: a .jsonl, .json, .csv, .tsv, .txt or .parquet file, or one of these with "
        ".gz, in UTF-8; or a shipped set: base, identity, tea",
    )
    format: str | None = _option(
        None,
        "form of the data: conversations, messages, sharegpt, alpaca, prompt/completion, "
        "prompt/response, question/answer, query/response, input/output, or text (default: told by "
        "the fields of the first row)",
    )
    skip_bad: bool = _option(
        False, "pass over rows of the data that cannot be used, and count them, instead of stopping"
    )
    cache: str | None = _option(
        None,
        "directory where the tokens of larger data are kept for the next run; it can be deleted "
        "at any time (default: ~/.cache/minimind)",
    )
    no_cache: bool = _option(False, "keep them for this run alone")
    out: str | None = _option(None, "directory for results (default: the next free out/NAME-N)")
    base: str | None = _option(
        None,
        "model to start from: a directory or a weight file of any era of MiniMind; 'random' for "
        "fresh weights (default: finetune takes the shipped model, sft starts from random)",
    )
    tokenizer: str | None = _option(
        None, "directory of the tokenizer (default: the base's own if it has one, else the shipped)"
    )
    epochs: int = _option(5, "passes over the data")
    batch_size: int = _option(16, "conversations a batch, of all processes together")
    lr: float = _option(5e-4, "peak learning rate")
    warmup_steps: int = _option(0, "optimizer steps of linear warm-up")
    accumulation_steps: int = _option(1, "batches an optimizer step")
    grad_clip: float = _option(1.0, "largest norm of the gradient, 0 for none")
    skip_bad_steps: bool = _option(
        False,
        "pass over steps whose loss or gradient is not finite, and count them, instead of stopping",
    )
    max_length: int = _option(512, "tokens a conversation; longer ones are cut")
    dim: int | None = _option(
        None, "width of a random base (default: 512), or what the base must have"
    )
    n_layers: int | None = _option(
        None, "layers of a random base (default: 2), or what the base must have"
    )
    use_moe: bool = _option(False, "make a random base a mixture of experts")
    lora: str | None = _option(
        None,
        "adapter to go on training: an earlier run's directory, a file, or a directory in PEFT's "
        "format; its rank, alpha and modules are kept (default: a new one)",
        lora=True,
    )
    rank: int | None = _option(None, "LoRA rank (default: 16)", lora=True)
    alpha: float | None = _option(
        None, "LoRA alpha; the branch is scaled by alpha/rank (default: scale 1)", lora=True
    )
    dropout: float = _option(0.0, "dropout on the LoRA branch's input", lora=True)
    targets: str | None = _option(
        None,
        "modules to adapt: names or endings with commas between (wq,wv; from 2025-04 on "
        "q_proj,v_proj), all-linear, or a regular expression (default: the square linears)",
        lora=True,
    )
    device: str = _option("auto", "cpu, cuda, mps, or auto")
    dtype: str = _option("auto", "precision of the products: float32, bfloat16, float16, or auto")
    num_workers: int = _option(0, "processes that load data")
    log_interval: int = _option(10, "optimizer steps between records in metrics.jsonl")
    save_interval: int = _option(100, "optimizer steps between resume points, 0 for none")
    report_to: str | None = _option(
        None,
        "show metrics in tensorboard, wandb, or both with a comma between, where they are "
        "installed; metrics.jsonl is written anyway (default: neither)",
    )
    seed: int = _option(42, "seed of weights, order and dropout")

    def training(self) -> TrainingConfig:
        """The part that the training loop reads."""
        names = {f.name for f in fields(TrainingConfig)}
        return TrainingConfig(**{k: v for k, v in asdict(self).items() if k in names})


FINETUNE_DEFAULTS: dict[str, Any] = {"epochs": 2, "lr": 4e-3}
# The recipe of the shipped base model.
SFT_DEFAULTS: dict[str, Any] = {
    "base": "random",
    "data": "base",
    "epochs": 5,
    "batch_size": 16,
    "lr": 1e-3,
    "warmup_steps": 50,
    "save_interval": 460,
}
_PARSERS = {"str": str, "int": int, "float": float}


def add_options(parser: argparse.ArgumentParser, lora: bool, defaults: dict[str, Any]) -> None:
    """Give ``parser`` an option for each field; those not given stay out of the namespace."""
    for option in fields(Settings):
        if lora or not option.metadata.get("lora"):
            _add(parser, option, defaults.get(option.name, option.default), argparse.SUPPRESS)
    parser.add_argument(
        "--resume",
        metavar="DIR",
        help="go on with the unfinished run in DIR, with the settings it was started with",
    )
    parser.add_argument(
        "--parallel",
        choices=("ddp", "fsdp"),
        default="ddp",
        help="started by torchrun: the whole model in each process (ddp), or a part in each, for a "
        "base too large for one GPU (fsdp) (default: ddp)",
    )


def add_data_options(parser: Any) -> None:
    """Give ``parser`` those that say how data is read, with their defaults."""
    for option in fields(Settings):
        if option.name in ("format", "max_length", "skip_bad", "cache", "no_cache"):
            _add(parser, option, option.default, option.default)


def _add(parser: Any, option: Field[Any], said: Any, default: Any) -> None:
    flag = "--" + option.name.replace("_", "-")
    text = option.metadata["help"].replace("%", "%%")
    kind = str(option.type).split(" |")[0]
    if kind == "bool":
        parser.add_argument(flag, action="store_true", default=default, help=text)
        return
    if said is not None and "(default: " not in text:
        text += f" (default: {said})"
    parser.add_argument(flag, type=_PARSERS[kind], default=default, help=text)
