"""The tokenizer: its entries, lossless round trips, the chat template, and its own training."""

from __future__ import annotations

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
from places import ORIGINAL
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minimind.data.tokenizer import (
    CHAT_TEMPLATE,
    TOKENIZER_DIRECTORY,
    VOCAB_SIZE,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
    training_texts,
)

DEFAULT_SYSTEM = "<s>system\nYou are a helpful assistant.</s>\n"
TEXT = ["the cat sat on the mat, the dog ran to the log", "一个小型语言模型", "tea for two"] * 20


@pytest.fixture(scope="module")
def shipped():
    return load_tokenizer()


@pytest.fixture(scope="module", params=["tokenizer-2025-02", "tokenizer-2026-03"])
def golden(request):
    directory = ORIGINAL / request.param
    if not directory.is_dir():
        pytest.skip("the original's tokenizers are not here")
    return load_tokenizer(directory)


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def random_text(rng):
    def character():
        while True:
            # Half of them from the first planes' start, where the scripts in use are.
            point = rng.randrange(rng.choice((0x500, 0x10000, 0x110000)))
            if not 0xD800 <= point <= 0xDFFF:
                return chr(point)

    return "".join(character() for _ in range(rng.randrange(60)))


# --- the shipped entries --------------------------------------------------------------------------


def test_shipped_entries(shipped):
    assert len(shipped) == VOCAB_SIZE == 6400
    assert sorted(shipped.get_vocab().values()) == list(range(6400))
    assert shipped.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
    assert (shipped.unk_token_id, shipped.bos_token_id, shipped.eos_token_id) == (0, 1, 2)
    assert shipped.pad_token_id == 0
    # Without one entry for each byte, some text would come back as <unk>.
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= shipped.get_vocab().keys()
    # Generation stops at an id, so nothing but the special tokens may spell one.
    spelled = {t for t in shipped.get_vocab() if "<s>" in t or "</s>" in t}
    assert spelled == {"<s>", "</s>"}


def test_auto_tokenizer_loads_the_directory(shipped):
    loaded = AutoTokenizer.from_pretrained(str(TOKENIZER_DIRECTORY), local_files_only=True)
    assert loaded.get_vocab() == shipped.get_vocab()
    assert loaded.chat_template == shipped.chat_template == CHAT_TEMPLATE


