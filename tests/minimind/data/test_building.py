"""A file's tokens, made once: by several processes, kept, found again, and never taken half."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from killed import every_death

from minimind.data import building
from minimind.data.building import IN_MEMORY, Cache, content_hash, default_cache, open_store
from minimind.data.reading import DataError
from minimind.data.store import INDEX, MappedStore, MemoryStore
from minimind.data.tokenizer import load_tokenizer
from minimind.files import hold, release


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def large(monkeypatch):
    """Every file is large enough for the cache and for several processes."""
    monkeypatch.setattr(building, "CACHED_FROM", 0)
    monkeypatch.setattr(building, "SHARED_FROM", 0)
    monkeypatch.setattr(building, "AT_ONCE", 16)
    monkeypatch.setattr(building, "usable_cores", lambda: 3)


def row(i):
    return json.dumps({"prompt": f"{i}加1是几？", "response": f"是{i + 1}。" * (1 + i % 5)})


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(row(i) for i in range(200)))
    return path


def same(one, other):
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("tokens", "offsets", "wholes", "flags")
    ) and all(
        (one.sample(r), one.sample(r).place) == (other.sample(r), other.sample(r).place)
        for r in one.kept().tolist()
    )


def read_again(monkeypatch):
    """What is read of data files from now on, as a list that grows."""
    seen = []
    real = building.numbered_rows
    monkeypatch.setattr(
        building, "numbered_rows", lambda path, *more: seen.append(path) or real(path, *more)
    )
    return seen


def test_small_files_are_kept_in_memory_only(tmp_path, data, tokenizer):
    store = open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    assert isinstance(store, MemoryStore) and not (tmp_path / "c").exists()


@pytest.mark.parametrize("cores", [1, 2, 3])
def test_the_cache_holds_what_memory_would(tmp_path, data, tokenizer, large, monkeypatch, cores):
    monkeypatch.setattr(building, "usable_cores", lambda: cores)
    made = open_store(data, tokenizer, 40, cache=Cache(tmp_path / "c"))
    monkeypatch.setattr(building, "CACHED_FROM", 1 << 30)
    memory = open_store(data, tokenizer, 40)
    assert isinstance(made, MappedStore) and isinstance(memory, MemoryStore)
    assert same(memory, made) and made.form == memory.form == "prompt/response"
    assert memory.cut(np.arange(200)) == made.cut(np.arange(200)) > 0


def test_a_second_start_reads_no_row(tmp_path, data, tokenizer, large, monkeypatch):
    said = []
    cache = Cache(tmp_path / "c", say=said.append)
    first = open_store(data, tokenizer, 99, cache=cache)
    seen = read_again(monkeypatch)
    second = open_store(data, tokenizer, 99, cache=cache)
    assert same(first, second) and seen == []
    place = next((tmp_path / "c").glob("mine-*"))
    assert said[0].startswith(f"{data}: tokens kept in {place} (")
    assert said[1:] == [f"{data}: tokens from {place}"]


def test_a_file_elsewhere_with_the_same_content_serves_and_is_named(
    tmp_path, data, tokenizer, large, monkeypatch
):
    open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    moved = tmp_path / "sub" / "mine.jsonl"
    moved.parent.mkdir()
    shutil.copy(data, moved)
    seen = read_again(monkeypatch)
    store = open_store(moved, tokenizer, 99, cache=Cache(tmp_path / "c"))
    assert seen == [] and store.sample(3).place == f"{moved}:4"


def test_a_changed_file_is_seen_though_size_and_time_are_the_same(tmp_path, data, tokenizer, large):
    before = open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    stat, text = data.stat(), data.read_text()
    data.write_text(text.replace('"prompt": "7', '"prompt": "8'))
    os.utime(data, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert data.stat().st_size == stat.st_size and data.stat().st_mtime_ns == stat.st_mtime_ns
    after = open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    assert not np.array_equal(before.tokens, after.tokens)
    assert after.sample(7)[0]["content"] == "8加1是几？"


def other_template(tokenizer):
    tokenizer.chat_template = tokenizer.chat_template.replace("helpful", "kind")


def other_words(tokenizer):
    tokenizer.add_tokens(["加1是几"])


def other_end(tokenizer):
    tokenizer.eos_token = "<s>"


@pytest.mark.parametrize(
    "change",
    [other_template, other_words, other_end, {"max_length": 98}, {"form": "prompt/response"},
     {"skip": True}, "__version__"],
)  # fmt: skip
def test_what_the_tokens_hang_on_makes_another_index(tmp_path, data, large, monkeypatch, change):
    asked = {"max_length": 99, "form": None, "skip": False}
    tokenizer, cache = load_tokenizer(), Cache(tmp_path / "c")
    open_store(data, tokenizer, **asked, cache=cache)
    seen = read_again(monkeypatch)
    open_store(data, load_tokenizer(), **asked, cache=cache)
    assert seen == []
    if callable(change):
        change(tokenizer)
    elif isinstance(change, str):
        monkeypatch.setattr(building, change, "another")
    else:
        asked |= change
    open_store(data, tokenizer, **asked, cache=cache)
    assert seen == [data] and len(list((tmp_path / "c").glob("mine-*"))) == 2


@pytest.mark.parametrize("name", ["tokens.bin", INDEX])
@pytest.mark.parametrize("content", [None, b"", b"{}"])
def test_a_damaged_index_is_made_anew(tmp_path, data, tokenizer, large, name, content):
    cache = Cache(tmp_path / "c")
    first = open_store(data, tokenizer, 99, cache=cache)
    tokens = np.array(first.tokens)
    place = first.directory / name
    place.unlink()
    if content is not None:
        place.write_bytes(content)
    assert np.array_equal(open_store(data, tokenizer, 99, cache=cache).tokens, tokens)


def opened(path, cache, tokenizer, out):
    store = open_store(path, tokenizer, 99, cache=Cache(cache))
    out.put((store.tokens.tolist()[:50], len(store)))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are forked")
def test_two_at_once_make_it_once(tmp_path, data, tokenizer, large, monkeypatch):
    built = tmp_path / "built"
    real = building._build

    def slowly(*arguments):
        with built.open("a") as file:
            file.write("once\n")
        time.sleep(0.5)
        real(*arguments)

    monkeypatch.setattr(building, "_build", slowly)
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    processes = [
        context.Process(target=opened, args=(data, tmp_path / "c", tokenizer, out))
        for _ in range(3)
    ]
    for process in processes:
        process.start()
    results = [out.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert results[0] == results[1] == results[2] and built.read_text() == "once\n"
    assert [path.name[:5] for path in (tmp_path / "c").iterdir()] == ["mine-"]


def test_who_waits_is_told_so(tmp_path, data, tokenizer, large, monkeypatch):
    said = []
    open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    place = next((tmp_path / "c").glob("mine-*"))
    shutil.rmtree(place)
    lock = tmp_path / "c" / f".{place.name}.lock"
    lock.mkdir()
    held = hold(lock)
    if held is None:
        pytest.skip("no locks on this disk")
    monkeypatch.setattr(time, "sleep", lambda seconds: release(held))
    open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c", say=said.append))
    assert said[0] == f"{data}: waiting for another process that tokenises it"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="deaths are tried in forks")
def test_killed_at_any_write_nothing_is_taken_for_whole(tmp_path, data, tokenizer, large):
    where = tmp_path / "c"
    expected = np.array(open_store(data, tokenizer, 99).tokens)
    deaths = 0

    def build():
        building.usable_cores = lambda: 1  # in the copy that dies
        open_store(data, tokenizer, 99, cache=Cache(where))

    for _, died in every_death(where, build):
        deaths += died
        after = open_store(data, tokenizer, 99, cache=Cache(where))
        assert np.array_equal(after.tokens, expected)
        # Nor is anything left lying about, but an empty directory of what was just put in place.
        left = [p for p in where.rglob("*") if p.is_file()]
        assert all(p.parent == after.directory for p in left) and len(left) == 8
        shutil.rmtree(where)
    assert deaths > 10


def test_rooms_that_killed_runs_left_are_cleared(tmp_path, data, tokenizer, large):
    room = tmp_path / "c" / ".other-0123456789abcdef.0123456789abcdef.staging"
    room.mkdir(parents=True)
    (room / "tokens.bin").write_bytes(b"much")
    open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    assert not room.exists()


def test_an_error_leaves_nothing(tmp_path, data, tokenizer, large):
    data.write_text(data.read_text() + '\n{"prompt": "q"}\n')
    with pytest.raises(DataError, match=rf'^{data}:201: no "response", which'):
        open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    assert list((tmp_path / "c").iterdir()) == []


@pytest.mark.parametrize("cores", [1, 3])
def test_of_several_errors_the_first_is_said(tmp_path, tokenizer, large, monkeypatch, cores):
    monkeypatch.setattr(building, "usable_cores", lambda: cores)
    lines = [row(i) for i in range(200)]
    lines[70], lines[90], lines[150] = '{"prompt": 1, "response": "r"}', '{"prompt": "q"}', "{"
    path = tmp_path / "bad.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r'bad\.jsonl:71: "prompt" must be a text'):
        open_store(path, tokenizer, 99)
    lines[70] = lines[90] = row(0)
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"bad\.jsonl:151: not JSON"):
        open_store(path, tokenizer, 99)


@pytest.mark.parametrize("cores", [1, 3])
def test_bad_rows_are_counted_and_the_first_are_kept(
    tmp_path, tokenizer, large, monkeypatch, cores
):
    monkeypatch.setattr(building, "usable_cores", lambda: cores)
    lines = [row(i) for i in range(200)]
    lines[0], lines[1], lines[150] = "{", '{"mood": 1}', '{"prompt": "q"}'
    path, cache = tmp_path / "bad.jsonl", Cache(tmp_path / "c")
    path.write_text("\n".join(lines))
    for _ in range(2):  # the second out of the cache
        store = open_store(path, tokenizer, 99, skip=True, cache=cache)
        assert len(store) == 197 and store.refused.count == 3
        assert [number for number, _ in store.refused.first] == [1, 2, 151]
        assert store.refused.first[0][1].startswith(f"{path}:1: not JSON")
        assert store.sample(0).place == f"{path}:3"


def test_a_file_that_changes_meanwhile_is_refused(tmp_path, data, tokenizer, large, monkeypatch):
    real = building.in_order

    def changing(*arguments):
        yield from real(*arguments)
        data.write_text(data.read_text() + "\n" + row(1))

    monkeypatch.setattr(building, "in_order", changing)
    with pytest.raises(DataError, match="changed while it was read; start again"):
        open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    assert list((tmp_path / "c").iterdir()) == []


def test_without_a_cache_tokens_lie_where_they_are_forgotten(data, tokenizer, large):
    store = open_store(data, tokenizer, 99, cache=IN_MEMORY)
    place = store.directory
    assert isinstance(store, MappedStore) and place.is_dir()
    building._forget(place, os.getpid() + 1)  # as in a process that was forked from this one
    assert place.is_dir()
    del store
    assert not place.exists()


@pytest.fixture
def no_room(monkeypatch):
    """Nothing can be made in directories of this name."""
    real = Path.mkdir

    def mkdir(self, *arguments, **more):
        if self.name == "full":
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        real(self, *arguments, **more)

    monkeypatch.setattr(Path, "mkdir", mkdir)


def test_a_cache_that_was_asked_for_must_be_writable(tmp_path, data, tokenizer, large, no_room):
    with pytest.raises(DataError, match=r"cache .*full \(No space.*another by --cache, or do wi"):
        open_store(data, tokenizer, 99, cache=Cache(tmp_path / "full"))


def test_without_the_usual_one_it_goes_on(tmp_path, data, tokenizer, large, no_room):
    said = []
    cache = Cache(tmp_path / "full", fallback=True, say=said.append)
    store = open_store(data, tokenizer, 99, cache=cache)
    assert len(store) == 200 and store.directory.parent != tmp_path / "full"
    assert len(said) == 1 and "tokenised for this run alone" in said[0]


def test_a_disk_that_fills_up_is_said(tmp_path, data, tokenizer, large, monkeypatch):
    def full(self, chunk, packed):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(building.Writer, "add", full)
    with pytest.raises(DataError, match=r"cannot be written to .*c \(No space left on device\)"):
        open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c"))
    assert list((tmp_path / "c").iterdir()) == []


def test_the_bar_counts_bytes_to_the_end(tmp_path, data, tokenizer, large, capsys):
    open_store(data, tokenizer, 99, cache=Cache(tmp_path / "c", show=True))
    assert "tokenising mine.jsonl" in capsys.readouterr().err
    open_store(data, tokenizer, 98, cache=Cache(tmp_path / "c"))
    assert capsys.readouterr().err == ""


def test_the_default_is_where_the_system_keeps_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache().directory == tmp_path / "minimind" and default_cache().fallback
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for nothing in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert default_cache().directory == tmp_path / "home" / ".cache" / "minimind"


def test_the_environment_is_left_as_it_was(data, tokenizer, large, monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    open_store(data, tokenizer, 99)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_the_hash_is_of_all_of_a_file(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(256)) * 10_000)
    found = content_hash(path)
    with path.open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    assert found != content_hash(path) and len(found) == 64
