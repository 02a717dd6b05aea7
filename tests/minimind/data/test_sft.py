"""Conversations as tokens: the mask to the token, cutting, batches, and samples without a word."""

from __future__ import annotations

import hashlib
import itertools
import json
import pickle
import random

import pytest
import torch
from places import ORIGINAL
from torch.utils.data import DataLoader

from minimind.data.forms import read_conversations
from minimind.data.reading import DataError, find_data
from minimind.data.sft import LengthGroupedBatches, SFTDataset
from minimind.data.store import MappedStore, MemoryStore
from minimind.data.tokenizer import load_tokenizer

DEFAULT_SYSTEM = "You are a helpful assistant."


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


def chat(*contents, system=None, first="user"):
    """Turns that alternate between user and assistant, after a system turn if one is given."""
    roles = itertools.cycle(["user", "assistant"] if first == "user" else ["assistant", "user"])
    turns = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


def pieces(item, tokenizer):
    """The item's text as ``(supervised, text)``, cut where the mask changes."""
    ids, labels, mask = (t.tolist() for t in item)
    assert ids == labels and len(mask) == len(ids) and set(mask) <= {0, 1}
    runs = itertools.groupby(zip(mask, ids, strict=True), key=lambda pair: pair[0])
    return [(flag, tokenizer.decode([i for _, i in run])) for flag, run in runs]


def by_hand(conversation):
    """What `pieces` must give with the shipped template, written out from the format."""
    turns = [(t["role"], t["content"]) for t in conversation]
    if turns[0][0] != "system":
        turns.insert(0, ("system", DEFAULT_SYSTEM))
    parts = []
    for role, content in turns:
        flag = int(role == "assistant")
        parts += [(0, f"<s>{role}\n"), (flag, f"{content}</s>"), (0, "\n")]
    groups = itertools.groupby(parts, key=lambda part: part[0])
    return [(flag, "".join(text for _, text in group)) for flag, group in groups]


def words(count, start=0):
    return " ".join(f"w{i % 10}" for i in range(start, start + count))


# --- the mask -------------------------------------------------------------------------------------

CONVERSATIONS = {
    "one exchange": chat("hi", "hello"),
    "three exchanges": chat("hi", "hello", "1+1=?", "It is 2.", "再见", "再见！"),
    "system turn": chat("hi", "Hello.", "bye", "Bye.", system="Be brief.\nVery."),
    "ends with the user": chat("hi", "hello", "still there?"),
    "two answers in a row": [*chat("hi", "hello"), {"role": "assistant", "content": "again"}],
    "two questions in a row": [{"role": "user", "content": "a"}, *chat("b", "c")],
    "system, then assistant": chat("hello", "hi", "so?", system="Greet.", first="assistant"),
    "opens with the assistant": chat("Welcome!", "hi", "What is it?", first="assistant"),
    "emoji split into bytes": chat("😀", "👩‍👩‍👧 龘", "𠮷", "\U0010ffff"),
    "end mark inside": chat("a</s>b", "c</s>d", "</s>", "</s>"),
    "fake turns inside": chat("x</s>\n<s>assistant\nno", "yes</s>\n<s>user\ny</s>\n<s>assistant\n"),
    "line breaks": chat("a\nb\n\n", "one\n\ntwo\n\n\n", "\n", "c\r\nd\n"),
    "trailing blanks": chat("q ", "r  \t\n ", " s", "t "),
    "the same words twice": chat("hello", "hello", "hello", "hello"),
    "one leading blank": chat("q", " r"),
}


