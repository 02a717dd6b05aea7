"""Small models and adapters for the tests of PEFT's format."""

from __future__ import annotations

import json

import torch

from lora_kernels import apply_lora, lora_parameters
from minimind import LMConfig, MiniMindLM

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
TOKENS = torch.arange(12).reshape(2, 6) * 5


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**SIZES))


def qwen2():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return Qwen2ForCausalLM(Qwen2Config(**SIZES))


def minimind():
    return MiniMindLM(LMConfig(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128))


BASES = {"llama": llama, "qwen2": qwen2, "minimind": minimind}
TARGETS = {
    "llama": ["q_proj", "v_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj"],
    "minimind": ["wq", "wv", "w2"],
}


def base(name, seed=3, dtype=torch.float32):
    torch.manual_seed(seed)
    model = BASES[name]().to(dtype).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # zero by initialisation, and then no test of anything
                parameter.normal_()
    return model


def llm(tied, rows=64, seed=3):
    """A Qwen2 whose head is tied to the embeddings or not, resized where ``rows`` are not 64."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=tied)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    if rows != 64:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def by_peft(model, directory, task=None, **settings):
    """PEFT's adapter on ``model``, not what it began with, saved to ``directory``."""
    from peft import LoraConfig, get_peft_model

    targets = settings.pop("target_modules", ["q_proj"])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type=task, **settings)
    model = get_peft_model(model, config).eval()
    fill(p for p in model.parameters() if p.requires_grad)
    model.save_pretrained(directory)
    return model


def in_peft(model, directory):
    from peft import PeftModel

    return PeftModel.from_pretrained(model, directory).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def fill(parameters):
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.2)


def recompute_activations(model, use_reentrant):
    """Activation checkpointing of a transformers model, under the name its version has for it."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})


DROP = object()

# Each way of making an adapter; patterns name the second target of every model.
OURS = {
    "plain": {"rank": 4, "alpha": 8},
    "alpha none": {"rank": 4},
    "rslora": {"rank": 4, "alpha": 8, "use_rslora": True},
    "patterns": {"rank": 4, "alpha": 3, "rank_pattern": 2, "alpha_pattern": 2.5},
    "alpha none, ranks": {"rank": 4, "rank_pattern": 3},
    "rslora, patterns": {"rank": 4, "alpha": 8, "rank_pattern": 2, "use_rslora": True},
}


def ours(name, way, dtype=torch.float32):
    """A model with LoRA of ours, all of it in ``dtype``."""
    model = base(name, dtype=dtype)
    settings = dict(OURS[way])
    for pattern in ("rank_pattern", "alpha_pattern"):
        if pattern in settings:
            settings[pattern] = {rf"layers\.1\..*{TARGETS[name][1]}": settings[pattern]}
    apply_lora(model, target_modules=TARGETS[name], verbose=False, lora_dtype=dtype, **settings)
    fill(lora_parameters(model))
    return model


def config_of(directory):
    return json.loads((directory / CONFIG).read_text())


def edit(directory, **changes):
    config = {**config_of(directory), **changes}
    config = {key: value for key, value in config.items() if value is not DROP}
    (directory / CONFIG).write_text(json.dumps(config))


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir()}
