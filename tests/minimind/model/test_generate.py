"""What the model is given to answer."""

from __future__ import annotations

from tiny_minimind import tiny

from minimind.data.tokenizer import load_tokenizer
from minimind.data.turns import Sample
from minimind.model.generate import answer

QUESTION = [{"role": "user", "content": "杭州天气如何？"}]


def test_the_tools_of_a_sample_are_in_its_prompt(monkeypatch):
    tokenizer = load_tokenizer()
    tokenizer.chat_template = "{{ tools | tojson if tools else '' }}" + tokenizer.chat_template
    model = tiny(vocab_size=6400, max_seq_len=128)
    given, generate = [], model.generate

    def spy(**inputs):
        given.append(tokenizer.decode(inputs["input_ids"][0]))
        return generate(**inputs)

    monkeypatch.setattr(model, "generate", spy)
    tools = [{"name": "weather", "description": "天气"}]
    for question in (QUESTION, Sample(QUESTION, "here"), Sample(QUESTION, "here", tools=tools)):
        answer(model, tokenizer, [question], max_new_tokens=1)
    plain = tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True)
    assert given == [plain, plain, '[{"name": "weather", "description": "天气"}]' + plain]
