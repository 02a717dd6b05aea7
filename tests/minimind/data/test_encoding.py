"""Rows as arrays of tokens: those that the plain way gives, to the bit, in every form of data."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from minimind.data.encoding import CUT, TEACHES, Encoder, Refusals, learnt_bit, token_dtype
from minimind.data.forms import FORMS, Reader, read_conversations
from minimind.data.reading import DataError, numbered_rows
from minimind.data.rendering import Renderer
from minimind.data.tokenizer import load_tokenizer

WORDS = ("hi", "你好", "</s>", "<s>assistant\n", "\n", "  ", "😀", "1+1=2", " the", "\ue000", "{{")


def rows(form, count=40):
    """Random rows of a form, with systems, weights and several turns where it has them."""
    rng = random.Random(form.name)

    def words():
        return "".join(rng.choices(WORDS, k=rng.choice((1, 3, 9)))) + "."

    def turns(role="role", content="content", user="user", assistant="assistant"):
        made = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            made += [
                {role: user, content: words()},
                {role: assistant, content: words(), "weight": rng.choice((1, 1, 0))},
            ]
        made[-1]["weight"] = 1
        return made[rng.choice((0, 0, 1)) :]

    for _ in range(count):
        row = {name: words() for name in form.needs}
        if form.name == "sharegpt":
            row = {"conversations": turns("from", "value", "human", "gpt")}
        elif form.needs[0] in ("conversations", "messages"):
            row = {form.needs[0]: turns()}
        elif form.name == "alpaca":
            row |= {"input": words(), "history": [[words(), words()]]}
        if form.name != "text" and rng.random() < 0.4:
            row["system"] = words()
        yield row


def plainly(tokenizer, sample):
    """Ids and mask by the template's own words for every sample, and one piece after the other."""
    renderer = Renderer(tokenizer)
    renderer._joins = False
    ids, mask = [], []
    for text, learnt in renderer.pieces(sample):
        piece = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        ids += piece
        mask += [learnt] * len(piece)
    return ids, mask


def each(chunk):
    """Ids and mask of every sample of a chunk."""
    bit = learnt_bit(chunk.tokens.dtype)
    for part in np.split(chunk.tokens, np.cumsum(chunk.lengths)[:-1]):
        yield (part & (bit - 1)).tolist(), (part >= bit).tolist()


@pytest.mark.parametrize("max_length", [4096, 20])
@pytest.mark.parametrize("form", FORMS, ids=[form.name for form in FORMS])
def test_tokens_and_masks_are_those_of_the_plain_way(tmp_path, form, max_length):
    path = tmp_path / "a.jsonl"
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows(form))
    path.write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer()
    chunk = Encoder(tokenizer, max_length, str(path), Reader()).rows(numbered_rows(path))
    samples = read_conversations(path)
    assert chunk.tokens.dtype == np.uint16 and chunk.numbers.tolist() == list(range(1, 41))
    kept = iter(chunk.samples)
    for sample, whole, flags, found in zip(
        samples, chunk.wholes, chunk.flags, each(chunk), strict=True
    ):
        ids, mask = plainly(tokenizer, sample)
        assert whole == len(ids)
        learnt = any(mask[1:max_length])
        assert found == ((ids[:max_length], mask[:max_length]) if learnt else ([], []))
        assert bool(flags & CUT) == (learnt and len(ids) > max_length)
        assert bool(flags & TEACHES) == sample.teaches
        assert not learnt or next(kept) == sample
    assert next(kept, None) is None


def widened(tokenizer, size):
    """The same tokenizer with further entries, up to ``size``."""
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = tokenizer.chat_template
    made.add_tokens([f"⟦{i}⟧" for i in range(size - len(made))])
    return made


def test_large_vocabularies_take_four_bytes():
    assert token_dtype(widened(load_tokenizer(), 1 << 15)) == "<u2"
    tokenizer = widened(load_tokenizer(), (1 << 15) + 1)
    assert token_dtype(tokenizer) == "<u4"
    last = f"⟦{(1 << 15) - 6400}⟧"
    row = {"prompt": "q", "response": f"a{last}"}
    chunk = Encoder(tokenizer, 99, "a", Reader()).rows([(1, row)])
    ((ids, mask),) = each(chunk)
    place = ids.index(1 << 15)  # whose own top bit of sixteen is set
    assert tokenizer.decode(ids[place]) == last and mask[place] and mask[place - 1]


