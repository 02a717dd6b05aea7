"""``python -m lora_kernels``: check kernels, list what they take of a GPU, pack and adopt them."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .kernels import GATE_KERNELS, GROUP_KERNELS, KERNELS
from .proof.commands import TARGETS, run_adopt, run_check, run_pack, run_resources

LAYERS, GROUPS = "layers", "groups"
_CHECK = """\
Compare every kernel and block configuration that the table has for this machine's GPU with a
float64 truth, then whole layers and groups of layers that share x, forward and every gradient, by
each strategy.

Each output's largest error is printed beside that of plain torch in the same dtype. It may be at
most 2 times as large, plus one rounding of the largest value. Each call runs twice and has to give
the same bits, into memory that was filled with NaN before, so that what is not written shows.

Without a GPU the kernels run on the CPU in Triton's interpreter, on small shapes: that proves
their arithmetic and bounds, not what the compiler makes of them."""

_CHECK_NEXT = """\
exit status: 0 if everything passed; 1 if something failed, or did not run within --time-limit; 2
for a mistake on the command line; 130 after Ctrl-C, which still prints what ran until then.
If a kernel fails on your GPU, take the plain path, `with lora_kernels.use_backend("reference"):`,
and report what `--json` prints.

examples:
  python -m lora_kernels check                  everything; some minutes, most of them compiling
  python -m lora_kernels check --quick          fewer cases, no float16
  python -m lora_kernels check --only hopper,xa two kernels
  python -m lora_kernels check --time-limit 300 --out check.jsonl
                                                what five minutes allow, kept case by case"""

_RESOURCES = """\
Compile every kernel and block configuration that the table has for a GPU, without that GPU, and
print what each takes: registers a thread, bytes spilled to memory, shared memory a block, and
the tensor-core instructions that it multiplies with (mma up to Ada, wgmma on Hopper, tcgen05 on
Blackwell; none for float32 in full precision). Sizes are taken to be multiples of 16."""

_RESOURCES_NEXT = """\
A matrix product (gemm, hopper, expand, one_kernel, and of groups all but group_dxa_db) fails if it
spills at all; the passes that wait for memory may spill up to 64 bytes a thread, which is a
warning. Anything fails that does not compile or needs more shared memory than a block may have, and
so does a hopper product without wgmma. What is compiled is kept in Triton's cache (~/.triton), so
that a second run is quick.

exit status: 0 if everything is fine, 1 if something failed, 2 for a mistake on the command line.

examples:
  python -m lora_kernels resources --target sm_90               H100, H200
  python -m lora_kernels resources --target sm_80 --only da     one kernel, A100"""

_PACK = """\
Compile what `check` runs on a GPU, and the layers of Llama-3-8B and MiniMind by every strategy in
bfloat16 at rank 16, Llama's q, k, v and gate, up as groups too, without that GPU, and pack the
machine code into one file. There `adopt` puts it where Triton looks before it compiles.

The number of multiprocessors is taken to be that of the largest GPU of its kind; on another one,
some kernels compile as ever."""

_PACK_NEXT = """\
exit status: 0 if all is packed; 1 if something did not compile, and the rest is packed; 2 for a
mistake on the command line, or a file that cannot be written.

examples:
  python -m lora_kernels pack --target sm_90 kernels.pack       H100, H200
  python -m lora_kernels adopt kernels.pack                     there, before anything else"""

_ADOPT = """\
Put the kernels of a pack into Triton's cache (~/.triton/cache, or what TRITON_CACHE_DIR says),
under the keys that the Triton installed here makes of them. Python may be another one than where
they were packed; Triton, its assembler and the kernels' source have to be the same. Where they
differ, that is said, and kernels compile as ever. Nothing in the cache is replaced.

A pack is compiled code that will run in your name: adopt only what you packed yourself."""

_ADOPT_NEXT = """\
exit status: 0 if kernels were adopted, or had been; 1 if none was, because versions differ, which
harms nothing; 2 for a pack that is damaged or none, which changes nothing."""


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lora_kernels",
        description="Check the kernels, see what they take of a GPU, carry them elsewhere.",
    )
    parser.add_argument("--version", action="version", version=f"lora_kernels {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(
        name: str, text: str, about: tuple[str, str], run: Callable[[argparse.Namespace, str], int]
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=about[0],
            epilog=about[1],
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    check = add(
        "check",
        "compare every kernel with float64 on this machine",
        (_CHECK, _CHECK_NEXT),
        run_check,
    )
    check.add_argument("--quick", action="store_true", help="fewer cases, and none in float16")
    check.add_argument(
        "--time-limit",
        type=_seconds,
        metavar="SECONDS",
        help="start no case after this time; what runs 20 s longer is stopped and fails",
    )
    check.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="append each result to this file when its case ends, as a line of JSON",
    )
    _add_common(check, (*KERNELS, *GROUP_KERNELS, *GATE_KERNELS, LAYERS, GROUPS))

    text = "compile every kernel for a GPU, without it"
    resources = add("resources", text, (_RESOURCES, _RESOURCES_NEXT), run_resources)
    _add_target(resources)
    _add_common(resources, (*KERNELS, *GROUP_KERNELS, *GATE_KERNELS))

    text = "compile for a GPU, without it, into a file that travels"
    pack = add("pack", text, (_PACK, _PACK_NEXT), run_pack)
    _add_target(pack)
    pack.add_argument("out", type=Path, metavar="OUT", help="the file to write")
    _add_jobs(pack)

    text = "take what `pack` compiled for this machine's GPU"
    adopt = add("adopt", text, (_ADOPT, _ADOPT_NEXT), run_adopt)
    adopt.add_argument("pack", type=Path, metavar="PACK", help="a file that `pack` wrote")
    return parser


def _add_target(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        required=True,
        choices=TARGETS,
        metavar="SM",
        help=f"the GPU's compute capability: {', '.join(TARGETS)}",
    )


def _add_jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs", type=_count, metavar="N", help="processes at a time (default: by processors)"
    )


def _add_common(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    parser.add_argument(
        "--only",
        nargs="+",
        type=_names_of(names),
        action=_Only,
        default=[],
        metavar="NAME",
        help=f"only these of {', '.join(names)}; several with commas or spaces between",
    )
    _add_jobs(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")


class _Only(argparse.Action):
    """The names in all words, as one list."""

    def __call__(self, parser: Any, options: Any, values: Any, option: Any = None) -> None:
        setattr(options, self.dest, [name for names in values for name in names])


def _names_of(known: Sequence[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = [name for name in text.split(",") if name]
        unknown = [name for name in found if name not in known]
        if unknown or not found:
            came = ", ".join(map(repr, unknown)) or repr(text)
            raise argparse.ArgumentTypeError(f"no {came}; there are {', '.join(known)}")
        return found

    return names


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1 on, got {text!r}")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of seconds above 0, got {text!r}")
    return seconds


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status.

    Raises:
        KeyboardInterrupt: on Ctrl-C, after `check` has printed what it has found until then.
    """
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options, __version__)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        print(
            "triton is not installed, so there are no kernels here: every call takes the plain "
            "path. On Linux: pip install triton",
            file=sys.stderr,
        )
        return 1


if __name__ == "__main__":
    try:
        status = main()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    raise SystemExit(status)
