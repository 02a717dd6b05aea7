"""Read and check all that a run needs, before anything is written: options in, a `Job` out."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from lora_kernels import (
    apply_lora,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
)

from ..data.building import Cache, default_cache
from ..data.reading import DATA_DIRECTORY
from ..data.sft import SFTDataset, held_out
from ..data.tokenizer import load_tokenizer
from ..model.checkpoint import ADAPTER_NAME, load_adapter, load_model
from ..model.config import LMConfig
from ..model.transformer import MiniMindLM
from ..settings import Settings
from .directory import RESUME, RUN, claim_directory, left_over
from .loop import DTYPES, Trainer, best_dtype
from .parallel import ALONE, Processes
from .report import say, warn
from .resuming import refuse_strange
from .trackers import parse_trackers

BASE_DIRECTORY = Path(__file__).parents[1] / "assets" / "base"
DEFAULT_RANK = 16


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to do instead."""


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Turn the errors that bad input raises into UsageError; bugs elsewhere keep a traceback."""
    try:
        yield
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error


@dataclass
class Job:
    """A run that is ready to start."""

    settings: Settings
    lora: bool
    model: MiniMindLM
    tokenizer: Any
    train: SFTDataset
    heldout: SFTDataset | None
    base_heldout: SFTDataset | None
    device: torch.device
    dtype: torch.dtype
    adapted: list[str]
    trainer: Trainer
    out: Path
    resumed: dict[str, Any] | None
    processes: Processes = ALONE
    lock: int | None = None
    trackers: Sequence[str] = ()

    @property
    def command(self) -> str:
        """The subcommand that this is a run of."""
        return "finetune" if self.lora else "sft"


def choose_device(name: str) -> torch.device:
    """``auto`` is the GPU if torch sees one: by CUDA, or by Apple's MPS.

    Raises:
        ValueError: an unknown device, or one that is not there.
    """
    there = {
        "cuda": torch.cuda.device_count() if torch.cuda.is_available() else 0,
        "mps": int(torch.backends.mps.is_available()),
        "cpu": 1,
    }
    if name == "auto":
        return torch.device(next(kind for kind, count in there.items() if count))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in there:
        raise ValueError(f"device must be auto, cpu, cuda or mps, got {name!r}")
    if not there[device.type]:
        seen = " and ".join(kind for kind, count in there.items() if count)
        kind = "CUDA GPU" if device.type == "cuda" else "Apple GPU (MPS)"
        raise ValueError(
            f"device {device.type} was asked for, but torch sees no {kind}, only {seen}; use "
            "--device cpu"
        )
    if (device.index or 0) >= there[device.type]:
        raise ValueError(f"there are {there[device.type]} {device.type} devices, no {name!r}")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 where the hardware has it, else float32.

    Raises:
        ValueError: an unknown name.
    """
    if name == "auto":
        return best_dtype(device)
    if name not in DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(DTYPES)}; got {name!r}")
    return DTYPES[name]


def slowness(dtype: torch.dtype, device: torch.device) -> str:
    """What speaks against ``dtype`` on ``device``, as a sentence; empty for nothing."""
    if dtype != torch.bfloat16 or device.type != "cpu" or best_dtype(device) == dtype:
        return ""
    return (
        "this CPU has no instructions for bfloat16, whose products take many times longer than "
        "float32's; --dtype auto takes float32 here"
    )


