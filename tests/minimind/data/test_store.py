"""Tokens in memory and in files: the same samples, whole or refused."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from minimind.data.encoding import Encoder
from minimind.data.forms import Reader
from minimind.data.store import INDEX, Lazy, MappedStore, MemoryStore, Writer, pack
from minimind.data.tokenizer import load_tokenizer

ROWS = [
    (
        3 * i + 1,
        {
            "conversations": [
                {"role": "user", "content": f"{i}？"},
                *([{"role": "assistant", "content": f"是{i}。" * (i % 7 + 1)}] if i % 5 else []),
            ]
        },
    )
    for i in range(300)
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture(scope="module")
def chunks(tokenizer):
    encoder = Encoder(tokenizer, 40, "a.jsonl", Reader(), skip=True)
    parts = [ROWS[:1], ROWS[1:130], [(500, "bad")], ROWS[130:]]
    return [encoder.rows(part) for part in parts]


def written(directory, chunks):
    directory.mkdir()
    writer = Writer(directory, "<u2")
    for chunk in chunks:
        writer.add(chunk, pack(chunk.samples))
    writer.finish("conversations", {"content": "of these"})
    return directory


@pytest.fixture(scope="module")
def stores(tmp_path_factory, tokenizer, chunks):
    directory = written(tmp_path_factory.mktemp("store") / "s", chunks)
    return MemoryStore(chunks, tokenizer), MappedStore(directory, "a.jsonl")


def test_both_hold_the_same(stores):
    memory, mapped = stores
    assert len(memory) == len(mapped) == 300
    assert memory.form == mapped.form == "conversations"
    assert (memory.refused.count, memory.refused.first) == (
        mapped.refused.count,
        mapped.refused.first,
    )
    assert mapped.refused.count == 1
    assert memory.kept().tolist() == mapped.kept().tolist() == [i for i in range(300) if i % 5]
    assert memory.answered().tolist() == mapped.answered().tolist() == memory.kept().tolist()
    everything = np.arange(300)
    assert memory.cut(everything) == mapped.cut(everything) > 0
    assert memory.wholes.tolist() == mapped.wholes.tolist() and max(memory.wholes) > 40
    learnt = sum(int(memory.read(row)[1].sum()) for row in range(300))
    assert memory.learnt() == mapped.learnt() == learnt > 0
    for row in range(300):
        for ours, theirs in zip(memory.read(row), mapped.read(row), strict=True):
            assert ours.dtype == np.int64 and np.array_equal(ours, theirs)


def test_samples_come_back_from_any_block(stores):
    memory, mapped = stores
    rows = memory.kept().tolist()
    for row in [rows[0], rows[-1], *rows[::-7], rows[100], rows[100]]:
        ours, theirs = memory.sample(row), mapped.sample(row)
        assert ours == theirs == ROWS[row][1]["conversations"]
        assert theirs.place == ours.place == f"a.jsonl:{3 * row + 1}"
        assert (ours.form, ours.tools, list(ours.unlearnt)) == (
            theirs.form,
            theirs.tools,
            list(theirs.unlearnt),
        )


def test_what_is_done_to_a_sample_is_not_done_to_the_next(stores):
    mapped = stores[1]
    first = mapped.sample(1)
    first[0]["content"] = "other"
    assert mapped.sample(1) == ROWS[1][1]["conversations"]


def test_what_is_read_is_a_copy_and_stays_after_pages_are_given_back(stores):
    mapped = stores[1]
    ids, mask = mapped.read(1)
    before = ids.copy()
    mapped.release()
    assert np.array_equal(ids, before)
    ids[:], mask[:] = 7, 7
    assert np.array_equal(mapped.read(1)[0], before)


def test_pages_are_given_back_now_and_then(stores, monkeypatch):
    mapped = stores[1]
    given = []
    monkeypatch.setattr("minimind.data.store._READS", 10)
    monkeypatch.setattr(mapped, "release", lambda: given.append(None))
    mapped._read = 0
    for _ in range(25):
        mapped.read(1)
    assert len(given) == 2
    mapped.batch([1, 2, 3, 4, 6], 0)
    assert len(given) == 3
    mapped.interleaved(np.arange(1, 12))
    assert len(given) == 4


@pytest.mark.parametrize("pad", [0, 5])
def test_batches_and_hashes_are_made_of_what_is_read(stores, pad):
    rows = [7, 1, 13, 2]
    for store in stores:
        ids, mask = store.batch(rows, pad)
        parts = [store.read(row) for row in rows]
        longest = max(len(part) for part, _ in parts)
        assert ids.shape == mask.shape == (4, longest) and ids.dtype == mask.dtype == np.int64
        for line, learnt, (part, bits) in zip(ids, mask, parts, strict=True):
            assert line.tolist() == part.tolist() + [pad] * (longest - len(part))
            assert learnt.tolist() == bits.tolist() + [0] * (longest - len(part))
        flat = np.concatenate([array for part in parts for array in part])
        assert np.array_equal(store.interleaved(np.array(rows)), flat)


def test_a_mapped_store_travels_as_its_place(stores):
    mapped = stores[1]
    made = pickle.dumps(mapped)
    assert len(made) < 1000
    again = pickle.loads(made)
    assert np.array_equal(again.read(7)[0], mapped.read(7)[0])
    assert again.sample(7) == mapped.sample(7) and again.sample(7).place == "a.jsonl:22"


def test_what_is_not_whole_is_refused(tmp_path, chunks):
    directory = written(tmp_path / "s", chunks)
    tokens = directory / "tokens.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    with pytest.raises(ValueError, match=r"tokens\.bin has \d+ bytes, not"):
        MappedStore(directory, "a.jsonl")
    tokens.write_bytes(content)
    MappedStore(directory, "a.jsonl")
    for missing in ("flags.bin", INDEX):
        (directory / missing).unlink()
        with pytest.raises(FileNotFoundError):
            MappedStore(directory, "a.jsonl")


def test_what_writes_has_not_finished_is_no_store(tmp_path, chunks):
    (tmp_path / "s").mkdir()
    writer = Writer(tmp_path / "s", "<u2")
    writer.add(chunks[1], pack(chunks[1].samples))
    writer.close()
    with pytest.raises(FileNotFoundError):
        MappedStore(tmp_path / "s", "a.jsonl")


def test_nothing_at_all(tmp_path, tokenizer):
    directory = written(tmp_path / "s", [])
    for store in (MappedStore(directory, "a"), MemoryStore([], tokenizer)):
        assert len(store) == len(store.kept()) == len(store.answered()) == 0


def test_tools_and_turns_of_weight_zero_are_kept(tmp_path):
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "no", "weight": 0},
            {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {}}]},
        ],
        "tools": [{"name": "f", "parameters": {"a": [1.5, None, "½"]}}],
    }
    tokenizer = load_tokenizer()
    tokenizer.chat_template = (
        "{{ tools | tojson }}{% for m in messages %}{{ m.role ~ m.content }}"
        "{{ m.tool_calls | tojson if m.tool_calls else '' }}</s>{% endfor %}"
    )
    chunk = Encoder(tokenizer, 400, "a", Reader()).rows([(1, row)])
    sample = MappedStore(written(tmp_path / "s", [chunk]), "a").sample(0)
    assert sample == chunk.samples[0] and sample.tools == row["tools"]
    assert sample.unlearnt == [1]
    described = json.loads((tmp_path / "s" / INDEX).read_text(encoding="utf-8"))
    assert described["key"] == {"content": "of these"}


def test_lazy_sequences_are_sequences():
    made = []
    lazy = Lazy(4, lambda i: made.append(i) or i * i)
    assert made == [] and len(lazy) == 4
    assert (lazy[1], lazy[-1], lazy[1:3], lazy[::-2]) == (1, 9, [1, 4], [9, 1])
    assert lazy == [0, 1, 4, 9] and lazy == Lazy(4, lambda i: i * i)
    assert lazy != [0, 1, 4] and lazy != [0, 1, 4, 8] and lazy != {0, 1, 4, 9}
    assert list(lazy) == [0, 1, 4, 9] and 4 in lazy and sum(lazy) == 14
    for wrong in (4, -5):
        with pytest.raises(IndexError):
            lazy[wrong]
