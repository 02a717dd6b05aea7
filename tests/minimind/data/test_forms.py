"""The forms of data: told by their fields, read to the same samples, and mixed ones refused."""

from __future__ import annotations

import json

import pytest

from minimind.data.forms import FORMS, read_conversations, read_samples
from minimind.data.reading import DataError
from minimind.settings import Settings

TALK = [{"role": "user", "content": "你是谁？"}, {"role": "assistant", "content": "我叫罗宾。"}]
SYSTEM = {"role": "system", "content": "请简短回答。"}
Q, A = TALK[0]["content"], TALK[1]["content"]
SAID = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
TRL = {"prompt": [SYSTEM, *TALK, TALK[0]], "completion": [TALK[1]]}


def write(path, *rows):
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


SAME = {
    "conversations": {"conversations": TALK},
    "sharegpt": {"conversations": SAID},
    "messages": {"messages": TALK},
    "alpaca": {"instruction": Q, "input": "", "output": A},
    "prompt/completion": {"prompt": Q, "completion": A},
    "prompt/response": {"prompt": Q, "response": A},
    "question/answer": {"question": Q, "answer": A},
    "query/response": {"query": Q, "response": A},
    "input/output": {"input": Q, "output": A},
}
ALL = {**SAME, "text": {"text": Q}}


@pytest.mark.parametrize("form", SAME)
def test_each_form_is_told_by_its_fields(tmp_path, form):
    path = write(tmp_path / "a.jsonl", SAME[form], {**SAME[form], "system": SYSTEM["content"]})
    for given in (None, form):
        samples = read_conversations(path, given)
        assert samples == [TALK, [SYSTEM, *TALK]]
        assert [s.form for s in samples] == [form] * 2
        assert [s.place for s in samples] == [f"{path}:1", f"{path}:2"]


def test_all_forms_are_tried_here_and_named_in_the_help():
    assert {form.name for form in FORMS} == ALL.keys()
    help = Settings.__dataclass_fields__["format"].metadata["help"]
    assert all(name in help for name in ALL)


@pytest.mark.parametrize("first", ALL)
@pytest.mark.parametrize("second", ALL)
def test_a_row_of_another_form_is_refused_with_both_named(tmp_path, first, second):
    path = write(tmp_path / "a.jsonl", ALL[first], ALL[second])
    if first == second:
        assert len(read_conversations(path)) == 2
        return
    with pytest.raises(DataError) as caught:
        read_conversations(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ") and f"{path}:1" in message
    assert f"the form {second}" in message and f"the form {first}" in message


@pytest.mark.parametrize("form", ALL)
def test_a_row_that_lacks_a_field(tmp_path, form):
    lost = list(ALL[form])[-1]
    rest = {name: value for name, value in ALL[form].items() if name != lost}
    for row, missing in (({**rest, "id": 7}, lost), ({**rest, lost: None}, lost), (7, "")):
        path = write(tmp_path / "a.jsonl", ALL[form], row)
        with pytest.raises(DataError, match=rf"a\.jsonl:2: no \"{missing}"):
            read_conversations(path)


def test_texts(tmp_path):
    path = tmp_path / "诗.txt"
    path.write_bytes("春眠不觉晓，\r\n\r\n处处闻啼鸟。".encode())
    samples = read_conversations(path)
    assert samples == [
        [{"role": "text", "content": "春眠不觉晓，"}],
        [{"role": "text", "content": "处处闻啼鸟。"}],
    ]
    assert samples[1].place == f"{path}:3" and samples[1].form == "text"


def test_an_excel_table_in_chinese(tmp_path):
    path = tmp_path / "a.csv"
    path.write_bytes('\ufeffquestion,answer,id\r\n你是谁？,"我叫罗宾。",7\r\n'.encode())
    assert read_conversations(path) == [TALK]


def test_lists_as_json_in_a_table(tmp_path):
    cell = json.dumps(TALK, ensure_ascii=False).replace('"', '""')
    (tmp_path / "a.csv").write_text(f'messages\n"{cell}"\n', encoding="utf-8")
    assert read_conversations(tmp_path / "a.csv") == [TALK]


# --- one form and its fields ----------------------------------------------------------------------


def test_alpaca_with_input_and_history(tmp_path):
    row = {"instruction": "翻译成英文。", "input": "茶", "output": "Tea.", "history": [[Q, A]]}
    path = write(tmp_path / "a.json", {**row, "text": "### Instruction: …"})
    asked = [{"role": "user", "content": "翻译成英文。\n茶"}]
    assert read_conversations(path) == [[*TALK, *asked, {"role": "assistant", "content": "Tea."}]]
    only = write(tmp_path / "b.json", {"instruction": "", "input": Q, "output": A})
    assert read_conversations(only) == [TALK]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instruction": " "}, "instruction and input must be texts, and one of them not empty"),
        ({"input": 3}, "instruction and input must be texts"),
        ({"output": ""}, "turn 2 .*: the assistant says nothing"),
        ({"output": ["a", "b"]}, r'"output" must be a text, got \['),
        ({"history": "x"}, r"history must be a list of \[question, answer\], got 'x'"),
        ({"history": [["a"]]}, r"history must be a list of \[question, answer\]"),
    ],
)
def test_alpaca_refused(tmp_path, change, message):
    path = write(tmp_path / "a.jsonl", {**SAME["alpaca"], **change})
    with pytest.raises(DataError, match=message):
        read_conversations(path)


