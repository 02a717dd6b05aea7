"""What a chat template writes of a sample, what is learnt of it, and what it must not leave out."""

from __future__ import annotations

import itertools
import json
import logging

import pytest
from places import ORIGINAL

from minimind.data.reading import DataError
from minimind.data.rendering import Renderer
from minimind.data.tokenizer import load_tokenizer
from minimind.data.turns import sample_of, text_sample

USER = {"role": "user", "content": "二加二？"}
ANSWER = {"role": "assistant", "content": "四。"}
THOUGHT = {**ANSWER, "reasoning_content": "两个再两个。"}
CALL = {"name": "add", "arguments": {"a": 2, "单位": "个"}}
CALLS = {"role": "assistant", "content": "", "tool_calls": [CALL]}
RESULT = {"role": "tool", "content": "4", "name": "add", "tool_call_id": "c1"}
TOOLS = [{"name": "add", "description": "加"}]
USES = [USER, CALLS, RESULT, THOUGHT]

# One that writes all fields; the parts below are taken out of it.
READS_TOOLS = "{%- if tools %}{{ '<s>tools\\n' + (tools | tojson) + '</s>\\n' }}{%- endif %}"
READS_FIELD = "{%- set thought = m.reasoning_content or '' %}"
READS_INLINE = (
    "{%- set thought, said = '', m.content %}{%- if '</think>' in m.content %}"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- set thought = parts[0].split('<think>')[-1].strip() %}"
    "{%- set said = parts[-1].lstrip() %}{%- endif %}"
)
READS_CALLS = "{%- for c in m.tool_calls or [] %}{{ '[' + (c | tojson) + ']' }}{%- endfor %}"
READS_RESULTS = "{%- elif m.role == 'tool' %}{{ '<s>tool\\n' + m.content + '</s>\\n' }}"
BODY = (
    "{%- for m in messages %}{%- if m.role == 'assistant' %}{%- set said = m.content %}THOUGHTS"
    "{{- '<s>assistant\\n<think>' + thought + '</think>' + said }}CALLS{{- '</s>\\n' }}RESULTS"
    "{%- elif m.role != 'tool' %}{{- '<s>' + m.role + '\\n' + m.content + '</s>\\n' }}{%- endif %}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<s>assistant\\n<think></think>' }}{%- endif %}"
)


def template(tools=READS_TOOLS, thoughts=READS_FIELD, calls=READS_CALLS, results=READS_RESULTS):
    body = BODY.replace("THOUGHTS", thoughts).replace("CALLS", calls).replace("RESULTS", results)
    return tools + body


def with_template(text):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = text
    return tokenizer


def rendered(tokenizer, turns, **more):
    """The whole text and the learnt stretches of it."""
    sample = sample_of(turns, "here", more)
    pieces = Renderer(tokenizer).pieces(sample)
    return "".join(text for text, _ in pieces), [text for text, learnt in pieces if learnt]


def test_tools_thoughts_calls_and_results_are_written_and_learnt():
    text, learnt = rendered(with_template(template()), USES, tools=TOOLS)
    call = json.dumps(CALL, ensure_ascii=False)
    tool = json.dumps(TOOLS, ensure_ascii=False)
    assert text == (
        f"<s>tools\n{tool}</s>\n<s>user\n二加二？</s>\n<s>assistant\n<think></think>[{call}]</s>\n"
        "<s>tool\n4</s>\n<s>assistant\n<think>两个再两个。</think>四。</s>\n"
    )
    assert learnt == [f"[{call}]</s>", "两个再两个。</think>四。</s>"]


def test_an_opening_that_thinks_or_calls():
    tokenizer = with_template(template())
    assert rendered(tokenizer, [THOUGHT, USER])[1] == ["两个再两个。</think>四。</s>"]
    call = json.dumps(CALL, ensure_ascii=False)
    assert rendered(tokenizer, [CALLS, RESULT, ANSWER])[1] == [f"[{call}]</s>", "四。</s>"]


def test_weight_0_is_written_and_not_learnt():
    turns = [USER, {**ANSWER, "weight": 0}, USER, THOUGHT]
    text, learnt = rendered(with_template(template()), turns)
    assert text.count("四。") == 2 and learnt == ["两个再两个。</think>四。</s>"]


