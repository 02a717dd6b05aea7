"""The `minimind` command and its subcommands."""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any

from .settings import (
    FINETUNE_DEFAULTS,
    SFT_DEFAULTS,
    Settings,
    add_data_options,
    add_options,
)

_EPILOG = """examples:
  minimind finetune                            teach the shipped model a new name, in about a minute
  minimind finetune --data tea --targets all-linear --rank 32 --epochs 12
  minimind info mine.jsonl                     what is in it, and what of it is learnt
  minimind finetune --data mine.jsonl --out out/mine --rank 8 --alpha 16
  minimind finetune --data more.csv --lora out/mine     go on training that adapter
  minimind chat --lora out/identity-1/adapter.safetensors --compare
  minimind merge --lora out/identity-1/adapter.safetensors --out out/robin
  minimind export --to hf out/robin-hf --lora out/identity-1/adapter.safetensors --merge
"""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="minimind",
        description="Fine-tune a small language model with LoRA, and talk to it.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, text: str, run: Any) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        return command

    finetune = add("finetune", "train a LoRA adapter on conversations; base weights stay", _train)
    add_options(finetune, lora=True, defaults=FINETUNE_DEFAULTS)
    sft = add("sft", "train a whole model on conversations; its defaults make the base", _train)
    add_options(sft, lora=False, defaults=SFT_DEFAULTS)

    chat = add("chat", "talk to a model, with an adapter, without, or both side by side", _chat)
    _add_model_options(chat)
    chat.add_argument("--compare", action="store_true", help="answer with and without the adapter")
    chat.add_argument("--prompt", help="answer this once and leave, instead of a dialogue")
    chat.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest word (default: 0)"
    )
    chat.add_argument(
        "--top-p",
        type=float,
        default=0.9,
        help="share of the probability to draw from, with a temperature above 0 (default: 0.9)",
    )
    chat.add_argument(
        "--max-new-tokens", type=int, default=128, help="longest answer in tokens (default: 128)"
    )
    chat.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto (default: auto)")
    chat.add_argument("--seed", type=int, default=42, help="seed of the draws (default: 42)")

    merge = add("merge", "fold an adapter into its base and save the plain model", _merge)
    _add_model_options(merge)
    merge.add_argument("--out", required=True, help="directory for the merged model; must be new")
    merge.add_argument(
        "--dtype", default="bfloat16", help="float32, bfloat16 or float16 (default: bfloat16)"
    )

    export = add("export", "write a model for vLLM, SGLang and others, or as a .pth", _export)
    export.description = (
        "Write a model as a directory that transformers loads as Llama, Qwen3 or another "
        "architecture that computes the very same, with tokenizer, chat template and generation "
        "config, for programs that take such directories; or as a .pth for the MiniMind project "
        "of the same era. What is written is loaded and compared before it takes its place."
    )
    export.add_argument("out", metavar="OUT", help="directory to write, or the .pth file")
    export.add_argument(
        "--to",
        choices=("hf", "pth"),
        default="hf",
        help="hf: a transformers directory; pth: the original project's file (default: hf)",
    )
    _add_model_options(export)
    export.add_argument(
        "--merge",
        action="store_true",
        help="fold the adapter in, in float32; without, it goes to OUT/adapter in PEFT's format",
    )
    export.add_argument(
        "--dtype", default="bfloat16", help="float32, bfloat16 or float16 (default: bfloat16)"
    )

    info = add("info", "say what a model, an adapter, data or this machine is", _info)
    info.add_argument(
        "path",
        nargs="?",
        help="a model directory, a weight file, an adapter, a data file or a shipped set's name "
        "(default: machine)",
    )
    about_data = info.add_argument_group("of data, as finetune and sft have them")
    about_data.add_argument("--tokenizer", help="directory of the tokenizer (default: the shipped)")
    add_data_options(about_data)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base", help="model directory or weight file of any era (default: the shipped)"
    )
    parser.add_argument(
        "--lora", help="adapter: a run's directory, a file, or a directory in PEFT's format"
    )
    parser.add_argument("--tokenizer", help="directory of the tokenizer (default: the base's own)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code.

    0, 2 for a user's mistake, 1 where the system refused something, 130, 143 or 129 when stopped by
    Ctrl-C, SIGTERM or SIGHUP.
    """
    options = build_parser().parse_args(arguments)
    # Read by the tokenizers library when worker processes fork; it warns at length without.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that knows no Chinese shows "?"
    try:
        return _run(options)
    except KeyboardInterrupt as error:  # while torch is being imported, too
        return 128 + getattr(error, "signum", signal.SIGINT)
    except ModuleNotFoundError as error:
        if error.name not in ("transformers", "tokenizers", "tqdm", "matplotlib"):
            raise
        print(
            f"minimind: the package {error.name} is missing; install what this command needs with: "
            'pip install "lora-kernels[train]"',
            file=sys.stderr,
        )
        return 2


def _run(options: argparse.Namespace) -> int:
    # Here and below: torch and transformers take seconds to import, `--help` should not.
    from .training.loop import TrainingError
    from .training.prepare import UsageError
    from .training.report import silence

    try:
        options.run(options)
        sys.stdout.flush()  # here its errors are ours to tell
    except (UsageError, TrainingError) as error:
        print(f"minimind {options.command}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        silence(sys.stdout)  # its reader went away (`| head`); nothing more can be said to it
        return 141
    except OSError as error:
        silence(sys.stdout)
        print(f"minimind {options.command}: {error}", file=sys.stderr)
        return 1
    return 0


def _train(options: argparse.Namespace) -> None:
    from .training.jobs import run
    from .training.loop import TrainingError
    from .training.parallel import join
    from .training.prepare import UsageError, prepare

    lora = options.command == "finetune"
    defaults = FINETUNE_DEFAULTS if lora else SFT_DEFAULTS
    given = {
        name: value
        for name, value in vars(options).items()
        if name in Settings.__dataclass_fields__
    }
    if options.resume is not None and given:
        names = ", ".join("--" + name.replace("_", "-") for name in given)
        raise UsageError(f"--resume takes its settings from the run; leave out {names}")
    with join(options.parallel) as processes:
        try:
            run(prepare(Settings(**{**defaults, **given}), lora, options.resume, processes))
        except (UsageError, TrainingError):
            if processes.first:
                raise
            raise SystemExit(2) from None  # they are everybody's, and the first one says them


def _chat(options: argparse.Namespace) -> None:
    from .commands.chat import chat

    chat(options)


def _merge(options: argparse.Namespace) -> None:
    from .commands.merge import merge

    merge(options)


def _export(options: argparse.Namespace) -> None:
    from .commands.export import export

    export(options)


def _info(options: argparse.Namespace) -> None:
    from .commands.info import info

    info(options)


if __name__ == "__main__":
    raise SystemExit(main())
