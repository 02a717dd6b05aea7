"""The directory of a run: free, taken, being written, or left by a run that was killed."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from pathlib import Path

from ..data.reading import split_name
from ..files import clear_up, hold, is_temporary, release
from ..model.checkpoint import ADAPTER_NAME
from ..settings import TRACKERS, Settings
from .report import ANSWERS, METRICS, PLOT, say

RESUME, RUN = "resume.pt", "run.json"
_FILES = (ADAPTER_NAME, RESUME, RUN, METRICS, ANSWERS, PLOT)


def unused(path: str | Path) -> Path:
    """``path``, if nothing is there yet but perhaps an empty directory.

    Raises:
        ValueError: it is a file or a directory with something in it.
    """
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "holds another run" if (out / RUN).exists() else "exists and is not empty"
        raise ValueError(
            f"the output directory {out} {what}; nothing was overwritten. Choose another --out"
            + (", or go on with an unfinished run by --resume" if (out / RESUME).exists() else "")
        )
    return out


def left_over(out: Path) -> list[Path]:
    """What a run that was killed before its first resume point left in ``out``, often nothing.

    Raises:
        ValueError: something else is there, or a run that is going on.
    """
    try:
        left = sorted(out.iterdir())
    except OSError:
        left = []
    names = (RUN, METRICS, *TRACKERS)
    begun = [p for p in left if p.name in names or is_temporary(p.name, _FILES)]
    if not left or begun != left:
        unused(out)
        return []
    try:
        lock = hold(out)
    except BlockingIOError:
        raise ValueError(_busy(out)) from None
    if lock is None:
        unused(out)  # there is no telling whether it is going on
    release(lock)
    return begun


def _busy(out: Path) -> str:
    return f"a run is going on in {out}; wait for it, or choose another --out"


def claim_directory(settings: Settings, resume: str | None) -> tuple[Path, int | None]:
    """The run's own directory, locked and writable, and the lock.

    It is ``--out``, or the first ``out/NAME-N`` that nobody else has, or that of the run to resume.

    Raises:
        ValueError, OSError: it is in use, or nothing can be written there.
    """
    if resume is not None or settings.out is not None:
        out = Path(resume or settings.out or "")
        left = []
        if resume is None:
            clear_up(out)
            left = left_over(out)
            out.mkdir(parents=True, exist_ok=True)
    else:
        left = []
        for number in itertools.count(1):
            out = Path("out") / f"{split_name(Path(settings.data))[0]}-{number}"
            with contextlib.suppress(FileExistsError):
                out.mkdir(parents=True)
                break
    try:
        lock = hold(out)
    except BlockingIOError:
        raise ValueError(_busy(out)) from None
    try:
        with tempfile.TemporaryFile(dir=out):
            pass  # said now, not when hours of training are to be saved
        said = clear_up(out, _FILES)
        for path in left:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    except OSError as error:
        release(lock)
        raise ValueError(
            f"nothing can be written in {out} ({error}); choose another --out"
        ) from None
    if left:
        said.append(f"the run in {out} had ended before its first resume point; it begins anew")
    for line in said:
        say(line)
    return out, lock