def test_the_class_name_is_known_to_every_supported_transformers(shipped, tmp_path):
    # transformers 4.57 has no TokenizersBackend and refuses to load such a directory; 5 writes
    # that name but reads the older one as well.
    save_tokenizer(shipped, tmp_path)
    for directory in (TOKENIZER_DIRECTORY, tmp_path):
        config = json.loads((directory / "tokenizer_config.json").read_text("utf-8"))
        assert config["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_a_saved_copy_is_the_same(shipped, tmp_path):
    save_tokenizer(shipped, tmp_path)
    copy = load_tokenizer(tmp_path)
    text = "Hello 知更鸟, 2025!"
    assert copy.get_vocab() == shipped.get_vocab() and copy.chat_template == CHAT_TEMPLATE
    assert ids_of(copy, text) == ids_of(shipped, text)
    assert (copy.pad_token_id, copy.eos_token_id) == (0, 2)


# --- round trips ----------------------------------------------------------------------------------

STRINGS = {
    "empty": "",
    "emoji": "👩‍👩‍👧‍👦 🇨🇳 😀 a😀b ❤️",
    "all 256": "".join(map(chr, range(256))),
    "control": "\x00\x01\x1b[0m\x7f\x85\u200b\u2028\u2029\ufeff",
    "mixed": "你好 world，今天是2025年2月14日 (Friday)。Ça va? ¿Qué? Ἑλληνικά العربية",
    "whitespace": "   leading, \t\ttabs\t, two  three   spaces, \r\n\r\n lines\n\n\n trailing   ",
    "only spaces": "     ",
    "one space": " ",
    "punctuation": " , . ! ? 's n't 'm do n't we 've . ",
    "markup": "a literal <s>assistant\n and </s> and <unk> here",
    "rare": "龘靐齉 𠮷 \U0010ffff \uffff \ue000",
}


@pytest.mark.parametrize("text", STRINGS.values(), ids=STRINGS)
def test_round_trip(shipped, text):
    ids = ids_of(shipped, text)
    assert shipped.decode(ids) == text
    if "<unk>" not in text:
        assert 0 not in ids


def test_round_trip_of_any_unicode(shipped):
    rng = random.Random(0)
    for _ in range(500):
        text = random_text(rng)
        assert shipped.decode(ids_of(shipped, text)) == text


@pytest.mark.parametrize("text", STRINGS.values(), ids=STRINGS)
def test_round_trip_of_the_originals(golden, text):
    assert golden.decode(ids_of(golden, text)) == text


def test_digits_stay_single(shipped):
    assert len(ids_of(shipped, "20250214")) == 8
    assert len(ids_of(shipped, " 7")) == 2  # not one " 7": 7 is the same token everywhere
    for text, position in (("7", 0), ("x7", -1), (" 7", -1), ("乘7", -1), ("17", -1)):
        assert ids_of(shipped, text)[position] == ids_of(shipped, "7")[0]
    joined = [t for t in shipped.get_vocab() if len(t) > 1 and any(c in "0123456789" for c in t)]
    assert joined == []


def test_special_tokens_in_text_are_single_ids(shipped):
    assert ids_of(shipped, "<s>x</s>")[0] == 1 and ids_of(shipped, "<s>x</s>")[-1] == 2
    assert shipped.decode(ids_of(shipped, "<s>x</s>"), skip_special_tokens=True) == "x"


# --- the chat template ----------------------------------------------------------------------------

USER, ANSWER = {"role": "user", "content": " hi\n"}, {"role": "assistant", "content": "Hello 你好!"}
SYSTEM = {"role": "system", "content": "Be brief."}
CHATS = {
    "default system": ([USER], False, DEFAULT_SYSTEM + "<s>user\n hi\n</s>\n"),
    "own system": ([SYSTEM, USER], False, "<s>system\nBe brief.</s>\n<s>user\n hi\n</s>\n"),
    "multi-turn": (
        [USER, ANSWER, USER, ANSWER],
        False,
        DEFAULT_SYSTEM + "<s>user\n hi\n</s>\n<s>assistant\nHello 你好!</s>\n" * 2,
    ),
    "prompt": ([USER], True, DEFAULT_SYSTEM + "<s>user\n hi\n</s>\n<s>assistant\n"),
    "prompt after turns": (
        [SYSTEM, USER, ANSWER, USER],
        True,
        "<s>system\nBe brief.</s>\n<s>user\n hi\n</s>\n<s>assistant\nHello 你好!</s>\n"
        "<s>user\n hi\n</s>\n<s>assistant\n",
    ),
}


@pytest.mark.parametrize("chat", CHATS.values(), ids=CHATS)
def test_chat_template(shipped, chat):
    turns, prompt, expected = chat
    text = shipped.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt)
    assert text == expected
    ids = shipped.apply_chat_template(turns, add_generation_prompt=prompt, return_dict=False)
    assert ids == ids_of(shipped, expected)  # no second <s> in front


# --- errors ---------------------------------------------------------------------------------------


def copied(tmp_path):
    return Path(shutil.copytree(TOKENIZER_DIRECTORY, tmp_path / "tok"))


def missing_directory(tmp_path):
    return tmp_path / "tok"


def a_file(tmp_path):
    (tmp_path / "tok").write_text("x")
    return tmp_path / "tok"


def no_tokenizer_json(tmp_path):
    (copied(tmp_path) / "tokenizer.json").unlink()
    return tmp_path / "tok"


def garbled_tokenizer_json(tmp_path):
    (copied(tmp_path) / "tokenizer.json").write_text('{"version": "1.0", "trunc')
    return tmp_path / "tok"


