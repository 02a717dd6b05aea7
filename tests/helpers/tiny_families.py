"""Tiny transformers models of several families, with LoRA by this package and by PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_peft import SIZES, TOKENS, fill

from lora_kernels import LoRALinear, apply_lora, lora_parameters, mark_only_lora_as_trainable

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
# The experts of a mixture are one parameter [experts, out, in], no linears; the shared one is.
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 24,
}
# name: class names, further settings, target modules, how many layers that adapts
FAMILIES = {
    "llama": ("Llama", {}, ATTENTION + MLP, 14),
    "qwen2": ("Qwen2", {}, ATTENTION, 8),
    "mistral": ("Mistral", {"sliding_window": 4}, ["q_proj", "v_proj", "up_proj"], 6),
    "gemma": ("Gemma", {"head_dim": 8}, ATTENTION + MLP, 14),
    "qwen2_moe": (
        "Qwen2Moe",
        MOE,
        ATTENTION + ["shared_expert." + name for name in MLP],
        14,
    ),
}


def family(name, dtype=torch.float32):
    """A model of the family with random weights; the same ones each time."""
    transformers = pytest.importorskip("transformers")
    prefix, more, _, _ = FAMILIES[name]
    torch.manual_seed(11)
    config = getattr(transformers, prefix + "Config")(**SIZES, **more)
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):  # zero by initialisation, and then no test of anything
                parameter.normal_()
    return model.to(dtype)


def both(name, dtype=torch.float32, dropout=0.0, wide=False):
    """The model with LoRA of ours, and with PEFT's, with the same A and B.

    These are in the model's dtype, or, if ``wide``, in each library's own choice.
    """
    peft = pytest.importorskip("peft")
    targets = FAMILIES[name][2]
    ours = family(name, dtype)
    settings = {"alpha": 6, "dropout": dropout, "target_modules": targets, "verbose": False}
    apply_lora(ours, 4, lora_dtype=None if wide else dtype, **settings)
    mark_only_lora_as_trainable(ours)
    fill(lora_parameters(ours))
    config = peft.LoraConfig(r=4, lora_alpha=6, lora_dropout=dropout, target_modules=targets)
    theirs = peft.get_peft_model(family(name, dtype), config, autocast_adapter_dtype=wide)
    with torch.no_grad():
        for key, (a, b) in factors(theirs).items():
            a.copy_(factors(ours)[key][0])
            b.copy_(factors(ours)[key][1])
    return ours, theirs


def factors(model):
    """The parameters A and B of each adapted module, by its name in the bare model."""
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        return {
            name: (module.lora.A.weight, module.lora.B.weight)
            for name, module in model.named_modules()
            if isinstance(module, LoRALinear)
        }
    return {
        name: (module.lora_A["default"].weight, module.lora_B["default"].weight)
        for name, module in model.base_model.model.named_modules()
        if hasattr(module, "lora_A")
    }


def results(model):
    """The logits, the loss, and the gradients of the embedded input and of every A and B."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    found = {"logits": logits, "loss": loss, "dx": embedded.grad}
    for name, (a, b) in factors(model).items():
        found |= {f"{name} A": a.grad, f"{name} B": b.grad}
    return {key: value.detach() for key, value in found.items()}


def truth_of(model):
    """The same of a bfloat16 model's weights in float32, where norms and angles are computed."""
    return {key: value.double() for key, value in results(copy.deepcopy(model).float()).items()}


def error(found, truth):
    """The relative error of all results together: single elements of a whole model vary widely."""
    parts = [(found[key].double() - t).norm() / t.norm() for key, t in truth.items()]
    return torch.stack(parts).square().mean().sqrt().item()


def assert_rounding_apart(ours, theirs):
    """Two dictionaries of float32 results agree to 80 roundings of each one's largest value."""
    assert list(ours) == list(theirs)
    for key, value in ours.items():
        largest = theirs[key].abs().max().item()
        assert largest > 0, key
        torch.testing.assert_close(
            value, theirs[key], rtol=0, atol=1e-5 * largest, msg=lambda m, k=key: f"{k}: {m}"
        )
