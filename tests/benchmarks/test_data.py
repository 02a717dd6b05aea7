"""The data benchmark: both ways make the same tokens, and every row is there."""

from __future__ import annotations

import json
import sys

import pytest

from benchmarks import data
from minimind import SFTDataset, load_tokenizer

pytestmark = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is read from /proc"
)


def test_the_plain_way_makes_the_same_tokens(tmp_path):
    path = tmp_path / "a.jsonl"
    data.write_data(path, 50)
    tokenizer = load_tokenizer()
    ours = SFTDataset(path, tokenizer, data.MAX_LENGTH)
    assert len(ours) == 50
    for (ids, mask), (own_ids, own_mask) in zip(
        data.plain(path, tokenizer), ours.samples, strict=True
    ):
        assert (ids, mask) == (own_ids.tolist(), own_mask.tolist())


def test_the_same_conversations_are_written_every_time(tmp_path):
    for name in "ab":
        data.write_data(tmp_path / name, 20)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert len((tmp_path / "a").read_text(encoding="utf-8").splitlines()) == 20


def test_memory_counts_what_is_held_while_it_watches():
    with data.Memory(every=0.01) as before:
        pass
    with data.Memory(every=0.01) as memory:
        held = bytearray(b"x" * (64 * data.MEGABYTE))
    assert memory.most - before.most > 50 * data.MEGABYTE and held


@pytest.mark.slow
def test_every_row_is_there(capsys):
    assert data.main(["--conversations", "4000", "--few", "40", "--rounds", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["few"]["conversations"] == 40 and found["few"]["ratio"] > 0
    assert found["first"]["conversations"] == found["second"]["conversations"] == 4000
    assert found["first"]["ms_each"] == pytest.approx(found["first"]["seconds"] / 4, rel=0.01)
    assert found["kept_mb"] > 0 and found["second"]["memory_mb"] > 0