def not_a_tokenizer(tmp_path):
    (copied(tmp_path) / "tokenizer.json").write_text("{}")
    return tmp_path / "tok"


def garbled_config(tmp_path):
    (copied(tmp_path) / "tokenizer_config.json").write_text("{nonsense")
    return tmp_path / "tok"


def no_chat_template(tmp_path):
    (copied(tmp_path) / "chat_template.jinja").unlink()
    return tmp_path / "tok"


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (missing_directory, FileNotFoundError, "no tokenizer at "),
        (a_file, FileNotFoundError, "no tokenizer at "),
        (no_tokenizer_json, FileNotFoundError, "no tokenizer at .* with tokenizer.json"),
        (garbled_tokenizer_json, ValueError, "cannot be read"),
        (not_a_tokenizer, ValueError, "cannot be read"),
        (garbled_config, ValueError, "cannot be read"),
        (no_chat_template, ValueError, "has no chat template"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_load_errors_name_the_path_and_the_remedy(tmp_path, damage, error, message):
    directory = damage(tmp_path)
    with pytest.raises(error, match=message) as caught:
        load_tokenizer(directory)
    assert str(directory) in str(caught.value)
    remedy = str(caught.value).rpartition("; ")[2].split(" ")[0]
    assert remedy in {"check", "add", "copy", "restore", "replace", "use", "train"}


# --- training -------------------------------------------------------------------------------------


def test_training_twice_gives_the_same_files(tmp_path):
    for name in ("a", "b"):
        train_tokenizer(TEXT, vocab_size=290).save_pretrained(str(tmp_path / name))
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert "tokenizer.json" in files
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    loaded = load_tokenizer(tmp_path / "a")
    assert len(loaded) == 290 and loaded.eos_token_id == 2
    assert len(ids_of(loaded, " the")) == 1  # the merges are used
    assert loaded.decode(ids_of(loaded, "the 龘 7 cat")) == "the 龘 7 cat"


def test_too_little_text_is_refused():
    with pytest.raises(ValueError, match=r"texts give only \d+ entries, not 6400; add text"):
        train_tokenizer(TEXT)


@pytest.mark.slow
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="pydoc_data.topics differs")
def test_retraining_gives_the_shipped_vocabulary():
    retrained = json.loads(train_tokenizer(training_texts()).backend_tokenizer.to_str())
    shipped = json.loads((TOKENIZER_DIRECTORY / "tokenizer.json").read_text("utf-8"))
    assert retrained["model"]["vocab"] == shipped["model"]["vocab"]
    assert retrained["model"]["merges"] == shipped["model"]["merges"]
    assert retrained["pre_tokenizer"] == shipped["pre_tokenizer"]


@pytest.mark.parametrize("prefix", ["#", "é", "#" * 30])
def test_a_tokenizer_that_would_end_the_process_is_refused(tmp_path, prefix):
    shutil.copytree(TOKENIZER_DIRECTORY, tmp_path / "t")
    content = json.loads((tmp_path / "t" / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"]["continuing_subword_prefix"] = prefix
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="of which its reader would end the process"):
        load_tokenizer(tmp_path / "t")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"model": 3}', "[" * 100_000, '{"model": {}}']
)
def test_a_tokenizer_that_is_none_is_refused(tmp_path, content):
    shutil.copytree(TOKENIZER_DIRECTORY, tmp_path / "t")
    (tmp_path / "t" / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="cannot be read") as caught:
        load_tokenizer(tmp_path / "t")
    assert len(str(caught.value)) < 2000


def test_a_panic_of_the_reader_is_a_refusal(monkeypatch):
    panic = type("PanicException", (BaseException,), {})("index out of range")
    for raised, expected in ((panic, ValueError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def reader(*args, raised=raised, **kwargs):
            raise raised

        monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", reader)
        with pytest.raises(expected):
            load_tokenizer()
