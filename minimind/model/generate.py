"""Answers from a model: transformers' generation with a KV cache, in the chat template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import TextStreamer

from ..data.turns import Conversation
from .transformer import MiniMindLM


@torch.no_grad()
def answer(
    model: MiniMindLM,
    tokenizer: Any,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    top_p: float = 0.9,
    stream: bool = False,
    synced: bool = False,
) -> list[str]:
    """What the model says next in each conversation, up to its ``</s>``.

    Args:
        model: in eval or training mode, which is restored.
        tokenizer: the model's, with a chat template.
        conversations: each ends in a user's turn, or a tool's, and may be a Sample with tools; a
            batch is padded on the left.
        max_new_tokens: longest answer, at least 1.
        temperature: 0 takes the likeliest token; above, tokens are drawn from the ``top_p`` share
            of the probability (nucleus sampling, arXiv 1904.09751).
        top_p: in (0, 1], used with a temperature above 0.
        stream: print the answer as it grows; one conversation only.
        synced: the model is sharded, and all processes call this: those whose answers are short
            go on until the others' are complete.

    Raises:
        ValueError: an argument is out of range, or a conversation leaves no room for an answer.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if temperature < 0 or not 0 < top_p <= 1:
        raise ValueError(
            f"temperature must be at least 0 and top_p in (0, 1], got {temperature} and {top_p}"
        )
    if stream and len(conversations) != 1:
        raise ValueError(f"stream takes one conversation, got {len(conversations)}")
    texts = [
        tokenizer.apply_chat_template(
            list(c), tools=getattr(c, "tools", None), tokenize=False, add_generation_prompt=True
        )
        for c in conversations
    ]
    inputs = tokenizer(
        texts,
        add_special_tokens=False,
        padding=True,
        padding_side="left",
        return_token_type_ids=False,
        return_tensors="pt",
    ).to(model.device)
    length = inputs["input_ids"].shape[1]
    room = model.config.max_seq_len - length
    if room < 1:
        raise ValueError(
            f"the conversation has {length} tokens, the model reads {model.config.max_seq_len}; "
            "start a new one"
        )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    training = model.training
    model.eval()
    try:
        outputs = model.generate(  # type: ignore[misc]
            **inputs,
            max_new_tokens=min(max_new_tokens, room),
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            streamer=streamer if stream else None,
            synced_gpus=synced,
            **sampling,
        )
    finally:
        model.train(training)
    return [
        text.strip()
        for text in tokenizer.batch_decode(outputs[:, length:], skip_special_tokens=True)
    ]
