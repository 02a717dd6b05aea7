"""Which modules of a model are its head: what turns the last hidden states into answers."""

from __future__ import annotations

import re

from torch import nn

# Classes of transformers whose head a base checkpoint does not hold, so that it is drawn afresh.
_CLASSIFIER = re.compile(r"For\w*(Classification|QuestionAnswering|MultipleChoice)")
_NAMES = ("classification_head", "classifier", "output", "qa_outputs", "score")


def is_head_name(name: str) -> bool:
    """Whether a linear of that name, without wrapper prefixes, is a head by custom."""
    return name in _NAMES or name.rpartition(".")[2] == "lm_head"


def classifier(model: nn.Module) -> tuple[str, nn.Module] | None:
    """The model of transformers in ``model`` that has a classifier's head, and its name there."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "base_model_prefix", None), str) and any(
            _CLASSIFIER.search(kind.__name__) for kind in type(module).__mro__
        ):
            return name, module
    return None


def classifier_heads(model: nn.Module) -> list[str]:
    """Names of the modules that such a model has beside its body, in module order.

    They are ``score``, ``classifier``, ``qa_outputs`` … and what feeds them alone, a projector or
    a pooler outside of the body. Those without parameters are left out.
    """
    found = classifier(model)
    if found is None:
        return []
    name, module = found
    body = getattr(module, str(module.base_model_prefix), None)
    children = dict(module.named_children())
    heads = (
        [key for key, child in children.items() if child is not body]
        if isinstance(body, nn.Module)
        else [key for key in children if is_head_name(key)]
    )
    return [
        f"{name}.{key}" if name else key
        for key in heads
        if any(True for _ in children[key].parameters())
    ]