@pytest.mark.parametrize("conversation", CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_mask_is_on_what_the_assistant_says(tokenizer, conversation):
    dataset = SFTDataset([conversation], tokenizer, max_length=4096)
    assert pieces(dataset[0], tokenizer) == by_hand(conversation)
    assert (dataset.cut, dataset.dropped) == (0, 0)


@pytest.mark.parametrize("content", ["a", "You", " are", "s", "system", DEFAULT_SYSTEM, "</s>"])
def test_an_opening_that_the_template_itself_contains(tokenizer, content):
    # Its first occurrence in the rendered text is not the assistant's.
    conversation = chat(content, "hi", "r", first="assistant")
    assert pieces(SFTDataset([conversation], tokenizer)[0], tokenizer) == by_hand(conversation)


@pytest.mark.parametrize("content", ["\nr", "\n\nr", "  r", "\t r", "\n"])
def test_an_answer_that_begins_with_blanks(tokenizer, content):
    # The prompt's last line break must stay a token of its own, as it is when generating; merged
    # with the answer's blanks it would be half supervised, and never seen at inference.
    conversation = chat("q", content + "x")
    ids = SFTDataset([conversation], tokenizer)[0][0].tolist()
    prompt = tokenizer.apply_chat_template(
        conversation[:1], add_generation_prompt=True, return_dict=False
    )
    assert ids[: len(prompt)] == prompt
    assert pieces(SFTDataset([conversation], tokenizer)[0], tokenizer) == by_hand(conversation)


def test_every_shipped_conversation(tokenizer):
    conversations = read_conversations(find_data("tea"))
    dataset = SFTDataset(find_data("tea"), tokenizer)
    assert dataset.conversations == conversations and len(dataset) == len(conversations)
    for index in range(len(dataset)):
        assert pieces(dataset[index], tokenizer) == by_hand(conversations[index])
    assert dataset.lengths == [len(dataset[i][0]) for i in range(len(dataset))]


@pytest.mark.parametrize("name", ["tokenizer-2025-02", "tokenizer-2026-03"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_mask_with_the_originals_tokenizers(name, system):
    if not (ORIGINAL / name).is_dir():
        pytest.skip("the original's tokenizers are not here")
    tokenizer = load_tokenizer(ORIGINAL / name)
    conversation = chat("hi", "Hello 😀\n", "1+1=?", "二。", system=system)
    item = SFTDataset([conversation], tokenizer)[0]
    said = [text for flag, text in pieces(item, tokenizer) if flag]
    assert said == [f"Hello 😀\n{tokenizer.eos_token}", f"二。{tokenizer.eos_token}"]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.decode(item[0]) == whole


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = load_tokenizer()
    tokenizer.chat_template = (
        "{%- for m in messages %}{{ loop.revindex ~ m['role'] ~ m['content'] ~ '</s>\n' }}"
        "{%- endfor %}"
    )
    with pytest.raises(ValueError, match="template writes earlier turns differently"):
        SFTDataset([chat("a", "b", "c", "d")], tokenizer)


# --- truncation -----------------------------------------------------------------------------------


def test_cut_and_dropped_at_the_very_token(tokenizer):
    conversation = chat("hi", "hello there, world")
    ids, _, mask = SFTDataset([conversation], tokenizer)[0]
    first, length = int(mask.argmax()), len(ids)
    short = chat("a", "b", system="")  # always kept, or nothing would be left
    for max_length in (first, first + 1, length - 1, length):
        dataset = SFTDataset([short, conversation], tokenizer, max_length)
        kept = max_length > first
        assert dataset.dropped == (not kept)
        assert dataset.cut == (kept and max_length < length)
        assert dataset.conversations == ([short, conversation] if kept else [short])
        assert len(dataset) == len(dataset.lengths) == len(dataset.conversations)
        if kept:
            got, labels, got_mask = dataset[1]
            assert torch.equal(got, ids[:max_length]) and torch.equal(labels, got)
            assert torch.equal(got_mask, mask[:max_length]) and got_mask.any()


def test_counts_over_several_samples(tokenizer):
    long, silent, fine = chat("q", words(40)), chat("q"), chat("q", "r")
    late = chat(words(40), "r")
    conversations = [long, silent, fine, late, long]
    dataset = SFTDataset(conversations, tokenizer, max_length=40)
    assert (dataset.cut, dataset.dropped) == (2, 2)
    assert dataset.conversations == [long, fine, long]
    assert dataset.lengths == [40, dataset.lengths[1], 40] and dataset.lengths[1] < 40


def test_more_samples_than_are_encoded_at_once(tokenizer):
    conversations = [chat(f"number {i}", f"it is {i}") for i in range(1030)]
    dataset = SFTDataset(conversations, tokenizer)
    assert len(dataset) == 1030
    for i in (0, 511, 512, 1023, 1024, 1029):
        assert pieces(dataset[i], tokenizer) == by_hand(conversations[i])


# --- items and batches ----------------------------------------------------------------------------


@pytest.fixture
def dataset(tokenizer):
    return SFTDataset([chat("q", words(n)) for n in (3, 20, 1, 9, 14)], tokenizer)


@pytest.mark.parametrize("pad", [0, 5])
def test_batches_with_the_default_collate(dataset, pad):
    dataset.pad_token_id = pad
    batches = list(DataLoader(dataset, batch_size=2))
    assert [len(x) for x, _, _ in batches] == [2, 2, 1]
    rows = iter(range(len(dataset)))
    for x, y, mask in batches:
        assert x.dtype == y.dtype == mask.dtype == torch.int64 and torch.equal(x, y)
        indices = list(itertools.islice(rows, len(x)))
        longest = max(dataset.lengths[i] for i in indices)
        assert x.shape == mask.shape == (len(indices), longest)
        for row, index in enumerate(indices):
            ids, _, item_mask = dataset[index]
            assert torch.equal(x[row, : len(ids)], ids)
            assert torch.equal(mask[row, : len(ids)], item_mask)
            assert (x[row, len(ids) :] == pad).all() and not mask[row, len(ids) :].any()


def test_items_and_batches_are_copies(dataset):
    before = [tuple(t.clone() for t in dataset[i]) for i in range(len(dataset))]

    def unchanged():
        return all(
            torch.equal(old, new)
            for i, item in enumerate(before)
            for old, new in zip(item, dataset[i], strict=True)
        )

    for samples in ([dataset[0]], dataset.__getitems__([1]), dataset.__getitems__([2, 3])):
        for x, y, mask in samples:
            kept = x.clone()
            y.fill_(7)
            assert torch.equal(x, kept)  # nor do X and Y share memory
            x.fill_(7)
            mask.fill_(7)
    assert unchanged()


# --- what cannot be used --------------------------------------------------------------------------


def test_missing_file_and_directory(tmp_path, tokenizer):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl; check the path.* base, identity, t"):
        SFTDataset(tmp_path / "none.jsonl", tokenizer)
    with pytest.raises(DataError, match=f"^{tmp_path} is a directory; name one"):
        SFTDataset(tmp_path, tokenizer)


@pytest.mark.parametrize("conversation", [chat("only a question"), chat(words(60), "r")])
def test_nothing_left_to_train_on(tmp_path, tokenizer, conversation):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"conversations": conversation}) + "\n")
    with pytest.raises(DataError, match="none of 1 samples .* within 50 tokens; raise max") as e:
        SFTDataset(path, tokenizer, max_length=50)
    assert str(path) in str(e.value)


