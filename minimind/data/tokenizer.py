"""The tokenizer: byte-level BPE of 6,400 entries, and the chat template.

    python -m minimind.data.tokenizer [OUT]

trains it anew, by default over the one in ``minimind/assets/tokenizer``. Merges are counted on the
project's own text and, for a wider English, on the language reference that Python installs with
itself (``pydoc_data.topics``; counted only). That reference grows with Python's versions, and the
merges with it: the shipped file was made with Python 3.11.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import reprlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lora_kernels.adapters import pass_on_what_is_no_damage

from ..files import staged
from .toydata import build

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCAB_SIZE = 6400
SPECIAL_TOKENS = ("<unk>", "<s>", "</s>")
TOKENIZER_DIRECTORY = Path(__file__).parents[1] / "assets" / "tokenizer"

# Every turn is `<s>role`, the content, `</s>`; without a system turn a default one comes first.
CHAT_TEMPLATE = (
    "{%- if messages[0]['role'] != 'system' %}"
    "{{- '<s>system\\nYou are a helpful assistant.</s>\\n' }}"
    "{%- endif %}"
    "{%- for message in messages %}"
    "{{- '<s>' + message['role'] + '\\n' + message['content'] + '</s>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<s>assistant\\n' }}{%- endif %}"
)


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerBase:
    """The shipped tokenizer, or the one in the directory ``path``.

    Raises:
        FileNotFoundError: the directory or its tokenizer.json is not there.
        ValueError: the files are there but cannot be read as a tokenizer with a chat template.
    """
    directory = TOKENIZER_DIRECTORY if path is None else Path(path)
    if not (directory / "tokenizer.json").is_file():
        raise FileNotFoundError(
            f"no tokenizer at {directory}: expected a directory with tokenizer.json and "
            "tokenizer_config.json; check the path"
        )
    _refuse_what_ends_the_process(directory / "tokenizer.json")
    try:
        # Not AutoTokenizer: beside a model it reads the model's config, of a kind it does not know.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory), local_files_only=True)
    except BaseException as error:  # panics of tokenizers are BaseExceptions
        pass_on_what_is_no_damage(error, directory / "tokenizer.json")
        raise ValueError(
            f"the tokenizer files in {directory} cannot be read: {str(error)[:500]}; copy them anew"
        ) from error
    if tokenizer.pad_token_id is None:
        raise ValueError(
            f"the tokenizer in {directory} has no padding token; add pad_token to its "
            "tokenizer_config.json"
        )
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the tokenizer in {directory} has no chat template; add one to tokenizer_config.json"
        )
    return tokenizer


def _refuse_what_ends_the_process(path: Path) -> None:
    """Raise ValueError on what the reader in tokenizers does not survive."""
    try:
        model = json.loads(path.read_text(encoding="utf-8"))["model"]
        prefix = "merges" in model and model.get("continuing_subword_prefix")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {str(error)[:500]}; copy it anew") from None
    if prefix:
        raise ValueError(
            f"{path} has merges and a continuing_subword_prefix, {reprlib.repr(prefix)}, of which "
            "its reader would end the process; set it to null, as in byte-level BPE"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Byte-level BPE with digits kept single, special tokens first, and the chat template.

    Args:
        texts: what the merges are counted on.
        vocab_size: entries in all, at least 259 (256 bytes and three special tokens).

    Raises:
        ValueError: the texts hold too few pairs to fill the vocabulary.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        max_token_length=12,  # in bytes: four Chinese characters; longer ones are phrases
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"texts give only {tokenizer.get_vocab_size()} entries, not {vocab_size}; add text"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=8192,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, directory: str | os.PathLike[str]) -> None:
    """Write the tokenizer to ``directory`` so that transformers 4 and 5 both load it.

    All its files appear or none.
    """
    with staged(Path(directory)) as stage:
        tokenizer.save_pretrained(str(stage))
        path = stage / "tokenizer_config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        # Version 5 writes a class name that version 4 does not know; both know this one.
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config.pop("backend", None)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        path.write_text(text, encoding="utf-8")


def training_texts() -> Iterator[str]:
    """The project's text, forty times over, then Python's language reference.

    Patterns and the values that fill them are given apart and once each: counted filled in, whole
    patterns would become single tokens, and names would grow together with their neighbours.
    """
    for _ in range(40):
        for path in sorted(build.TEXT.glob("*/*.txt")):
            for line in path.read_text(encoding="utf-8").splitlines():
                if not line.startswith("#"):
                    mark, _, content = line.partition(" ")
                    # In English a value comes after a space, which belongs to its first token.
                    space = " " if mark == "-" and path.parent.name == "en" else ""
                    for piece in re.split(r"\s*\|\s*|\s*\{\w+\}", content):
                        yield space + piece
        for persona in (*build.BASE.values(), *build.ROBIN.values()):
            # With and without the space that comes before it in a sentence.
            yield from (text for name in persona for text in (name, f" {name}"))
        yield from (f"{role}\n" for role in ("system", "user", "assistant"))
    yield from importlib.import_module("pydoc_data.topics").topics.values()


if __name__ == "__main__":
    directory = Path(sys.argv[1]) if len(sys.argv) > 1 else TOKENIZER_DIRECTORY
    save_tokenizer(train_tokenizer(training_texts()), directory)
    print(f"tokenizer of {VOCAB_SIZE} entries written to {directory}")
