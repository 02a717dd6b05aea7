"""Which templates only join contents: no mistake in their favour, and the same pieces as others."""

from __future__ import annotations

import itertools
import random

import pytest

from minimind.data.reading import DataError
from minimind.data.rendering import Renderer
from minimind.data.templates import only_concatenates
from minimind.data.tokenizer import CHAT_TEMPLATE, load_tokenizer
from minimind.data.turns import sample_of


def loop(body):
    return "{% for m in messages %}" + body + "{% endfor %}"


NAMED = (
    "{% if messages[0]['role'] == 'system' %}{% set said = messages[0]['content'] %}"
    "{{ '<s>' + said + '</s>' }}{% else %}{{ '<s>none</s>' }}{% endif %}"
    "{% for message in messages %}{% set content = message['content'] %}"
    "{% if message['role'] == 'user' %}{{ '<s>user\n' + content + '</s>\n<s>assistant\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ content + '</s>' + '\n' }}{% endif %}{% endfor %}"
)
LAST = (
    "{% for m in messages %}{{ bos_token ~ m.role ~ '\n' ~ m.content }}"
    "{% if not loop.first or m.role != 'system' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
# Nothing but blanks ends a turn, and what is said may end in some: the mark's end hangs on it.
BLANK_END = "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '\n' }}{% endfor %}"
JOINING = {
    "shipped": CHAT_TEMPLATE,
    "named": NAMED,
    "last": LAST,
    "blank end": BLANK_END,
    "one": "{{ messages[0].content }}",
}
OTHERS = [
    "{% if messages[0].content %}a{% endif %}",
    "{{ messages[0].content | trim }}",
    "{{ messages[0].content.strip() }}",
    "{{ messages[0].content[0] }}",
    "{{ messages[0].content * 2 }}",
    "{{ messages[0].content == 'a' }}",
    "{{ (messages[0].content + 'a') == 'aa' }}",
    "{{ 'a' in messages[0].content }}",
    "{{ messages[0].content if messages[0].content else 'b' }}",
    "{{ messages[0]['con' ~ 'tent'] == 'a' }}",
    "{{ messages }}",
    "{{ messages[0] }}",
    "{{ messages[1:] }}",
    "{{ messages.content }}",
    "{% set x = messages %}{{ x[0].content == 'a' }}",
    "{% set x = messages[0] %}{{ x.content == 'a' }}",
    "{% set x = 'b' + messages[0].content %}{% set y = x %}{% if y == 'ba' %}a{% endif %}",
    "{% set x %}{{ messages[0].content }}{% endset %}{% if x == 'a' %}a{% endif %}",
    "{% set ns = namespace(x='') %}{% set ns.x = messages[0].content %}{{ ns.x == 'a' }}",
    "{% set messages = messages[0] %}{{ messages.content }}",
    "{% macro f(c) %}{{ c | length }}{% endmacro %}{{ f(messages[0].content) }}",
    "{% for c in messages[0].content %}{{ c }}{% endfor %}",
    "{% for a, b in messages %}{{ a }}{% endfor %}",
    "{% for m in messages if m.content == 'a' %}{{ m.role }}{% endfor %}",
    "{% filter upper %}{{ messages[0].content }}{% endfilter %}",
    loop("{{ m }}"),
    loop("{{ m[messages[0].role] }}"),
    loop("{{ loop.previtem }}"),
    loop("{% set c = m.content %}{{ c.strip() }}"),
    loop("{% set m = m.content %}{{ m }}"),
    loop("{% if loop.changed(m.content) %}{{ m.role }}{% endif %}"),
    "{% include 'x' %}",
    "{% if %}",
]


@pytest.mark.parametrize("template", JOINING.values(), ids=JOINING)
def test_these_only_join(template):
    assert only_concatenates(template)


@pytest.mark.parametrize("template", OTHERS)
def test_these_may_do_more(template):
    assert not only_concatenates(template)


WORDS = ("a", "</s>", "<s>assistant\n", "\n", " ", "世", "\ue000", "\ue0001\ue001", "<think>", "{{")


def conversations(count, seed=0):
    rng = random.Random(seed)

    def words():
        return "".join(rng.choices(WORDS, k=rng.choice((1, 2, 5)))) + rng.choice(("x", "x ", "x\n"))

    for _ in range(count):
        roles = rng.choice(("ua", "sua", "uaua", "auau", "uaa", "suuaua", "u", "uatau"))
        names = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
        turns = [{"role": names[role], "content": words()} for role in roles]
        for turn in turns:
            if turn["role"] == "assistant" and rng.random() < 0.2:
                turn["weight"] = 0
        yield sample_of(turns, "here")


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, NAMED, LAST, BLANK_END])
def test_a_form_filled_in_is_what_the_template_writes(template):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = template
    quick, plain = Renderer(tokenizer), Renderer(tokenizer)
    plain._joins = False
    assert quick._joins
    seen = 0
    for sample in conversations(150):
        try:
            expected = plain.pieces(sample)
        except DataError as error:
            with pytest.raises(DataError) as caught:
                quick.pieces(sample)
            assert str(caught.value) == str(error)
            continue
        assert quick.pieces(sample) == expected
        seen += 1
    assert seen > 50


def test_a_form_is_rendered_once(monkeypatch):
    renderer = Renderer(load_tokenizer())
    rendered = itertools.count()
    real = renderer._render
    monkeypatch.setattr(renderer, "_render", lambda *a, **m: next(rendered) and 0 or real(*a, **m))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    renderer.pieces(sample_of(turns, "here"))
    first = next(rendered)
    for word in "cdef":
        turns = [{"role": "user", "content": word}, {"role": "assistant", "content": word}]
        pieces = renderer.pieces(sample_of(turns, "here"))
        assert pieces[1] == (f"{word}</s>", True)
    assert next(rendered) == first + 1
