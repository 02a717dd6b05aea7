"""`minimind chat`: talk to a model with its adapter, without, or both side by side."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from typing import Any

import torch

from lora_kernels import disable_lora

from ..data.turns import Conversation
from ..model.checkpoint import load_adapter
from ..model.generate import answer
from ..model.transformer import MiniMindLM
from ..settings import Settings
from ..training.prepare import choose_device, load_base, user_errors

_HELP = "type a message; /lora switches the adapter on and off, /new starts over, /quit leaves"


def chat(options: argparse.Namespace) -> None:
    """Answer ``options.prompt`` once, or read messages until the input ends.

    Raises:
        UsageError: a file or an option is wrong.
    """
    with user_errors():
        model, tokenizer = load_base(Settings(base=options.base, tokenizer=options.tokenizer))
        if options.compare and options.lora is None:
            raise ValueError("--compare needs an adapter to compare with; name one by --lora")
        if options.lora is not None:
            load_adapter(model, options.lora)
        sampling = {
            "max_new_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        model.to(choose_device(options.device)).eval()  # type: ignore[arg-type]
        torch.manual_seed(options.seed)
        # An answer to nothing checks the sampling options before the first message is typed.
        answer(model, tokenizer, [_say("")], **{**sampling, "max_new_tokens": 1})
        if options.max_new_tokens < 1:
            raise ValueError(f"max-new-tokens must be at least 1, got {options.max_new_tokens}")
        prompt = None if options.prompt is None else _whole(options.prompt)
        if options.prompt is not None and prompt is None:
            raise ValueError(f"--prompt: {_BROKEN}")
    speaker = _Speaker(model, tokenizer, options.lora is not None, options.compare, sampling)
    if prompt is not None:
        with user_errors():
            speaker.reply(_say(prompt))
        return
    print(_HELP if options.lora else _HELP.replace("/lora switches the adapter on and off, ", ""))
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # `_whole` tells what is broken
    history: Conversation = []
    while True:
        try:
            typed = input("\nyou> ")
        except EOFError:
            print()
            return
        if (message := _whole(typed)) is None:
            print(f"({_BROKEN})")
            continue
        message = message.strip()
        if message in ("/quit", "/exit"):
            return
        if message == "/new":
            history = []
            print("(a new conversation)")
        elif message == "/lora" and options.lora:
            speaker.adapted = not speaker.adapted
            print(f"(the adapter is {'on' if speaker.adapted else 'off'})")
        elif message.startswith("/"):
            print(_HELP)
        elif message:
            history += _say(message)
            try:
                history.append({"role": "assistant", "content": speaker.reply(history)})
            except (ValueError, TypeError) as error:
                history = []
                print(f"({error}; starting over)")


class _Speaker:
    """Prints answers as they grow, labelled by who speaks."""

    def __init__(
        self,
        model: MiniMindLM,
        tokenizer: Any,
        has_lora: bool,
        compare: bool,
        sampling: dict[str, Any],
    ) -> None:
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self.has_lora, self.compare, self.adapted = has_lora, compare, has_lora

    def reply(self, conversation: Conversation) -> str:
        """Answer, and return what goes on in the conversation: with an adapter, its answer."""
        if self.compare:
            self._speak("base> ", conversation, adapted=False)
            return self._speak("lora> ", conversation, adapted=True)
        return self._speak("lora> " if self.adapted else "base> ", conversation, self.adapted)

    def _speak(self, label: str, conversation: Conversation, adapted: bool) -> str:
        print(label, end="", flush=True)
        bare = self.has_lora and not adapted
        with disable_lora(self.model) if bare else contextlib.nullcontext():
            return answer(self.model, self.tokenizer, [conversation], stream=True, **self.sampling)[
                0
            ]


_BROKEN = "that line is not whole UTF-8 text, half a character perhaps; type it again"


def _whole(text: str) -> str | None:
    """What was typed; None where bytes of it are no characters.

    In a terminal whose locale is not UTF-8, text in UTF-8 arrives as single bytes.
    """
    if not any("\ud800" <= character <= "\udfff" for character in text):
        return text
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeError:
        return None


def _say(message: str) -> Conversation:
    return [{"role": "user", "content": message}]