def test_nothing_at_all(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text("\n")
    for nothing in (path, []):
        with pytest.raises(DataError, match="holds nothing to learn; write conversations"):
            SFTDataset(nothing, tokenizer)


def test_conversations_given_as_lists_are_checked_like_a_file(tokenizer):
    bad = [*chat("q"), {"role": "assistant", "content": "r", "mood": "sad"}]
    with pytest.raises(DataError, match=r"^mine, number 2: turn 2 \(assistant\).* field 'mood'"):
        SFTDataset([chat("q", "r"), bad], tokenizer, source="mine")
    wrong = {"role": "assistant", "content": "wrong", "weight": 0}
    item = SFTDataset([[*chat("q"), wrong, *chat("no", "r")]], tokenizer)[0]
    assert [text for flag, text in pieces(item, tokenizer) if flag] == ["r</s>"]


def test_texts_are_learnt_whole_between_their_ends(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"text": "春眠不觉晓，\\n处处闻啼鸟。"}\n{"text": "Rain."}\n', encoding="utf-8"
    )
    dataset = SFTDataset(path, tokenizer)
    assert dataset.form == "text"
    assert pieces(dataset[0], tokenizer) == [(1, "<s>春眠不觉晓，\n处处闻啼鸟。</s>")]
    ids = dataset[1][0].tolist()
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert ids[1:-1] == tokenizer("Rain.", add_special_tokens=False)["input_ids"]
    assert len(SFTDataset(path, tokenizer, max_length=3)[0][0]) == 3


def test_a_hash_is_of_each_samples_ids_and_mask_in_order(tokenizer):
    # Resume points hold it: it must stay what it was.
    dataset = SFTDataset([chat("q", words(n)) for n in (3, 20, 1)], tokenizer)
    digest = hashlib.sha256()
    for ids, mask in dataset.samples:
        digest.update(ids.numpy().tobytes() + mask.numpy().tobytes())
    assert dataset.fingerprint() == digest.hexdigest()


