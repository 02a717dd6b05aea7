"""A small classifier of transformers whose base checkpoint has no head."""

from __future__ import annotations

import torch
from tiny_peft import SIZES, fill

from lora_kernels import apply_lora, lora_parameters

ROWS = torch.arange(1, 19).reshape(3, 6)


def classifier(seed, kind="SequenceClassification", family="Qwen2"):
    """The same body for every seed, and a head that is drawn by it."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES, num_labels=3, pad_token_id=0)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}For{kind}")(config).eval()
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith(f"{model.base_model_prefix}."):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def trained_classifier(seed=1, **settings):
    """One whose factors and head are not those that it began with."""
    model = classifier(seed)
    apply_lora(model, 4, alpha=8, **{"target_modules": "all-linear", "verbose": False, **settings})
    fill(lora_parameters(model))
    return model


def answers(model):
    with torch.no_grad():
        return model(input_ids=ROWS).logits
