"""Turns and their fields: what each decides, and every turn that must be refused."""

from __future__ import annotations

import json

import pytest

from minimind.data.reading import DataError
from minimind.data.turns import Sample, sample_of, text_sample

SYSTEM = {"role": "system", "content": "请简短回答。"}
USER = {"role": "user", "content": "2+2?"}
ANSWER = {"role": "assistant", "content": "四。"}
ADD = {"name": "add", "parameters": {"type": "object"}}
NESTED = {"type": "function", "function": ADD}


def turn(role, content):
    return {"role": role, "content": content}


BAD_TURNS = {
    "turn is a string": (["hi"], "turn 1 has role None; use one of system, user, assistant, tool"),
    "unknown role": ([USER, turn("bot", "r")], "turn 2 has role 'bot'; use one"),
    "text is no role of a turn": ([turn("text", "r")], "turn 1 has role 'text'; use one"),
    "unhashable role": ([turn(["user"], "q")], r"turn 1 has role \['user'\]; use one"),
    "endless role": ([turn("x" * 9000, "q")], "turn 1 has role 'x{56}[.]{3}; use one"),
    "no content": ([{"role": "user"}], r'turn 1 \(user\) has no "content" text; give it'),
    "null content": ([USER, turn("assistant", None)], r"turn 2 \(assistant\) has no"),
    "number as content": ([turn("user", 3)], r'turn 1 \(user\) has no "content" text'),
    "picture": ([turn("user", [{"type": "image_url"}])], r'turn 1 \(user\) has no "content" text'),
    "empty answer": ([USER, turn("assistant", "")], "turn 2 .*: the assistant says nothing"),
    "blank answer": ([USER, turn("assistant", " \n")], "turn 2 .*: the assistant says nothing"),
    "late system": ([USER, SYSTEM], "turn 2 is a system turn; only the first"),
    "second system": ([SYSTEM, turn("developer", "b")], "turn 2 is a system turn; only the first"),
    "high surrogate": ([turn("user", "a\ud83d")], r"turn 1 \(user\) holds half a surrogate"),
    "low surrogate": ([turn("user", "\ude00")], r"turn 1 \(user\) holds half a surrogate"),
    "half a weight": ([USER, {**ANSWER, "weight": 0.5}], "weight 0.5, expected 0 or 1"),
    "a word for a weight": ([USER, {**ANSWER, "weight": "0"}], "weight '0', expected 0 or 1"),
    "weight and train": (
        [USER, {**ANSWER, "weight": 0, "train": True}],
        "train and weight disagree; keep one",
    ),
    "a user's words to be learnt": ([{**USER, "train": True}, ANSWER], r"\(user\) has train 1"),
    "two thoughts": (
        [USER, {**turn("assistant", "<think>a</think>b"), "reasoning_content": "c"}],
        "a thought in its content and in reasoning_content",
    ),
    "a thought of the user's": ([{**USER, "reasoning_content": "x"}], "'reasoning_content', 'x'"),
    "a thought that is a list": (
        [USER, {**ANSWER, "reasoning_content": ["x"]}],
        'no "thought" text',
    ),
    "a call by the user": ([{**USER, "tool_calls": [ADD]}], "the field 'tool_calls'"),
    "a call without a name": ([USER, {**ANSWER, "tool_calls": [{"a": 1}]}], "objects with a name"),
    "a call that is no JSON": ([USER, {**ANSWER, "tool_calls": "add(2)"}], "objects with a name"),
    "arguments that are no JSON": (
        [USER, {**ANSWER, "tool_calls": [{"name": "add", "arguments": "{2"}]}],
        "calls add with arguments '{2', expected an object",
    ),
    "calls twice": (
        [USER, {**ANSWER, "tool_calls": [ADD], "function_call": ADD}],
        "its calls in two places",
    ),
    "tools without a name": ([{**USER, "tools": [{"type": "x"}]}], "tools must be a list of obj"),
    "surrogate in a tool": ([{**USER, "tools": [{"name": "\ud83d"}]}], "half a surrogate"),
    "other tools later": (
        [{**USER, "tools": [ADD]}, {**ANSWER, "functions": [{"name": "sub"}]}],
        "turn 2 names other tools than here: turn 1",
    ),
    "unknown field": ([USER, {**ANSWER, "mood": "sad"}], r"\(assistant\) .* 'mood', 'sad'"),
    "false is not nothing": ([USER, {**ANSWER, "keep": False}], "the field 'keep', False"),
    "zero is not nothing": ([USER, {**ANSWER, "keep": 0}], "the field 'keep', 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TURNS)
def test_bad_turns_are_named(case):
    turns, message = BAD_TURNS[case]
    before = json.dumps(turns)
    with pytest.raises(DataError, match=message) as caught:
        sample_of(turns, "here")
    assert str(caught.value).startswith("here: turn ") and len(str(caught.value)) < 300
    assert json.dumps(turns) == before


def test_plain_turns_are_kept_as_they_are():
    turns = [SYSTEM, USER, ANSWER]
    sample = sample_of(turns, "here")
    assert sample == turns and all(a is b for a, b in zip(sample, turns, strict=True))
    assert (sample.tools, list(sample.unlearnt), sample.teaches) == (None, [], True)


@pytest.mark.parametrize("nothing", [None, "", "  ", [], {}, float("nan")])
def test_empty_fields_are_as_if_not_there(nothing):
    names = ("reasoning_content", "tool_calls", "tools", "functions", "weight", "name", "mood")
    turns = [USER, {**ANSWER, **dict.fromkeys(names, nothing)}]
    sample = sample_of(turns, "here", {"system": nothing, "tools": nothing})
    assert sample == [USER, ANSWER] and sample.tools is None and sample.teaches


def test_harmless_fields_of_turns():
    turns = [{**USER, "id": 3, "timestamp": "2025"}, ANSWER]
    assert sample_of(turns, "here") == [USER, ANSWER]


@pytest.mark.parametrize("field", ["weight", "train", "loss"])
@pytest.mark.parametrize("value", [0, False, 0.0, 1, True, 1.0])
def test_weights_of_answers(field, value):
    turns = [USER, {**ANSWER, field: value}, USER, ANSWER]
    sample = sample_of(turns, "here")
    assert sample == [USER, ANSWER, USER, ANSWER]  # the template has nothing of it
    assert list(sample.unlearnt) == ([] if value else [1]) and sample.teaches
    assert sample_of(turns[:2], "here").teaches == bool(value)


def test_weight_0_of_other_turns_says_what_is_so():
    turns = [{**SYSTEM, "train": False}, {**USER, "weight": 0}, ANSWER]
    assert list(sample_of(turns, "here").unlearnt) == []


def test_a_system_beside_the_turns_is_the_first_turn():
    sample = sample_of([USER, {**ANSWER, "weight": 0}], "here", {"system": SYSTEM["content"]})
    assert sample == [SYSTEM, USER, ANSWER] and list(sample.unlearnt) == [2]
    assert sample_of([SYSTEM, USER], "here", {"system": SYSTEM["content"]}) == [SYSTEM, USER]
    with pytest.raises(DataError, match='here: "system" beside the turns and the first turn say'):
        sample_of([SYSTEM, USER], "here", {"system": "Sprich."})
    with pytest.raises(DataError, match=r'here: "system" \(system\) has no "content" text'):
        sample_of([USER, ANSWER], "here", {"system": 3})


@pytest.mark.parametrize("tools", [[ADD], [NESTED], ADD, json.dumps([ADD]), [json.dumps(ADD)]])
@pytest.mark.parametrize("name", ["tools", "functions"])
def test_tools_wherever_they_stand(tools, name):
    expected = [NESTED] if tools == [NESTED] else [ADD]
    for sample in (
        sample_of([USER, ANSWER], "here", {name: tools}),
        sample_of([{**SYSTEM, name: tools}, USER, ANSWER], "here"),
        sample_of([{**USER, name: tools}, ANSWER], "here", {"tools": expected}),
    ):
        assert sample.tools == expected
        assert all(t.keys() == {"role", "content"} for t in sample)


CALL = {"name": "add", "arguments": {"a": 2, "说": "二"}}
TEXT_CALL = {"name": "add", "arguments": json.dumps(CALL["arguments"])}
OPENAI = {"id": "c1", "type": "function", "function": TEXT_CALL}


@pytest.mark.parametrize("calls", [[CALL], CALL, json.dumps([CALL]), [TEXT_CALL], [OPENAI]])
def test_calls_however_they_are_written(calls):
    expected = {**OPENAI, "function": CALL} if calls == [OPENAI] else CALL
    before = json.dumps(calls)
    for fields in ({"content": "看。"}, {"content": None}, {"content": ""}, {}):
        sample = sample_of([USER, {"role": "assistant", "tool_calls": calls, **fields}], "here")
        assert sample[1] == {
            "role": "assistant", "content": fields.get("content") or "", "tool_calls": [expected]
        }  # fmt: skip
    assert json.dumps(calls) == before


def test_a_call_without_arguments_has_none():
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [{"name": "now"}]}]
    assert sample_of(turns, "here")[1]["tool_calls"] == [{"name": "now", "arguments": {}}]