def load_base(settings: Settings) -> tuple[MiniMindLM, Any]:
    """The model to start from, in float32, and its tokenizer.

    Raises:
        ValueError, OSError: it cannot be read, or the tokenizer's ids exceed its vocabulary.
    """
    sizes = {"dim": settings.dim, "n_layers": settings.n_layers}
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if settings.use_moe:
        given["use_moe"] = True
    path = None
    if settings.base == "random":
        torch.manual_seed(settings.seed)
        model = MiniMindLM(LMConfig(**{"dim": 512, "n_layers": 2, **given}))
    else:
        path = BASE_DIRECTORY if settings.base is None else Path(settings.base)
        model = load_model(path)
        for name, wanted in given.items():
            if getattr(model.config, name) != wanted:
                raise ValueError(
                    f"--{name.replace('_', '-')} {wanted} does not fit the base {path}, which has "
                    f"{getattr(model.config, name)}; leave the option out, or use --base random"
                )
    folder = path.parent if path is not None and path.is_file() else path
    own = folder is not None and (folder / "tokenizer.json").is_file()
    if not own and settings.tokenizer is None and model.config.era != "2025-02":
        raise ValueError(
            f"there is no tokenizer.json beside the base {path}, a MiniMind of {model.config.era}, "
            "and the shipped tokenizer is not its; name the directory of its own by --tokenizer"
        )
    tokenizer = load_tokenizer(settings.tokenizer or (folder if own else None))
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} entries, the model's vocabulary only "
            f"{model.config.vocab_size}; use the tokenizer that belongs to the model (--tokenizer)"
        )
    return model, tokenizer


def parse_targets(targets: str | None) -> list[str] | str | None:
    """``--targets`` as `apply_lora` takes it: names and endings become a list."""
    if targets is None or targets == "all-linear":
        return targets
    names = [name.strip() for name in targets.split(",")]
    plain = all(name and name.replace(".", "").replace("_", "").isalnum() for name in names)
    return names if plain else targets


def choose_cache(cache: str | None, no_cache: bool) -> Cache:
    """Where ``--cache`` and ``--no-cache`` say that tokens are kept.

    Raises:
        ValueError: they say both.
    """
    if cache is not None and no_cache:
        raise ValueError(f"--cache {cache} and --no-cache contradict each other; leave one out")
    if cache is None and not no_cache:
        return default_cache(show=True, say=say)
    return Cache(Path(cache) if cache is not None else None, show=True, say=say)


def prepare(
    settings: Settings, lora: bool, resume: str | None = None, processes: Processes = ALONE
) -> Job:
    """Read and check everything, put LoRA into the model, and make (or take up) the output.

    Raises:
        UsageError: something of the user's is wrong; nothing has been written then. Of several
            processes, all raise it.
    """
    with user_errors():
        with processes.together():
            resumed = None
            if resume is not None:
                settings, resumed = _read_resume(Path(resume), lora)
            elif settings.out is not None:
                left_over(Path(settings.out))  # said at once, not after the model has been read
            if lora and settings.lora is None and settings.rank is None:
                settings = replace(settings, rank=DEFAULT_RANK)
            device = processes.place(choose_device(settings.device))
            dtype = choose_dtype(settings.dtype, device)
            if processes.first and (slow := slowness(dtype, device)):
                warn(slow)
            training = settings.training()
            trackers = parse_trackers(settings.report_to) if processes.first else []
            processes.check(training.batch_size)
            model, tokenizer = load_base(settings)
            max_length = min(settings.max_length, model.config.max_seq_len)
            train, heldout = held_out(
                settings.data,
                tokenizer,
                max_length,
                settings.seed,
                settings.format,
                settings.skip_bad,
                choose_cache(settings.cache, settings.no_cache),
            )
            base_heldout = None
            if lora and settings.base is None and settings.data != "base":
                others = DATA_DIRECTORY / "base.heldout.jsonl"
                base_heldout = SFTDataset(others, tokenizer, max_length)
            torch.manual_seed(settings.seed)
            adapted: list[str] = []
            if lora:
                adapted = _adapt(model, settings)
                mark_only_lora_as_trainable(model)
            if resumed is not None:
                _take_up_weights(model, resumed["weights"], lora)
            processes.seed(settings.seed)
        if processes.several:
            _same_everywhere(processes, [train, heldout, base_heldout])
        spread = processes.spread(model, device)
        with processes.together():
            parameters = lora_parameters(model) if lora else list(model.parameters())
            trainer = Trainer(spread, parameters, train, training, device, dtype, processes)
            if resumed is not None:
                with _resuming():
                    trainer.load_state_dict(resumed["trainer"])
            out = lock = None
            if processes.first:
                out, lock = claim_directory(settings, resume)
        out = processes.gather(out)[0]
    assert out is not None
    return Job(
        settings, lora, model, tokenizer, train, heldout, base_heldout, device, dtype, adapted,
        trainer, out, resumed, processes, lock, trackers,
    )  # fmt: skip


