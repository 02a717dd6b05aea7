"""A data file to a store: read once, tokenised by all cores, and kept for the next start.

The cache is a directory of indexes, by default ``~/.cache/minimind`` (or where ``XDG_CACHE_HOME``
says), where every run with the same data finds it. What an index was made of, its key, is the
content of the file, tokenizer and template, length, form, and the versions of what made it. The
content is hashed at every start: at more than a gigabyte a second that is nothing beside training,
and size and time of a file are no proof that it is the same.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import tokenizers
import transformers
from tqdm import tqdm

from lora_kernels import __version__

from ..files import clear_up, hold, release, staged
from .encoding import AT_ONCE, Chunk, Encoder, Refusals
from .forms import Reader
from .reading import DataError, numbered_rows, place_of, split_name
from .store import VERSION, MappedStore, MemoryStore, Store, Writer, pack
from .workers import in_order, usable_cores

Packed = list[tuple[int, bytes]]

# Smaller files are tokenised within a second or two, and kept in memory.
CACHED_FROM = 1 << 20
# Below, other processes start for nothing.
SHARED_FROM = 8 << 20


@dataclass(frozen=True)
class Cache:
    """Where indexes are kept.

    Args:
        directory: made when needed; None keeps what is too large for memory in a temporary one.
        fallback: whether a temporary directory will do where ``directory`` cannot be written.
        show: draw a progress bar while one is made.
        say: told what the user should know.
    """

    directory: Path | None = None
    fallback: bool = False
    show: bool = False
    say: Callable[[str], object] = lambda text: None


IN_MEMORY = Cache()


def default_cache(**more: Any) -> Cache:
    """The user's own."""
    home = os.environ.get("XDG_CACHE_HOME", "")
    # Relative ones are to be passed over, as the specification has it.
    place = Path(home) if os.path.isabs(home) else Path("~/.cache")
    with contextlib.suppress(RuntimeError):  # nobody's home
        place = place.expanduser()
    return Cache(place / "minimind", fallback=True, **more)


def open_store(
    path: Path,
    tokenizer: Any,
    max_length: int,
    form: str | None = None,
    skip: bool = False,
    cache: Cache = IN_MEMORY,
) -> Store:
    """All samples of a file as tokens, out of the cache if they are there.

    Args:
        max_length: tokens that a sample is cut to.
        form: of the file; by default its first row tells.
        skip: count rows that cannot be used, instead of raising.

    Raises:
        FileNotFoundError, DataError: the file or a row of it cannot be used, or there is no room
            for the index.
        ValueError: there is no form of that name.
    """
    reader = Reader(form)
    encoder = Encoder(tokenizer, max_length, str(path), reader, skip)
    size = path.stat().st_size if path.is_file() else 0
    if size < CACHED_FROM:
        return MemoryStore([chunk for chunk, _ in _chunks(encoder, path, keep=True)], tokenizer)
    try:
        key = _key(path, tokenizer, max_length, form, skip)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file") from None
    if cache.directory is None:
        return _temporary(path, encoder, key, cache)
    try:
        cache.directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache.directory):
            pass
    except OSError as error:
        if not cache.fallback:
            raise DataError(
                f"nothing can be written in the cache {cache.directory} ({error.strerror}); choose "
                "another by --cache, or do without by --no-cache"
            ) from None
        cache.say(
            f"nothing can be written in {cache.directory} ({error.strerror}), so {path} is "
            "tokenised for this run alone; choose another place by --cache"
        )
        return _temporary(path, encoder, key, cache)
    return _cached(path, encoder, key, cache, cache.directory)


def _temporary(path: Path, encoder: Encoder, key: dict[str, Any], cache: Cache) -> Store:
    place = Path(tempfile.mkdtemp(prefix="minimind-"))
    try:
        with _room(path, place):
            _build(path, encoder, key, cache, place)
        store = MappedStore(place, str(path))
    except BaseException:
        shutil.rmtree(place, ignore_errors=True)
        raise
    weakref.finalize(store, _forget, place, os.getpid())
    return store


def _forget(place: Path, process: int) -> None:
    if os.getpid() == process:  # not of those that were forked from it
        shutil.rmtree(place, ignore_errors=True)


def _cached(
    path: Path, encoder: Encoder, key: dict[str, Any], cache: Cache, directory: Path
) -> Store:
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    out = directory / f"{split_name(path)[0][:40]}-{digest[:16]}"
    if (store := _whole(out, key, path)) is not None:
        cache.say(f"{path}: tokens from {out}")
        return store
    with _alone(directory / f".{out.name}.lock", lambda: cache.say(_waiting(path))):
        if (store := _whole(out, key, path)) is not None:  # somebody has made it meanwhile
            cache.say(f"{path}: tokens from {out}")
            return store
        begin = time.perf_counter()
        for room in directory.glob(".*.staging"):  # of killed runs, with whatever data
            clear_up(directory / room.name[1:].rsplit(".", 2)[0])
        with _room(path, directory), staged(out, lambda taken: None) as stage:
            stage.mkdir()
            _build(path, encoder, key, cache, stage)
        cache.say(f"{path}: tokens kept in {out} ({time.perf_counter() - begin:.0f} s)")
    return MappedStore(out, str(path))


