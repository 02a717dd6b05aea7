"""What the package is built of and by: pinned, bounded below, with no more rights than needed."""

from __future__ import annotations

import re

import pytest
from places import ROOT

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_commits_and_say_their_version(path):
    used = re.findall(r"uses: *(\S+)(.*)", path.read_text(encoding="utf-8"))
    assert used
    loose = [
        action
        for action, comment in used
        if not re.fullmatch(r"[\w-]+/[\w./-]+@[0-9a-f]{40}", action)
        or not re.fullmatch(r" # v\d+(\.\d+)+", comment)
    ]
    assert not loose


def test_one_action_is_one_commit():
    pinned = {}
    for path in WORKFLOWS:
        for action, commit in re.findall(r"uses: *(\S+)@(\S+)", path.read_text(encoding="utf-8")):
            pinned.setdefault(action, set()).add(commit)
    assert all(len(commits) == 1 for commits in pinned.values()), pinned


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_may_read_and_no_more_unless_a_job_says_so(path):
    text = path.read_text(encoding="utf-8")
    assert re.search(r"^permissions: \{ contents: read \}$", text, re.MULTILINE)
    for job in re.split(r"\n  (?=[\w-]+:\n)", text)[1:]:
        if "write" in "".join(re.findall(r"permissions:.*", job)):
            assert "checkout" not in job  # nothing of the sources runs beside a right to write


def test_dependencies_are_bounded_below_and_not_above():
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = text[text.index("\ndependencies = ") : text.index("\n[project.scripts]")]
    named = re.findall(r'"([^"]+)"', section)
    named = [name for name in named if not name.startswith("lora-kernels[")]
    assert any(name.startswith("torch") for name in named)
    wrong = [
        name
        for name in named
        if not re.match(r"[\w-]+(>=[\d.]+(; .*)?|==[\d.]+)$", name)
        or ("==" in name.split(";")[0] and not name.startswith("ruff"))
    ]
    assert not wrong