def test_a_large_file_lies_outside_of_memory_and_is_the_same(tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "a.jsonl"
    rows = [{"conversations": chat("q", words(n))} for n in (3, 20, 1, 9)]
    path.write_text("\n".join(map(json.dumps, rows)))
    small = SFTDataset(path, tokenizer, 40)
    monkeypatch.setattr("minimind.data.building.CACHED_FROM", 0)
    for large in (SFTDataset(path, tokenizer, 40), SFTDataset(path, tokenizer, 40, cache=tmp_path)):
        assert isinstance(large.store, MappedStore) and isinstance(small.store, MemoryStore)
        assert large.fingerprint() == small.fingerprint() and large.lengths == small.lengths
        assert large.conversations == small.conversations == [row["conversations"] for row in rows]
        assert (large.cut, large.dropped, large.form) == (small.cut, small.dropped, small.form)
        again = pickle.loads(pickle.dumps(large))
        for one, other, third in zip(large, small, again, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
            assert all(torch.equal(a, b) for a, b in zip(one, third, strict=True))
    assert len(list(tmp_path.glob("a-*"))) == 1


def test_bad_rows_of_a_file_are_counted(tmp_path, tokenizer):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "q", "response": "r"}\n{"prompt": "q"}\n')
    dataset = SFTDataset(path, tokenizer, skip_bad=True)
    assert len(dataset) == 1 and dataset.skipped.count == 1
    assert dataset.skipped.first[0][1].startswith(f"{path}:2: ")


def test_workers_that_load_read_the_same(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("minimind.data.building.CACHED_FROM", 0)
    path = tmp_path / "a.jsonl"
    rows = [{"conversations": chat("q", words(n))} for n in range(1, 12)]
    path.write_text("\n".join(map(json.dumps, rows)))
    dataset = SFTDataset(path, tokenizer)
    alone = list(DataLoader(dataset, batch_size=4))
    assert dataset.store.directory.is_dir()
    with_others = list(DataLoader(dataset, batch_size=4, num_workers=2))
    assert dataset.store.directory.is_dir()  # whoever ends does not take it away
    for one, other in zip(alone, with_others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_dataset_survives_pickling(tokenizer):
    # Workers that are spawned get it so.
    dataset = SFTDataset([chat("q", "r")], tokenizer)
    again = pickle.loads(pickle.dumps(dataset))
    assert again.conversations == dataset.conversations
    assert again.conversations[0].place == "the conversations, number 1"


@pytest.mark.parametrize("max_length", [1, 0, -5])
def test_max_length_too_small(tokenizer, max_length):
    with pytest.raises(ValueError, match=f"max_length must be at least 2 tokens, got {max_length}"):
        SFTDataset([chat("q", "r")], tokenizer, max_length)


# --- batches of similar length --------------------------------------------------------------------


@pytest.fixture(scope="module")
def lengths():
    rng = random.Random(0)
    return [rng.randrange(10, 500) for _ in range(2003)]


@pytest.mark.parametrize(("count", "size"), [(2003, 16), (7, 3), (6, 3), (1, 4), (33, 1)])
def test_every_index_once_and_len(lengths, count, size):
    batches = LengthGroupedBatches(lengths[:count], size)
    seen = list(batches)
    assert sorted(i for batch in seen for i in batch) == list(range(count))
    assert len(seen) == len(batches) == -(-count // size)
    sizes = sorted(len(batch) for batch in seen)
    assert sizes[1:] == [size] * (len(seen) - 1) and sizes[0] == (count % size or size)


def test_order_depends_on_seed_and_epoch_only(lengths):
    batches = LengthGroupedBatches(lengths, 16, seed=3)
    first = list(batches)
    random.seed(1)
    torch.manual_seed(1)
    state, torch_state = random.getstate(), torch.get_rng_state()
    assert list(batches) == first == list(LengthGroupedBatches(lengths, 16, seed=3))
    assert random.getstate() == state and torch.equal(torch.get_rng_state(), torch_state)
    assert list(LengthGroupedBatches(lengths, 16, seed=4)) != first
    batches.set_epoch(1)
    second = list(batches)
    assert second != first
    # The company changes too, not just the order of the same batches.
    assert len({frozenset(b) for b in first} & {frozenset(b) for b in second}) < len(first) / 10
    batches.set_epoch(0)
    assert list(batches) == first


def test_little_is_padded_and_long_ones_do_not_come_in_order(lengths):
    batches = list(LengthGroupedBatches(lengths, 16))
    longest = [max(lengths[i] for i in batch) for batch in batches]
    padded = sum(most * len(batch) for most, batch in zip(longest, batches, strict=True))
    assert 1 - sum(lengths) / padded < 0.05  # a random order wastes close to half
    rising = sum(a < b for a, b in itertools.pairwise(longest))
    assert 0.3 < rising / (len(batches) - 1) < 0.7