def _waiting(path: Path) -> str:
    return f"{path}: waiting for another process that tokenises it"


@contextlib.contextmanager
def _room(path: Path, place: Path) -> Iterator[None]:
    try:
        yield
    except ChildProcessError as error:
        raise DataError(
            f"{path} was not tokenised, as {error}; if memory was short, close other programs"
        ) from None
    except OSError as error:
        raise DataError(
            f"the tokens of {path} cannot be written to {place} ({error.strerror}); make room, or "
            "choose another place by --cache"
        ) from None


@contextlib.contextmanager
def _alone(lock: Path, waiting: Callable[[], object]) -> Iterator[None]:
    """The only process that has ``lock``, a directory, where there are such locks."""
    said = False
    while True:
        lock.mkdir(exist_ok=True)
        try:
            held = hold(lock)
            break
        except FileNotFoundError:
            continue  # whoever had it has taken it away
        except BlockingIOError:
            if not said:
                waiting()
            said = True
            time.sleep(0.1)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.rmdir()
        release(held)


def _whole(out: Path, key: dict[str, Any], path: Path) -> MappedStore | None:
    """The store in ``out``, if it is there and of that key."""
    try:
        store = MappedStore(out, str(path))
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return store if store.described.get("key") == key else None


def _build(path: Path, encoder: Encoder, key: dict[str, Any], cache: Cache, out: Path) -> None:
    writer = Writer(out, encoder.dtype)
    size = path.stat().st_size
    cores = usable_cores() if size >= SHARED_FROM else 1
    try:
        with _forking(cores), _bar(path, size, cache.show) as bar:
            for chunk, packed in _chunks(encoder, path, cores, bar):
                writer.add(chunk, packed)
        if key["content"] != content_hash(path):
            raise DataError(f"{path} changed while it was read; start again once it is whole")
        form = encoder.reader.form
        writer.finish(key=key, form=form.name if form else "")
    finally:
        writer.close()


@contextlib.contextmanager
def _forking(cores: int) -> Iterator[None]:
    """The tokenizers library warns at length of what is forked, unless it is told before."""
    name = "TOKENIZERS_PARALLELISM"
    if cores == 1 or name in os.environ:
        yield
        return
    os.environ[name] = "false"
    try:
        yield
    finally:
        del os.environ[name]


def _bar(path: Path, size: int, show: bool) -> Any:
    return tqdm(
        total=size,
        desc=f"tokenising {path.name}",
        unit="B",
        unit_scale=True,
        disable=not show,
        leave=False,
        dynamic_ncols=True,
        mininterval=0.5 if sys.stderr.isatty() else 10,  # a log file wants few lines
    )


def _chunks(
    encoder: Encoder, path: Path, cores: int = 1, bar: Any = None, keep: bool = False
) -> Iterator[tuple[Chunk, Packed]]:
    """The chunks of a file with their samples as `pack` makes them, or (``keep``) as they are."""
    refused, done = Refusals(), 0

    def read(count: int) -> None:
        nonlocal done
        done += count

    rows = numbered_rows(path, refused.add if encoder.skip else None, read)
    told = _told(encoder, path, rows, refused)
    batches = iter(lambda: list(islice(told, AT_ONCE)), [])
    for made in in_order(partial(_encoded, encoder, keep), batches, cores):
        if bar is not None:
            bar.update(min(done, bar.total) - bar.n)
        yield made
    last = encoder.samples([], [])
    last.refused = refused
    yield last, []


def _told(
    encoder: Encoder, path: Path, rows: Iterator[tuple[int, Any]], refused: Refusals
) -> Iterator[tuple[int, Any]]:
    """The rows from the first that tells the form: other processes must know it."""
    for number, row in rows:
        if encoder.reader.form is None:
            try:
                encoder.reader.sample(place_of(path, number), row)
            except DataError as error:
                if not encoder.skip:
                    raise
                refused.add(number, error)
                continue
        yield number, row


def _encoded(encoder: Encoder, keep: bool, rows: list[tuple[int, Any]]) -> tuple[Chunk, Packed]:
    chunk = encoder.rows(rows)
    if keep:
        return chunk, []
    packed = pack(chunk.samples)
    chunk.samples = []
    return chunk, packed


def _key(
    path: Path, tokenizer: Any, max_length: int, form: str | None, skip: bool
) -> dict[str, Any]:
    """What an index is made of, and nothing else."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else json.dumps(sorted(tokenizer.get_vocab().items()))
    words = [
        type(tokenizer).__name__, vocabulary, str(tokenizer.chat_template),
        str(tokenizer.special_tokens_map),
    ]  # fmt: skip
    return {
        "content": content_hash(path),
        "ending": split_name(path)[1].lower(),
        "tokenizer": hashlib.sha256("\0".join(words).encode()).hexdigest(),
        "max_length": max_length,
        "form": form,
        # Messages of rows that were passed over name the file.
        "skipped": str(path) if skip else None,
        "versions": [VERSION, __version__, transformers.__version__, tokenizers.__version__],
    }


def content_hash(path: Path) -> str:
    """The SHA-256 of a file, which processors have instructions for."""
    digest = hashlib.sha256()
    block = bytearray(1 << 20)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(memoryview(block)[:count])
    return digest.hexdigest()