def test_other_names_of_roles():
    names = ["developer", "human", "function_call", "observation", "function", "tool", "gpt"]
    texts = ["s", "q", json.dumps(CALL), "3", "4", "5", "done"]
    sample = sample_of([turn(n, t) for n, t in zip(names, texts, strict=True)], "here")
    assert [t["role"] for t in sample] == [
        "system", "user", "assistant", "tool", "tool", "tool", "assistant"
    ]  # fmt: skip
    assert sample[2] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


def test_names_of_results_and_thoughts_stay():
    result = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}
    told = {**ANSWER, "reasoning_content": "二加二。"}
    assert sample_of([USER, result, told], "here") == [USER, result, told]


def test_content_in_parts():
    parts = [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]
    assert sample_of([turn("user", parts), ANSWER], "here") == [USER, ANSWER]


def test_a_text_is_one_turn_of_its_own_kind():
    sample = text_sample("春眠不觉晓", "here")
    assert isinstance(sample, Sample) and sample == [turn("text", "春眠不觉晓")] and sample.teaches
    for nothing in ("", " \n", None, 3):
        with pytest.raises(DataError, match='^here: no words in "text"'):
            text_sample(nothing, "here")
    with pytest.raises(DataError, match="half a surrogate"):
        text_sample("\ud83d", "here")
