"""Tiny mixtures of experts of transformers 5, with LoRA on their experts by this package and by
PEFT."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_peft import SIZES, TOKENS

from lora_kernels import apply_lora, lora_parameters, mark_only_lora_as_trainable
from lora_kernels.experts.module import LoRAParameter

PARAMETERS = ["gate_up_proj", "down_proj"]
ROUTED = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
# name: class names, further settings
FAMILIES = {
    "qwen3_moe": ("Qwen3Moe", {**ROUTED, "head_dim": 8}),
    "qwen2_moe": ("Qwen2Moe", {**ROUTED, "shared_expert_intermediate_size": 24}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    # Bias, transposed, gate and up interleaved.
    "gpt_oss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "num_key_value_heads": 4,
        },
    ),
}


def mixture(name, dtype=torch.float32, **settings):
    """A model of the family with random weights; the same ones each time."""
    transformers = pytest.importorskip("transformers", minversion="5")
    prefix, more = FAMILIES[name]
    torch.manual_seed(11)
    config = getattr(transformers, prefix + "Config")(**{**SIZES, **more, **settings})
    model = getattr(transformers, prefix + "ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or parameter.dim() == 3:  # small by initialisation, or zero
                parameter.normal_(std=0.3)
    return model.to(dtype).eval()


def with_experts(name, dtype=torch.float32, rank=3, parameters=PARAMETERS, train=True, **settings):
    """The model with LoRA on its experts, and random factors; ``settings`` are `apply_lora`'s."""
    model = mixture(name, dtype)
    given = {"alpha": 6, "target_parameters": parameters, "verbose": False, **settings}
    apply_lora(model, rank, **given)
    if train:
        mark_only_lora_as_trainable(model)
    fill(model)
    return model


def fill(model, seed=5):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.2)


def by_peft(name, dtype=torch.float32, rank=3, parameters=PARAMETERS, targets=()):
    """The model with PEFT's adapters of the same targets."""
    peft = pytest.importorskip("peft", minversion="0.18")
    config = peft.LoraConfig(
        r=rank, lora_alpha=6, target_modules=list(targets), target_parameters=list(parameters)
    )
    return peft.get_peft_model(mixture(name, dtype), config, autocast_adapter_dtype=False).eval()


def peft_factors(model):
    """A ``[E, R, K]`` and B ``[E, N, R]`` of each parameter, by its name in the bare model."""
    found = {}
    for name, module in model.base_model.model.named_modules():
        if type(module).__name__ != "ParamWrapper":
            continue
        owner = name.replace(".base_layer", "")
        a, b = (getattr(module, f)["default"].weight for f in ("lora_A", "lora_B"))
        experts = module.num_experts
        found[f"{owner}.{module.parameter_name}"] = (
            a.view(experts, -1, a.shape[1]),
            b.view(b.shape[0], -1, experts).permute(2, 0, 1),
        )
    return found


def our_factors(model):
    """The same of our model; an entry is the two parameters themselves."""
    return {
        name.replace("lora_of_", ""): (module.lora.A.weight, module.lora.B.weight)
        for name, module in model.named_modules()
        if isinstance(module, LoRAParameter)
    }


def both(name, **settings):
    """Our model and PEFT's, with the same factors."""
    ours, theirs = with_experts(name, **settings), by_peft(name, **settings)
    mine = our_factors(ours)
    with torch.no_grad():
        for key, (a, b) in peft_factors(theirs).items():
            a.copy_(mine[key][0])
            b.copy_(mine[key][1])
    return ours, theirs


def results(model):
    """The logits and the gradient of the embedded input; those of the factors are left in place."""
    model.zero_grad()
    embedded = model.get_input_embeddings()(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=embedded).logits
    loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten())
    loss.backward()
    return {"logits": logits.detach(), "dx": embedded.grad}


def our_results(model):
    found = results(model) | {
        f"{key} {letter}": factor.grad
        for key, pair in our_factors(model).items()
        for letter, factor in zip("AB", pair, strict=True)
    }
    return dict(sorted(found.items()))


def peft_results(model):
    """PEFT's gradients laid out as ours: by expert."""
    found = results(model)
    shadow = copy.deepcopy(model)
    for other, own in zip(shadow.parameters(), model.parameters(), strict=True):
        if own.grad is not None:
            other.data = own.grad
    for key, (a, b) in peft_factors(shadow).items():
        found |= {f"{key} A": a.detach(), f"{key} B": b.detach()}
    return dict(sorted(found.items()))