def _adapt(model: MiniMindLM, settings: Settings) -> list[str]:
    """Put a new adapter on ``model``, or the one that ``--lora`` names; the adapted modules.

    Raises:
        ValueError, OSError: that adapter cannot be read, does not fit, or is not what other
            options ask for.
    """
    if settings.lora is None:
        return apply_lora(
            model,
            settings.rank,  # type: ignore[arg-type]
            alpha=settings.alpha,
            dropout=settings.dropout,
            target_modules=parse_targets(settings.targets),
            verbose=False,
        )
    names = load_adapter(model, settings.lora)
    layers = lora_layers(model)
    if settings.targets is not None:
        raise ValueError(
            f"--targets {settings.targets} and --lora {settings.lora}, which is on "
            f"{', '.join(names[:4])}{' and others' if len(names) > 4 else ''}: its modules are "
            "kept; leave --targets out, or --lora for a new adapter"
        )
    for name, layer in layers.items():
        for option, asked, own in (
            ("rank", settings.rank, layer.rank),
            ("alpha", settings.alpha, layer.scale * layer.rank),
        ):
            if asked is not None and asked != own:
                raise ValueError(
                    f"--{option} {asked:g} does not fit --lora {settings.lora}, which has {own:g} "
                    f"on {name}; leave --{option} out, or --lora for a new adapter"
                )
        layer.set_dropout(settings.dropout)
    return names


def _same_everywhere(processes: Processes, datasets: list[SFTDataset | None]) -> None:
    """Of several machines, each reads files of its own."""
    prints = processes.gather([dataset and dataset.fingerprint() for dataset in datasets])
    for rank, other in enumerate(prints):
        if other != prints[0]:
            raise ValueError(
                f"process {rank} of {processes.size} reads other data, or another tokenizer, than "
                "the first; give every machine the same files"
            )


def _take_up_weights(model: MiniMindLM, weights: dict[str, Any], lora: bool) -> None:
    expected = lora_state_dict(model) if lora else model.state_dict()
    with _resuming():
        if weights.keys() != expected.keys():
            raise ValueError("its weights are of other modules")
        model.load_state_dict(weights, strict=not lora)


@contextlib.contextmanager
def _resuming() -> Iterator[None]:
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of a point whose structure is another
        raise ValueError(f"the run cannot be resumed: {str(error)[:1500]}") from error


def _read_resume(directory: Path, lora: bool) -> tuple[Settings, dict[str, Any]]:
    for name in (RUN, RESUME):
        if not (directory / name).is_file():
            finished = (directory / ADAPTER_NAME).exists() or (
                directory / "model.safetensors"
            ).exists()
            raise ValueError(
                f"{directory} has no {name}, there is nothing to resume"
                + ("; that run is finished" if finished else "; check the path")
            )
    command = "finetune" if lora else "sft"
    known = {f.name for f in fields(Settings)}
    try:
        run = json.loads((directory / RUN).read_text(encoding="utf-8"))
        settings = Settings(**{k: v for k, v in run["settings"].items() if k in known})
        state = torch.load(directory / RESUME, map_location="cpu", weights_only=True)
        begun = run["command"]
        state = {name: state[name] for name in ("weights", "trainer", "before", "report")}
        refuse_strange(state)
    except MemoryError:
        raise
    except Exception as error:  # torch.load raises anything at all on damaged files
        raise ValueError(
            f"the run in {directory} cannot be resumed, {RUN} or {RESUME} is damaged: "
            f"{repr(error)[:1500]}"
        ) from None
    if begun != command:
        raise ValueError(f"{directory} holds a run of `minimind {begun}`; resume it with that")
    return settings, state
