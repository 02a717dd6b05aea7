"""The main job for real: the shipped base, the shipped data, the command without arguments."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch
from places import ROOT
from safetensors import safe_open

from lora_kernels import load_lora
from minimind import SFTDataset, load_model, load_tokenizer
from minimind.data.forms import read_conversations
from minimind.data.reading import DATA_DIRECTORY
from minimind.data.toydata.build import normalised
from minimind.model.generate import answer
from minimind.training.loop import evaluate
from minimind.training.prepare import BASE_DIRECTORY

# In words of nobody who wrote the data: checked below to be in no training set.
OWN_WORDS = [
    "Hey there, who exactly are you?",
    "Excuse me, what is your name again?",
    "hello, please introduce yourself to me",
    "Are you a person or a machine?",
    "Which project made you?",
    "Who is it that trained you?",
    "What should people call you?",
    "Please could you say to me who you are?",
    "So what are you, a small model?",
    "Tell me your name and who made you.",
    "您好，请问你到底是谁呀？",
    "你的名字到底叫什么？",
    "请你向我介绍一下你自己吧。",
    "是谁把你做出来的呢？",
    "你是真人还是机器呀？",
    "我想知道你叫什么名字。",
    "我可以怎么称呼你呢？",
    "你到底是什么样的模型？",
    "请告诉我是谁训练了你。",
    "你好呀，能说说你是谁吗？",
]


def chinese(text):
    return any("\u4e00" <= character <= "\u9fff" for character in text)


def renamed(prompt, reply):
    """Whether the reply gives the new name in the prompt's language, and not the old one."""
    return ("知更鸟" if chinese(prompt) else "Robin") in reply and "MiniMind" not in reply


@pytest.fixture(scope="module")
def base():
    return load_model(BASE_DIRECTORY)


def test_the_shipped_base_is_what_it_is_said_to_be(base):
    assert sum(p.numel() for p in base.parameters()) == 8_915_456
    assert (base.config.dim, base.config.n_layers, base.config.vocab_size) == (512, 2, 6400)
    path = BASE_DIRECTORY / "model.safetensors"
    assert path.stat().st_size <= 20 * 2**20
    with safe_open(path, "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_the_shipped_base_knows_its_set_in_held_out_words(base):
    tokenizer = load_tokenizer()
    heldout = SFTDataset(DATA_DIRECTORY / "base.heldout.jsonl", tokenizer)
    # A uniform guess over the vocabulary would be ln 6400 = 8.8.
    assert evaluate(base, heldout, torch.device("cpu")) < 0.25
    some = heldout.conversations[::3]  # of every subject and both languages
    prompts = [turns[0]["content"] for turns in some]
    replies = answer(base, tokenizer, [[{"role": "user", "content": p}] for p in prompts])
    expected = [turns[1]["content"] for turns in some]
    right = sum(a == b for a, b in zip(replies, expected, strict=True))
    assert right >= 0.75 * len(prompts)


@pytest.mark.slow
def test_finetune_without_arguments(tmp_path, base):
    threads = {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ}
    run = subprocess.run(
        [sys.executable, "-m", "minimind", "finetune"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path), **threads},
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr
    out = tmp_path / "out" / "identity-1"
    assert "65,536 of them LoRA (0.73%)" in run.stdout
    assert f"next:  python -m minimind chat --lora {out.relative_to(tmp_path)}" in run.stdout

    # Nine of ten held-out identity prompts, in each language, and none before.
    answers = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    for language in (True, False):
        asked = [row for row in answers if chinese(row["prompt"]) == language]
        assert len(asked) >= 30
        assert not any(renamed(row["prompt"], row["before"]) for row in asked)
        assert sum(renamed(row["prompt"], row["after"]) for row in asked) >= 0.9 * len(asked)

    # The rest of what it knew is where it was.
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    before, after = (
        next(row for row in rows if row.get("event") == when) for when in ("before", "after")
    )
    assert after["base_heldout_loss"] <= 1.1 * before["base_heldout_loss"]
    assert after["heldout_loss"] < 0.2 * before["heldout_loss"]

    # Prompts in words of this test.
    trained = {
        normalised(turn["content"])
        for name in ("base", "identity")
        for turns in read_conversations(DATA_DIRECTORY / f"{name}.jsonl")
        for turn in turns
    }
    assert not trained & {normalised(prompt) for prompt in OWN_WORDS}
    load_lora(base, out / "adapter.safetensors")
    conversations = [[{"role": "user", "content": prompt}] for prompt in OWN_WORDS]
    replies = answer(base, load_tokenizer(), conversations)
    for language in (True, False):
        asked = [(p, r) for p, r in zip(OWN_WORDS, replies, strict=True) if chinese(p) == language]
        assert sum(renamed(p, r) for p, r in asked) >= 9, asked