def test_turns_on_both_sides_of_a_pair_of_which_the_second_are_learnt(tmp_path):
    (sample,) = read_conversations(write(tmp_path / "a.jsonl", TRL))
    assert sample == [SYSTEM, *TALK, *TALK] and sample.unlearnt == [2]
    beside = {"prompt": [*TALK, *TALK], "completion": A, "system": SYSTEM["content"]}
    (sample,) = read_conversations(write(tmp_path / "a.jsonl", beside))
    assert sample == [SYSTEM, *TALK, *TALK, TALK[1]] and sample.unlearnt == [2, 4]


def test_a_question_that_looks_like_a_list_is_a_text(tmp_path):
    row = {"prompt": "[1, 2]", "completion": "[3]"}
    assert read_conversations(write(tmp_path / "a.jsonl", row))[0][0]["content"] == "[1, 2]"


def test_calls_and_tools_in_sharegpt(tmp_path):
    call = {"name": "weather", "arguments": {"城市": "杭州"}}
    said = [
        SAID[0],
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "晴"},
        SAID[1],
    ]
    tools = json.dumps([{"name": "weather"}])
    (sample,) = read_conversations(write(tmp_path / "a", {"conversations": said, "tools": tools}))
    assert sample.tools == [{"name": "weather"}]
    assert [t["role"] for t in sample] == ["user", "assistant", "tool", "assistant"]
    assert sample[1]["tool_calls"] == [call]


# --- what else is in a row ------------------------------------------------------------------------


@pytest.mark.parametrize("form", ALL)
def test_fields_beside_the_forms_own(tmp_path, form):
    empty = {"tools": None, "notes": "", "more": [], "label": {}, "blank": " "}
    path = write(
        tmp_path / "a.jsonl", {**ALL[form], "id": 7, "source": "网", "score": 0.5, **empty}
    )
    assert len(read_conversations(path)) == 1
    for name, value in (("label", False), ("weight", 0), ("notes", "x"), ("image", ["a.png"])):
        path = write(tmp_path / "b.jsonl", ALL[form], {**ALL[form], name: value})
        with pytest.raises(DataError, match=rf"b\.jsonl:2 has the field '{name}', .* not known"):
            read_conversations(path)


def test_a_system_beside_a_text_is_refused(tmp_path):
    with pytest.raises(DataError, match="the field 'system'"):
        read_conversations(write(tmp_path / "a.jsonl", {"text": "x", "system": "y"}))


def test_a_question_repeated_beside_its_conversation(tmp_path):
    row = {"messages": TALK, "prompt": Q, "prompt_id": "x"}
    assert read_conversations(write(tmp_path / "a.jsonl", row)) == [TALK]
    with pytest.raises(DataError, match="the field 'prompt'"):
        read_conversations(write(tmp_path / "a.jsonl", {**row, "prompt": "another"}))


def test_format_chooses_where_a_row_has_the_fields_of_two(tmp_path):
    both = {**SAME["question/answer"], "text": "春眠不觉晓"}
    path = write(tmp_path / "a.jsonl", both)
    with pytest.raises(DataError, match="the field 'text'"):
        read_conversations(path)
    assert read_conversations(path, "question/answer") == [TALK]
    assert read_conversations(path, "text")[0][0]["content"] == "春眠不觉晓"
    path = write(tmp_path / "a.jsonl", {**both, "weight": 0})
    with pytest.raises(DataError, match="the field 'weight'"):
        read_conversations(path, "text")


