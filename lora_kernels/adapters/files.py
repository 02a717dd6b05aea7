"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` with a temporary name beside ``path`` and rename the result onto it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        # mkstemp makes private files; give this one the permissions of any other new file.
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)
        os.replace(temporary, path)
        sync_directory(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(directory: Path) -> None:
    """Have the names in a directory on the disk, where the system can be asked for it.

    A rename that a failing machine forgets would leave the old file, or none.
    """
    with contextlib.suppress(OSError):
        handle = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_together(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write the files so that all appear or none, in this order; others are left alone.

    Raises:
        ValueError: a directory has one of the names.
    """
    for name in files:
        if (directory / name).is_dir():
            raise ValueError(f"{directory / name} is a directory; choose another path")
    fresh = not directory.exists()
    directory.parent.mkdir(parents=True, exist_ok=True)
    stage = (directory.parent if fresh else directory) / f".{directory.name}.{secrets.token_hex(8)}"
    stage.mkdir()
    try:
        for name, content in files.items():
            with open(stage / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        if fresh:
            stage.rename(directory)
            sync_directory(directory.parent)
        else:
            _swap(stage, directory, list(files))
            sync_directory(directory)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, directory: Path, names: list[str]) -> None:
    """Move ``names`` from ``stage`` into ``directory``, or put everything back as it was.

    The old files leave first, and the config is the first to leave and the last to come: if the
    machine stops meanwhile, one is missing, and what is there cannot be taken for an adapter.
    """
    moves = [
        (directory / name, stage / f"old-{name}")
        for name in reversed(names)
        if os.path.lexists(directory / name)
    ] + [(stage / name, directory / name) for name in names]
    done: list[tuple[Path, Path]] = []
    try:
        for source, target in moves:
            os.replace(source, target)
            done.append((source, target))
    except BaseException:
        for source, target in reversed(done):
            os.replace(target, source)
        raise


def refuse_strange_file(directory: Path, name: str) -> None:
    """Raise ValueError where ``name`` is no file, or a link that leads out of ``directory``."""
    try:
        target = (directory / name).resolve(strict=True)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} is a link that leads nowhere: {error}") from None
    if not target.is_relative_to(directory.resolve()):
        raise ValueError(
            f"{name} is a link to {target}, outside the directory, and is not followed; "
            "copy the file itself there (of a download cache, make a real copy)"
        )
    if not target.is_file():
        raise ValueError(f"{name} is not a file")
