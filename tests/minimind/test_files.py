"""Files that belong together, in a directory of their own or among others, killed at any write."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from killed import every_death

from minimind.files import clear_up, hold, release, staged

NAMES = ("config.json", "model.safetensors", "tokenizer.json")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="deaths are tried in forks")


def write(out, text, check=None):
    with staged(out, check) as stage:
        stage.mkdir()
        for name in NAMES:
            (stage / name).write_text(text + name)
        (stage / "sub").mkdir()
        (stage / "sub" / "deep").write_text(text)


def content(out):
    return {str(p.relative_to(out)): p.read_text() for p in out.rglob("*") if p.is_file()}


def whole(text):
    return {name: text + name for name in NAMES} | {"sub/deep": text}


def anything(path):
    pass


def fresh(path):
    if path.exists() and any(path.iterdir()):
        raise ValueError("taken")


PLACES = {
    # What is there before, the check, and whether the old stands for a model.
    "a new directory": (None, fresh),
    "an empty directory": ({}, fresh),
    "over an earlier one": (whole("old "), anything),
    "among others": ({"other": "mine"}, None),
    "among others, over an earlier one": ({"other": "mine", **whole("old ")}, None),
}


@pytest.mark.parametrize(("before", "check"), PLACES.values(), ids=PLACES)
def test_killed_at_any_write_it_is_the_old_or_the_new_and_can_be_repeated(tmp_path, before, check):
    out, deaths = tmp_path / "m", 0

    def prepare():
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if before is not None:
            out.mkdir()
            for name, text in before.items():
                (out / name).parent.mkdir(exist_ok=True)
                (out / name).write_text(text)

    prepare()
    new = {**(before or {}), **whole("new ")}
    for count, died in every_death(tmp_path, write, out, "new ", check):
        deaths += died
        seen = {n: t for n, t in content(out).items() if ".staging/" not in n}
        if "model.safetensors" in seen:  # what is taken for a model is all of one
            assert seen in (new, before), count
        said = clear_up(out)
        assert clear_up(out) == [] and bool(said) >= (seen not in (new, before, {})), count
        assert (content(out) if out.exists() else None) in (new, before), count
        if not (check is fresh and out.exists() and content(out) == new):
            write(out, "new ", check)
        assert content(out) == new and os.listdir(tmp_path) == ["m"], count
        prepare()
    assert deaths > 10


@pytest.mark.parametrize(("before", "check"), PLACES.values(), ids=PLACES)
def test_a_failed_move_leaves_everything_as_it_was(tmp_path, monkeypatch, before, check):
    out = tmp_path / "m"
    if before is not None:
        out.mkdir()
        for name, text in before.items():
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text(text)
    for failing in range(1, 20):
        calls = 0

        def full(source, target, real, failing=failing):
            nonlocal calls
            calls += 1
            if calls == failing:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(source, target)

        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                real = getattr(os, name)
                patch.setattr(os, name, lambda s, t, real=real: full(s, t, real))
            try:
                write(out, "new ", check)
                break
            except OSError:
                pass
        assert (content(out) if out.exists() else None) == before, failing
        assert os.listdir(tmp_path) == ([] if before is None else ["m"])
    assert failing > 1 and content(out) == {**(before or {}), **whole("new ")}


def test_a_writer_that_lives_is_left_alone(tmp_path):
    out = tmp_path / "m"
    with staged(out) as stage:
        stage.mkdir()
        (stage / "a").write_text("1")
        assert clear_up(out) == [] and stage.exists()
    assert content(out) == {"a": "1"}


def test_only_what_a_writer_left_is_cleared_up(tmp_path):
    kept = [".m.0123456789abcdef.stagin", ".m2.0123456789abcdef.staging", ".env", "m.staging"]
    for name in kept:
        (tmp_path / name).mkdir()
    (tmp_path / ".m.0123456789abcdef.staging").mkdir()
    out = tmp_path / "m"
    out.mkdir()
    files = [".resume.pt", "resume.pt", ".other.abc", ".resume.pt.abcd1234"]
    for name in files:
        (out / name).touch()
    (said, more) = clear_up(out, ["resume.pt"])
    assert ".m.0123456789abcdef.staging" in said and ".resume.pt.abcd1234" in more
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "m"])
    assert sorted(os.listdir(out)) == sorted(files[:-1])


def test_a_lock_is_held_once_and_given_back(tmp_path):
    first = hold(tmp_path)
    assert first is not None
    with pytest.raises(BlockingIOError):
        hold(tmp_path)
    release(first)
    second = hold(tmp_path)
    assert second is not None
    release(second)


def test_a_single_file(tmp_path):
    with staged(tmp_path / "deep" / "m.pth", fresh) as stage:
        Path(stage).write_text("x")
    assert content(tmp_path) == {"deep/m.pth": "x"}


def test_who_comes_in_between_is_not_overwritten(tmp_path):
    out = tmp_path / "m"
    out.mkdir()
    with pytest.raises(FileExistsError, match="meanwhile"), staged(out, fresh) as stage:
        stage.mkdir()
        (stage / "a").write_text("mine")
        (out / "a").write_text("theirs")
    assert content(out) == {"a": "theirs"}
