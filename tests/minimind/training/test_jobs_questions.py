"""Which held-out questions are asked, and what is expected of the answers."""

from __future__ import annotations

import pytest

from minimind.data.sft import SFTDataset
from minimind.data.tokenizer import load_tokenizer
from minimind.data.turns import text_sample
from minimind.training.jobs import MOST_ANSWERED, heldout_questions

SYSTEM = {"role": "system", "content": "请简短回答。"}
USER = {"role": "user", "content": "二加二？"}
ANSWER = {"role": "assistant", "content": "四。"}
CALLS = {**ANSWER, "tool_calls": [{"name": "add"}]}


@pytest.fixture(scope="module")
def tokenizer():
    made = load_tokenizer()
    calls = "{%- if message.tool_calls %}{{ message.tool_calls | tojson }}{%- endif %}"
    made.chat_template = made.chat_template.replace("{%- endfor %}", calls + "{%- endfor %}")
    return made


def test_openings_with_and_without_a_system_turn(tokenizer):
    talks = [[USER, ANSWER, USER, ANSWER], [SYSTEM, USER, ANSWER]]
    questions, expected = heldout_questions(SFTDataset(talks, tokenizer))
    assert questions == [[USER], [SYSTEM, USER]] and expected == ["四。", "四。"]


@pytest.mark.parametrize(
    "talk",
    [
        [USER, CALLS, {"role": "tool", "content": "4"}, ANSWER],
        [USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        [SYSTEM, USER, {**ANSWER, "weight": 0}, USER, ANSWER],
        [ANSWER, USER, ANSWER],
        [SYSTEM, ANSWER, USER, ANSWER],
        text_sample("春眠不觉晓", "here"),
    ],
)
def test_what_is_no_question_with_an_answer_to_expect(tokenizer, talk):
    dataset = SFTDataset([talk, [USER, ANSWER]], tokenizer)
    assert len(dataset) == 2
    assert heldout_questions(dataset) == ([[USER]], ["四。"])


def test_the_first_hundred_and_none(tokenizer):
    assert heldout_questions(None) == ([], [])
    questions, expected = heldout_questions(SFTDataset([[USER, ANSWER]] * 120, tokenizer))
    assert len(questions) == len(expected) == MOST_ANSWERED
