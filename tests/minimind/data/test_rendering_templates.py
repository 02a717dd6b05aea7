"""The loss mask under the chat templates of other eras, thoughts included."""

from __future__ import annotations

import pytest
from places import ORIGINAL

from minimind.data.sft import SFTDataset
from minimind.data.tokenizer import load_tokenizer

# What 2025-02 and 2025-04 do: a user's turn opens the assistant's, whoever asks for a prompt.
OPENS_EARLY = (
    "{{ '<s>system\\nBe good.</s>\\n' }}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{{- '<s>user\\n' + m.content + '</s>\\n<s>assistant\\n' }}"
    "{%- elif m.role == 'assistant' %}{{- m.content + '</s>\\n' }}{%- endif %}{%- endfor %}"
)
# What 2026-03 does: a thought, empty if need be, before every answer.
THINKS = (
    "{%- for m in messages %}{{- '<s>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}"
    "{%- set parts = m.content.split('</think>') %}"
    "{%- set thought = parts[0].split('<think>')[-1].strip('\\n') if parts[1:] else '' %}"
    "{{- '<think>\\n' + thought + '\\n</think>\\n\\n' + parts[-1].lstrip('\\n') }}"
    "{%- else %}{{- m.content }}{%- endif %}{{- '</s>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}"
    "{{- '<think>\\n' if open_thinking else '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
)


def said(conversation, tokenizer):
    """The supervised stretches, as text; the whole must be what the template gives."""
    ids, _, mask = SFTDataset([conversation], tokenizer, 4096)[0]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert tokenizer.decode(ids) == whole
    runs, before = [], 0
    for token, flag in zip(ids.tolist(), mask.tolist(), strict=True):
        if flag:
            runs = runs if before else [*runs, []]
            runs[-1].append(token)
        before = flag
    return [tokenizer.decode(run) for run in runs]


def turns(*contents):
    roles = ("user", "assistant") * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


def with_template(template):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


PLAIN = turns("Hi", "Hello there", "And 1+1?", "Two.")
MIXED = turns("Hi", "Hello there", "And 1+1?", "<think>\nadd them\n</think>\n\nTwo.", "Ok", "Bye")


@pytest.mark.parametrize("template", [OPENS_EARLY, THINKS])
def test_plain_answers_are_learnt_without_what_the_prompt_gives(template):
    assert said(PLAIN, with_template(template)) == ["Hello there</s>", "Two.</s>"]


def test_a_thought_is_learnt_with_its_answer():
    tokenizer = with_template(THINKS)
    thought = "add them\n</think>\n\nTwo.</s>"
    assert said(MIXED, tokenizer) == ["Hello there</s>", thought, "Bye</s>"]
    # Exactly what is left to say after the prompt that asks for a thought.
    prompt = tokenizer.apply_chat_template(
        MIXED[:3], tokenize=False, add_generation_prompt=True, open_thinking=True
    )
    whole = tokenizer.apply_chat_template(MIXED[:4], tokenize=False)
    assert whole == f"{prompt}{thought}\n"
    assert said([MIXED[3]], tokenizer) == [thought]  # with nothing before it


def test_a_thought_is_plain_text_where_the_template_knows_of_none():
    content = MIXED[3]["content"]
    assert said(MIXED, with_template(OPENS_EARLY))[1] == f"{content}</s>"


def test_thoughts_with_the_tokenizer_of_2026_03():
    if not (ORIGINAL / "tokenizer-2026-03").is_dir():
        pytest.skip("the original's tokenizers are not here")
    tokenizer = load_tokenizer(ORIGINAL / "tokenizer-2026-03")
    end = tokenizer.eos_token
    thought = f"add them\n</think>\n\nTwo.{end}"
    assert said(MIXED, tokenizer) == [f"Hello there{end}", thought, f"Bye{end}"]