LEFT_OUT = {
    "tools": (template(tools=""), [USER, ANSWER], {"tools": TOOLS}, "tools of the conversation"),
    "calls": (template(calls=""), USES, {}, r"tool_calls of turn 2 \(assistant\)"),
    "calls that are not nested": (
        template(calls=READS_CALLS.replace("c | tojson", "c.function | string")),
        USES, {}, r'tool_calls of turn 2 .*; some want each as {"type": "function", "function"',
    ),
    "calls' arguments": (
        template(calls=READS_CALLS.replace("c | tojson", "c.name")),
        USES, {}, "tool_calls of turn 2",
    ),
    "results": (template(results=""), USES, {}, r"content of turn 3 \(tool\)"),
    "thoughts": (
        template(thoughts="{%- set thought = '' %}").replace("think>", "b>"),
        [USER, THOUGHT], {}, r"reasoning_content of turn 2 .* content as <think>…</think>",
    ),
    "thoughts, but the last": (
        template(thoughts="{%- set thought = m.reasoning_content if loop.last else '' %}"),
        [USER, THOUGHT, USER, THOUGHT], {}, r"reasoning_content of turn 2",
    ),
    "thoughts, early ones": (
        template(
            thoughts="{%- set thought = (m.reasoning_content or '') if loop.last else '' %}"
        ),
        [USER, THOUGHT, USER, THOUGHT], {}, r"reasoning_content of turn 2",
    ),
    "thoughts, wherever": (
        template(thoughts=READS_INLINE + "{%- set thought = '' %}"),
        [USER, THOUGHT], {}, r"reasoning_content of turn 2",
    ),
    "thoughts in the content": (
        template(thoughts=READS_INLINE + "{%- set thought = '' %}"),
        [USER, {**ANSWER, "content": "<think>x</think>四。"}], {}, r"thought of turn 2",
    ),
    "a name": (template(), [{**USER, "name": "小明"}, ANSWER], {}, r"name of turn 1 \(user\)"),
    "the system": (
        template().replace("m.role != 'tool'", "m.role == 'user'"), [USER, ANSWER],
        {"system": "短"}, r"content of turn 1 \(system\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_a_template_leaves_out_is_refused(case):
    text, turns, more, message = LEFT_OUT[case]
    with pytest.raises(DataError, match=f"^here: the tokenizer's chat template leaves .*{message}"):
        rendered(with_template(text), turns, **more)


def test_words_that_stand_there_anyway_do_not_hide_what_is_left_out():
    turns = [{"role": "user", "content": "4"}, CALLS, RESULT, {**ANSWER, "content": "4"}]
    with pytest.raises(DataError, match=r"content of turn 3 \(tool\)"):
        rendered(with_template(template(results="")), turns)


def test_a_thought_goes_into_the_content_where_that_is_what_the_template_reads():
    text, learnt = rendered(with_template(template(thoughts=READS_INLINE)), [USER, THOUGHT])
    assert text.endswith("<s>assistant\n<think>两个再两个。</think>四。</s>\n")
    assert learnt == ["两个再两个。</think>四。</s>"]
    plain = "{%- if m.role %}{{ '</think>'[:0] }}{%- endif %}{%- set thought = '' %}"
    text, learnt = rendered(with_template(template(thoughts=plain)), [USER, THOUGHT])
    assert learnt == ["<think>\n两个再两个。\n</think>\n\n四。</s>"]


def test_what_one_sample_taught_is_not_taken_for_another():
    # The template is tried once for each shape; a field more is another shape.
    renderer = Renderer(with_template(template(tools="", results="")))
    for turns, more in (([USER, ANSWER], {}), ([USER, THOUGHT], {}), ([USER, CALLS], {})):
        assert renderer.pieces(sample_of(turns, "here", more))
    for turns, more in (([USER, ANSWER], {"tools": TOOLS}), ([USER, CALLS, RESULT], {})):
        with pytest.raises(DataError, match="^there: .*leaves out"):
            renderer.pieces(sample_of(turns, "there", more))
    renderer = Renderer(with_template(template(thoughts=READS_INLINE + "{%- set thought = '' %}")))
    assert renderer.pieces(sample_of([USER, ANSWER], "here"))
    with pytest.raises(DataError, match="thought of turn 2"):
        renderer.pieces(sample_of([USER, {**ANSWER, "content": "<think>a</think>b"}], "here"))


@pytest.mark.parametrize("odd", ["\ue000", "\ue0000\ue001"])
def test_characters_for_private_use_in_the_words(odd):
    # Text that was converted from GBK has them.
    turns = [{"role": "user", "content": f"a{odd}b"}, THOUGHT, USER, {**THOUGHT, "content": odd}]
    text, learnt = rendered(with_template(template()), turns)
    assert text.count(odd) == 2
    assert learnt == ["两个再两个。</think>四。</s>", f"两个再两个。</think>{odd}</s>"]
    calls = {**THOUGHT, "tool_calls": [{"name": "add", "arguments": {"a": odd}}]}
    (learnt,) = rendered(with_template(template()), [USER, calls])[1]
    assert learnt.startswith("两个再两个。</think>四。[") and odd in learnt


def test_a_template_that_refuses_is_named_with_the_place():
    refuses = (
        "{%- if messages[0].role == 'user' %}{{ raise_exception('system first') }}{%- endif %}"
    )
    with pytest.raises(DataError, match="^here: .* refuses the conversation: system first"):
        rendered(with_template(refuses + template()), [USER, ANSWER])


def test_a_text_stands_between_begin_and_end():
    tokenizer = load_tokenizer()
    sample = text_sample("春眠不觉晓\n", "here")
    assert Renderer(tokenizer).pieces(sample) == [
        ("<s>", True), ("春眠不觉晓\n", True), ("</s>", True)
    ]  # fmt: skip
    tokenizer.bos_token = None
    assert Renderer(tokenizer).pieces(sample) == [("春眠不觉晓\n", True), ("</s>", True)]


def test_samples_come_back_in_order_with_their_tokens():
    tokenizer = load_tokenizer()
    texts = [f"第{i}句" for i in range(1030)]
    encoded = Renderer(tokenizer).encode([text_sample(text, "here") for text in texts])
    assert encoded.counts == [3] * len(texts) and encoded.learnt == [True] * 3 * len(texts)
    ids = iter(encoded.ids)
    for text, begin in zip(texts, range(0, len(encoded.lengths), 3), strict=True):
        count = sum(encoded.lengths[begin : begin + 3])
        assert tokenizer.decode(list(itertools.islice(ids, count))) == f"<s>{text}</s>"
    assert next(ids, None) is None


def test_no_warning_of_a_length_that_is_cut():
    warned = []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage())
    logging.getLogger("transformers").addHandler(handler)
    try:
        encoded = Renderer(load_tokenizer()).encode([text_sample("春 " * 9000, "here")])
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert len(encoded.ids) > 8192 and warned == []


@pytest.mark.parametrize("tools", [None, TOOLS])
def test_the_template_of_2026_03(tools):
    if not (ORIGINAL / "tokenizer-2026-03").is_dir():
        pytest.skip("the original's tokenizers are not here")
    tokenizer = load_tokenizer(ORIGINAL / "tokenizer-2026-03")
    text, learnt = rendered(tokenizer, USES, tools=tools)
    assert text == tokenizer.apply_chat_template(USES, tools=tools, tokenize=False)
    call = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "单位": "个"}}\n</tool_call>'
    assert learnt == [f"{call}<|im_end|>", "两个再两个。\n</think>\n\n四。<|im_end|>"]


def test_the_template_of_2025_02_leaves_out_what_came_later():
    if not (ORIGINAL / "tokenizer-2025-02").is_dir():
        pytest.skip("the original's tokenizers are not here")
    tokenizer = load_tokenizer(ORIGINAL / "tokenizer-2025-02")
    for turns, more in (([USER, ANSWER], {"functions": TOOLS}), ([USER, THOUGHT], {}), (USES, {})):
        with pytest.raises(DataError, match="leaves out the"):
            rendered(tokenizer, turns, **more)
