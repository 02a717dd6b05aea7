"""The shipped conversations: made again byte for byte, and fit for what they are for."""

from __future__ import annotations

import re

import pytest

from minimind.data.forms import read_conversations
from minimind.data.reading import DATA_DIRECTORY, SHIPPED_DATA, find_data
from minimind.data.toydata import build

NAMES = {f"{name}{split}" for name in SHIPPED_DATA for split in ("", ".heldout")}
CHINESE = re.compile(r"[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def sets():
    return build.build()


def questions(conversations):
    return [t["content"] for turns in conversations for t in turns if t["role"] == "user"]


def exchanges(conversations):
    """Every question with the answer that follows it."""
    for turns in conversations:
        for question, answer in zip(turns[::2], turns[1::2], strict=True):
            yield question["content"], answer["content"]


def identity_questions():
    """Every wording about identity, held-out ones too, in the form that says two are the same."""
    return {
        build.normalised(question)
        for language in build.LANGUAGES
        for entry in build.entries(language, "identity")
        for question in entry.questions + entry.heldout
    }


def test_the_same_seed_gives_the_same_sets(sets):
    assert build.build() == sets
    other = build.build(seed=1)
    assert other.keys() == sets.keys() and other["base"] != sets["base"]


def test_the_shipped_files_are_what_build_gives(tmp_path, sets):
    assert build.OUT.resolve() == DATA_DIRECTORY.resolve()
    counts = build.write(tmp_path / "new")
    assert counts == {name: len(conversations) for name, conversations in sets.items()}
    written = {path.name for path in (tmp_path / "new").iterdir()}
    assert written == {f"{name}.jsonl" for name in NAMES}
    assert written == {path.name for path in DATA_DIRECTORY.glob("*.jsonl")}
    for name in written:
        assert (tmp_path / "new" / name).read_bytes() == (DATA_DIRECTORY / name).read_bytes()


@pytest.mark.parametrize("name", sorted(NAMES))
def test_the_shipped_files_pass_the_readers_checks(sets, name):
    assert read_conversations(DATA_DIRECTORY / f"{name}.jsonl") == sets[name]
    if name in SHIPPED_DATA:
        assert find_data(name) == DATA_DIRECTORY / f"{name}.jsonl"


def test_enough_of_both_languages(sets):
    chinese = [bool(CHINESE.search(turns[0]["content"])) for turns in sets["base"]]
    assert chinese.count(True) >= 1500 and chinese.count(False) >= 1500
    for name in NAMES:
        found = {bool(CHINESE.search(turns[1]["content"])) for turns in sets[name]}
        assert found == {True, False}, name


def test_no_heldout_question_is_in_a_training_set(sets):
    asked = {build.normalised(q) for name in SHIPPED_DATA for q in questions(sets[name])}
    for name in SHIPPED_DATA:
        held_out = questions(sets[f"{name}.heldout"])
        assert len(held_out) >= 50, name  # or there would be nothing to measure on
        assert [q for q in held_out if build.normalised(q) in asked] == []


def test_no_conversation_comes_twice(sets):
    for name, conversations in sets.items():
        assert len({str(turns) for turns in conversations}) == len(conversations), name


def test_turns_alternate_and_heldout_ones_are_single(sets):
    for name, conversations in sets.items():
        for turns in conversations:
            roles = [turn["role"] for turn in turns]
            assert roles == ["user", "assistant"] * (len(turns) // 2)
            assert len(turns) == 2 or not name.endswith(".heldout")
    lengths = {len(turns) for turns in sets["base"]}
    assert lengths == {2, 4, 6}


def test_identity_answers_name_the_right_persona(sets):
    about = identity_questions()
    found = {}
    for name, personas, wrong in (
        ("base", build.BASE, build.ROBIN),
        ("identity", build.ROBIN, build.BASE),
        ("identity.heldout", build.ROBIN, build.BASE),
    ):
        found[name] = 0
        for question, answer in exchanges(sets[name]):
            if build.normalised(question) not in about:
                continue
            found[name] += 1
            language = "zh" if CHINESE.search(answer) else "en"
            assert personas[language].name in answer, (question, answer)
            assert wrong[language].name not in answer and wrong[language].maker not in answer
    # Every wording is trained on; all exchanges of the held-out set are about identity.
    assert found["base"] >= 300 and found["identity"] >= 300
    assert found["identity.heldout"] == len(sets["identity.heldout"])


def test_base_heldout_asks_nothing_about_identity(sets):
    about = identity_questions()
    assert [q for q in questions(sets["base.heldout"]) if build.normalised(q) in about] == []
    assert not any("MiniMind" in answer for _, answer in exchanges(sets["base.heldout"]))


def test_identity_set_keeps_other_knowledge(sets):
    about = identity_questions()
    base = dict(exchanges(sets["base"]))
    others = [(q, a) for q, a in exchanges(sets["identity"]) if build.normalised(q) not in about]
    assert len(others) >= 400
    others = [(q, a) for q, a in others if "Robin" not in a and "知更鸟" not in a]
    assert len(others) >= 400
    assert all(base[q] == a for q, a in others if q in base)


def test_one_question_has_one_answer_per_set(sets):
    # Two answers to the same words cannot both be learnt, nor held-out answers be met.
    for name in ("base.heldout", "identity.heldout", "tea", "tea.heldout"):
        answers = {}
        for question, answer in exchanges(sets[name]):
            assert answers.setdefault(question, answer) == answer, (name, question)


def test_nothing_is_left_to_fill_in(sets):
    for name, conversations in sets.items():
        for turns in conversations:
            for turn in turns:
                content = turn["content"]
                assert "{" not in content and "}" not in content, (name, content)
                assert "|" not in content and content == content.strip() != "", (name, content)


def test_sums_are_right(sets):
    pattern = re.compile(r"^(\d+) (plus|minus|times) (\d+) is (\d+)\.$")
    found = 0
    for name in ("base", "base.heldout"):
        for question, answer in exchanges(sets[name]):
            if match := pattern.match(answer):
                x, y, z = (int(match[i]) for i in (1, 3, 4))
                assert z == {"plus": x + y, "minus": x - y, "times": x * y}[match[2]]
                assert str(x) in question and str(y) in question
                found += 1
    assert found >= 500


# --- the format of the text files -----------------------------------------------------------------


def test_parse_plain_blocks():
    text = (
        "# a remark\nQ: one?\nQ: uno\nH: ein?\nA: first\nA: second\n\n\nQ: two\n# inside\nA: x: y\n"
    )
    assert list(build.parse(text)) == [
        build.Entry(["one?", "uno"], ["ein?"], ["first", "second"]),
        build.Entry(["two"], [], ["x: y"]),
    ]


def test_parse_rows_fill_every_placeholder():
    text = "Q: {a}, {b}?\nH: held {a}\nA: {a} is {c}, {a}.\n- x y | 2 | three\n- p|q|r\n"
    assert list(build.parse(text)) == [
        build.Entry(["x y, 2?"], ["held x y"], ["x y is three, x y."]),
        build.Entry(["p, q?"], ["held p"], ["p is r, p."]),
    ]


def test_parse_leaves_other_placeholders_and_empty_blocks():
    assert list(build.parse("# only a remark\n\n \n\nQ: who?\nA: {name}\n")) == [
        build.Entry(["who?"], [], ["{name}"])
    ]
    assert list(build.parse("")) == []


def test_parse_refuses_an_unknown_mark():
    with pytest.raises(KeyError, match="X"):
        list(build.parse("Q: a\nX: b\nA: c\n"))


def test_answers_are_taken_in_turn():
    entry = build.Entry(["a", "b", "c"], ["d"], ["1", "2"])
    assert build.pairs(entry) == [("a", "1"), ("b", "2"), ("c", "1")]
    assert build.pairs(entry, heldout=True) == [("d", "1")]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("What's  your name?", "whats your NAME", True),
        ("你叫什么？", "你叫什么", True),
        ("3 + 4 = ?", "3+4=?", True),
        ("3 - 4", "34", False),
        ("3 * 4", "3 + 4", False),
        ("tea", "teas", False),
    ],
)
def test_normalised(one, other, same):
    assert (build.normalised(one) == build.normalised(other)) is same