def test_format_must_fit(tmp_path):
    path = write(tmp_path / "a.jsonl", SAME["alpaca"])
    with pytest.raises(DataError, match=r'a\.jsonl:1: no "prompt".*prompt/response'):
        read_conversations(path, "prompt/response")
    with pytest.raises(DataError, match="turn 1 has from None; use one of"):
        read_conversations(write(tmp_path / "b.jsonl", SAME["messages"] | {"conversations": TALK}),
                           "sharegpt")  # fmt: skip
    with pytest.raises(ValueError, match=r"format must be one of .*alpaca.*; got 'csv'"):
        read_conversations(path, "csv")


PREFERENCES = [
    {"prompt": Q, "chosen": A, "rejected": "不知道"},
    {"chosen": TALK, "rejected": TALK},
    {"conversations": SAID, "chosen": SAID[1], "rejected": SAID[1]},
]


@pytest.mark.parametrize("row", PREFERENCES)
def test_preferences_are_refused_with_a_reason(tmp_path, row):
    with pytest.raises(DataError, match=r"a:1: chosen and rejected answers are preferences.*DPO"):
        read_conversations(write(tmp_path / "a", row))
    with pytest.raises(DataError):
        read_conversations(write(tmp_path / "a", row), "prompt/response")


def test_a_row_of_no_form_names_its_fields(tmp_path):
    with pytest.raises(DataError, match=r"a:1: no \"conversations\" list.* but 'frage', 'antwort'"):
        read_conversations(write(tmp_path / "a", {"frage": Q, "antwort": A}))
    wide = {f"column {i}": "x" * 999 for i in range(500)}
    with pytest.raises(DataError, match="'column 7', …;") as caught:
        read_conversations(write(tmp_path / "a", wide))
    assert len(str(caught.value)) < 1000


LONG = "名" * 10_000


@pytest.mark.parametrize(
    "row",
    [
        {LONG: 1},
        {**SAME["question/answer"], LONG: LONG},
        {"messages": [{**TALK[0], LONG: LONG}, TALK[1]]},
        {"messages": [{"role": LONG, "content": LONG}]},
        {"question": Q, "answer": [LONG]},
        {**SAME["alpaca"], "history": LONG},
    ],
    ids=["of no form", "in a row", "in a turn", "role", "answer", "history"],
)
def test_no_message_is_as_long_as_what_it_is_about(tmp_path, row):
    with pytest.raises(DataError) as caught:
        read_conversations(write(tmp_path / "a", row))
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize("form", ["question/answer", "input/output", "alpaca"])
def test_what_is_no_text_goes_by_its_own_name(tmp_path, form):
    for name in [name for name in SAME[form] if name not in ("instruction", "input")] or ["input"]:
        with pytest.raises(DataError, match=rf'a:1: "{name}" must be a text, got 7; write it in'):
            read_conversations(write(tmp_path / "a", {**SAME[form], name: 7}))


NO_LIST = [{}, {"conversations": "x"}, {"conversations": []}, {"conversations": {}}, 17, None, "x"]


@pytest.mark.parametrize("row", NO_LIST)
def test_no_list_of_turns(tmp_path, row):
    for rows in ((row,), (SAME["conversations"], row)):
        path = write(tmp_path / "a.jsonl", *rows)
        with pytest.raises(DataError, match='no "conversations" list; each line must be one') as e:
            read_conversations(path)
        assert str(e.value).startswith(f"{path}:{len(rows)}: ")


def test_whole_surrogate_pairs_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "😀"}), encoding="ascii")  # as \ud83d\ude00
    assert read_conversations(path)[0][0]["content"] == "😀"


def test_samples_come_one_by_one(tmp_path):
    path = write(tmp_path / "a.jsonl", SAME["messages"], 17)
    samples = read_samples(path)
    assert next(samples) == TALK
    with pytest.raises(DataError):
        next(samples)


def test_an_empty_file(tmp_path):
    for name, text in {"a.jsonl": "\n", "a.csv": "question,answer\n", "a.json": "[]"}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataError, match=rf"{name} holds nothing to learn; write conversations"):
            read_conversations(tmp_path / name)
