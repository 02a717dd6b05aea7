"""Files that belong together: written aside, put in place at once, cleared up after a kill.

They are written in a *room*, a hidden directory on the same disk, locked while its writer lives.
Where the place is new, the whole directory is renamed; where it is one that others use too, or may
be a mount, its entries are moved in: what makes the directory a model comes last, and what it takes
the place of leaves first. Killed at any moment, the place holds all of the old or all of the new,
or nothing that can be taken for either; the next writer undoes what was begun.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

# Without the first no directory is a tokenizer, without the second none is a model.
LAST = ("tokenizer.json", "model.safetensors")
_NEW, _OLD, _NAMES = "new", "old", "names.json"


@contextlib.contextmanager
def staged(out: Path, check: Callable[[Path], object] | None = None) -> Iterator[Path]:
    """A path to make a directory or a file at, which comes to ``out`` when the block ends.

    An error in the block, or in putting the files in place, leaves ``out`` as it was.

    Args:
        out: where to. Missing parent directories are made.
        check: raises where ``out`` must not be replaced; called before it is. None puts the
            entries of the directory in among those that ``out`` has.
    """
    clear_up(out)
    inside = check is None or (out.is_dir() and not out.is_symlink() and not any(out.iterdir()))
    home = out if inside else out.parent
    home.mkdir(parents=True, exist_ok=True)
    room = home / f".{out.name}.{secrets.token_hex(8)}.staging"
    room.mkdir()
    lock = hold(room)
    try:
        stage = room / _NEW
        yield stage
        _settle(stage)
        if not inside:
            assert check is not None
            check(out)  # somebody may have come in between
            _take_place(stage, out, room / _OLD)
        else:
            _move_in(stage, out, room, fresh=check is not None)
        _sync(home)
    finally:
        shutil.rmtree(room, ignore_errors=True)
        release(lock)


def clear_up(out: Path, names: Sequence[str] = ()) -> list[str]:
    """Undo what killed writers of ``out`` began; what was found, as sentences.

    Args:
        out: the directory or file that they wrote.
        names: of files in ``out`` whose temporary versions (``.NAME.…``) are deleted. Nobody may
            be writing them.
    """
    said = []
    for home in (out, out.parent):
        pattern = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{16}}\.staging")
        for room in [p for p in _entries(home) if pattern.fullmatch(p.name) and p.is_dir()]:
            try:
                lock = hold(room)
            except BlockingIOError:
                continue  # its writer lives
            if lock is None:
                continue  # it may live
            try:
                _undo(room, out, inside=home is out)
                shutil.rmtree(room, ignore_errors=True)
            finally:
                release(lock)
            said.append(f"cleared away {room}, which a killed run had left unfinished")
    for file in [p for p in _entries(out) if is_temporary(p.name, names) and p.is_file()]:
        file.unlink(missing_ok=True)
        said.append(f"cleared away {file}, which a killed run had left unfinished")
    return said


def is_temporary(name: str, names: Iterable[str]) -> bool:
    """Whether a file's ``name`` is of what `write_atomically` begins one of ``names`` with."""
    return any(re.fullmatch(rf"\.{re.escape(whole)}\.[\w-]+", name) for whole in names)


def hold(directory: Path) -> int | None:
    """A lock on ``directory`` that ends with this process; None where there are no such locks.

    Raises:
        BlockingIOError: somebody has it.
    """
    if fcntl is None:
        return None
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:  # a disk that knows none
        os.close(descriptor)
        return None
    return descriptor


def release(lock: int | None) -> None:
    """Give back what `hold` gave."""
    if lock is not None:
        os.close(lock)


def _entries(directory: Path) -> list[Path]:
    try:
        return sorted(directory.iterdir())
    except OSError:
        return []  # not there, or not a directory


def _settle(stage: Path) -> None:
    """Give new files the permissions of any other, and have all of them on the disk."""
    mask = os.umask(0)
    os.umask(mask)
    for path in [stage, *stage.rglob("*")]:
        if path.is_file():
            path.chmod(0o666 & ~mask)  # some writers make private files
            with path.open("rb") as written:
                os.fsync(written.fileno())
        else:
            _sync(path)


def _sync(directory: Path) -> None:
    """Have a directory's own entries on the disk, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(stage: Path, out: Path, old: Path) -> None:
    if os.path.lexists(out):
        out.rename(old)
    try:
        stage.rename(out)
    except BaseException:
        if old.exists():
            old.rename(out)
        raise


def _move_in(stage: Path, out: Path, room: Path, fresh: bool) -> None:
    names = [path.name for path in stage.iterdir()]
    names.sort(key=lambda name: (LAST.index(name) if name in LAST else -1, name))
    taken = [name for name in names if os.path.lexists(out / name)]
    if fresh and taken:
        raise FileExistsError(errno.EEXIST, "somebody else wrote it meanwhile", out / taken[0])
    (room / _OLD).mkdir()
    (room / _NAMES).write_text(json.dumps(names), encoding="utf-8")
    try:
        for name in reversed(taken):
            os.replace(out / name, room / _OLD / name)
        for name in names:
            os.replace(stage / name, out / name)
    except BaseException:
        _undo(room, out, inside=True)
        raise


def _undo(room: Path, out: Path, inside: bool) -> None:
    """Bring ``out`` back to what it was, unless everything is in place already.

    Each move leaves a state that this function, called again, goes on from.
    """
    stage, old = room / _NEW, room / _OLD
    if not inside:
        if old.exists() and not os.path.lexists(out):
            old.rename(out)
        return
    if not (room / _NAMES).is_file() or not any(_entries(stage)):
        return
    try:
        names = json.loads((room / _NAMES).read_text(encoding="utf-8"))
    except ValueError:
        return  # killed while the names were written, before anything was moved
    for name in reversed(names):
        if not os.path.lexists(stage / name) and os.path.lexists(out / name):
            os.replace(out / name, stage / name)
    for path in _entries(old):
        os.replace(path, out / path.name)