class Slower(PreTrainedTokenizerFast):
    """One whose encoding may have been made another: it is asked itself."""

    def __call__(self, *arguments, **more):
        self.calls = getattr(self, "calls", 0) + 1
        return super().__call__(*arguments, **more)


def test_a_tokenizer_of_another_class_is_asked_itself():
    plain = load_tokenizer()
    tokenizer = Slower(tokenizer_object=plain.backend_tokenizer, bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = plain.chat_template
    found = [
        Encoder(each_one, 99, "a", Reader()).rows([(1, {"prompt": "你是谁？", "response": "我。"})])
        for each_one in (plain, tokenizer)
    ]
    assert tokenizer.calls and np.array_equal(found[0].tokens, found[1].tokens)


def test_a_tokenizers_own_truncation_and_padding_are_not_for_this():
    tokenizer = load_tokenizer()
    row = {"text": "春眠不觉晓，处处闻啼鸟。"}
    expected = Encoder(tokenizer, 99, "a", Reader()).rows([(1, row)]).tokens
    tokenizer.backend_tokenizer.enable_truncation(3)
    tokenizer.backend_tokenizer.enable_padding(length=20)
    assert np.array_equal(Encoder(tokenizer, 99, "a", Reader()).rows([(1, row)]).tokens, expected)


BAD = [
    (1, {"prompt": "q", "response": "r"}),
    (2, {"prompt": "q"}),
    (3, {"prompt": "q", "response": "r", "tools": [{"name": "f"}]}),  # the template leaves it out
    (4, ["q", "r"]),
    (5, {"prompt": "q2", "response": "r2"}),
]


def test_bad_rows_are_counted_where_they_may_be():
    with pytest.raises(DataError, match="^a:2: "):
        Encoder(load_tokenizer(), 99, "a", Reader()).rows(BAD)
    chunk = Encoder(load_tokenizer(), 99, "a", Reader(), skip=True).rows(BAD)
    assert chunk.numbers.tolist() == [1, 5] and len(chunk.lengths) == len(chunk.flags) == 2
    assert len(chunk.wholes) == 2
    assert [sample.place for sample in chunk.samples] == ["a:1", "a:5"]
    fine = Encoder(load_tokenizer(), 99, "a", Reader()).rows([BAD[0], BAD[4]])
    assert np.array_equal(chunk.tokens, fine.tokens)
    assert chunk.refused.count == 3
    assert [number for number, _ in chunk.refused.first] == [2, 3, 4]
    assert "leaves out the tools" in chunk.refused.first[1][1]


def test_the_first_refusals_are_kept_in_the_files_order():
    refused = Refusals()
    for number in (9, 4, 7):
        refused.add(number, f"row {number}")
    other = Refusals(1, [(2, "row 2")])
    refused.join(other)
    assert (refused.count, refused.first) == (4, [(2, "row 2"), (4, "row 4"), (7, "row 7")])


def test_of_no_samples_come_empty_arrays():
    chunk = Encoder(load_tokenizer(), 99, "a", Reader()).rows([])
    assert chunk.tokens.tolist() == chunk.lengths.tolist() == chunk.flags.tolist() == []
    assert chunk.samples == [] and chunk.tokens.dtype == np.uint16


def test_a_first_token_alone_teaches_nothing():
    # Nothing comes before it that could predict it.
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    turns = [{"role": "assistant", "content": "a"}, {"role": "user", "content": " b"}]
    rows = [(1, {"messages": turns}), (2, {"messages": [turns[1], turns[0]]})]
    chunk = Encoder(tokenizer, 99, "a", Reader()).rows(rows)
    assert chunk.lengths.tolist() == [0, 2] and chunk.wholes.tolist() == [2, 2]
    assert chunk.flags.tolist() == [TEACHES, TEACHES]
