"""A MiniMind in the layout of a model that transformers knows, number for number.

========================  ==========================================================
Llama                     a dense model of 2025-02 or 2025-04
Qwen3, Qwen3-MoE          2026-03, dense and mixture of experts
ERNIE 4.5 MoE             a mixture of experts of 2025-02 or 2025-04 with a shared one
Mixtral                   the same without a shared one
========================  ==========================================================

Layouts also differ in which values of a head the rotary embedding turns together. The scores of
attention do not change if the rows of q and k trade places within each head alike, so weights move
from neighbours (2p, 2p+1) to halves (p, p+P), or back, by a permutation, and nothing is rounded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lora_kernels import AdapterMismatchError, lora_layers
from lora_kernels.adapters import insert_lora

from .config import LMConfig
from .eras import HUB_NAMES
from .transformer import MiniMindLM


@dataclass(frozen=True)
class Layout:
    """An architecture of transformers, as far as it differs from Llama's."""

    architecture: str
    model_type: str
    interleaved: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict)
    words: Mapping[str, str] = field(default_factory=dict)  # parts of names that are others


def exact_layout(config: LMConfig) -> Layout:
    """The architecture of transformers that computes what a model of ``config`` computes.

    Raises:
        ValueError: there is none; the text says which detail none of them has.
    """
    if not config.use_moe:
        if config.structure.qk_norm:
            return Layout("Qwen3ForCausalLM", "qwen3", settings={"use_sliding_window": False})
        return Layout("LlamaForCausalLM", "llama", settings={"mlp_bias": False})
    if config.structure.qk_norm:
        experts = {
            "moe_intermediate_size": config.hidden_dim,
            "num_experts": config.n_routed_experts,
            "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "use_sliding_window": False,
        }
        return Layout("Qwen3MoeForCausalLM", "qwen3_moe", settings=experts)
    if not config.norm_topk_prob or config.num_experts_per_tok == 1:
        raise ValueError(
            f"a mixture of experts of {config.era} with num_experts_per_tok="
            f"{config.num_experts_per_tok} and norm_topk_prob={config.norm_topk_prob} has no exact "
            "counterpart in transformers: ERNIE 4.5 and Mixtral, which are like it otherwise, "
            "rescale the chosen experts' scores to sum to 1 always, and this model does not; keep "
            "it as it is (--to pth)"
        )
    if config.n_shared_experts:
        experts = {
            "use_bias": False,
            "moe_intermediate_size": config.hidden_dim,
            "moe_num_experts": config.n_routed_experts,
            "moe_num_shared_experts": config.n_shared_experts,
            "moe_k": config.num_experts_per_tok,
            "moe_layer_start_index": 0,
            "moe_layer_end_index": config.n_layers - 1,
            "moe_layer_interval": 1,
        }
        return Layout("Ernie4_5_MoeForCausalLM", "ernie4_5_moe", interleaved=True, settings=experts)
    experts = {
        "num_local_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "sliding_window": None,
    }
    words = {"mlp": "block_sparse_moe", "gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
    return Layout("MixtralForCausalLM", "mixtral", settings=experts, words=words)


def config_json(config: LMConfig, layout: Layout, dtype: torch.dtype) -> dict[str, Any]:
    """What ``config.json`` says of the exported model, for transformers 4.57 and 5."""
    return {
        "architectures": [layout.architecture],
        "model_type": layout.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "intermediate_size": config.hidden_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
        **layout.settings,
    }


def hub_name(name: str, config: LMConfig, layout: Layout) -> str:
    """What the layout calls the tensor or module that the model of ``config`` calls ``name``."""
    renamed = config.structure.names.translate(name, HUB_NAMES)
    if layout.words:
        renamed = ".".join(layout.words.get(word, word) for word in renamed.split("."))
    return re.sub(r"\.shared_experts\.\d+\.", ".shared_experts.", renamed)


def hub_tensors(model: MiniMindLM, layout: Layout, dtype: torch.dtype) -> dict[str, Tensor]:
    """The model's tensors under the layout's names, its adapter left out, in ``dtype`` on the CPU.

    Raises:
        ValueError: a weight is too large for ``dtype``.
    """
    config = model.config
    named: dict[str, list[Tensor]] = {}
    for name, tensor in model.state_dict().items():
        if ".lora." in name:
            continue
        if config.tie_word_embeddings and name == f"{config.structure.names.head}.weight":
            continue
        tensor = _reordered(tensor, name.removesuffix(".weight"), config, layout)
        named.setdefault(hub_name(name, config, layout), []).append(tensor)
    tensors = {}
    for name, parts in named.items():
        # Several shared experts are one that is as wide as all of them: down takes them side by
        # side, gate and up one below the other.
        whole = torch.cat(parts, dim=1 if ".down_proj." in name else 0)
        tensors[name] = whole.detach().to("cpu", dtype).contiguous().clone()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise ValueError(
                f"{name} is too large for {dtype}; choose float32 or bfloat16 by --dtype"
            )
    if layout.model_type == "ernie4_5_moe":  # its router adds a bias before it chooses
        for index in range(config.n_layers):
            name = f"model.layers.{index}.mlp.moe_statics.e_score_correction_bias"
            tensors[name] = torch.zeros(1, config.n_routed_experts, dtype=dtype)
    return tensors


def copy_adapter(model: MiniMindLM, layout: Layout, target: nn.Module) -> list[str]:
    """Put the adapter of ``model`` on ``target``, transformers' model in ``layout``.

    Names are translated, and the rows of B move as those of the weight that it is added to.

    Raises:
        AdapterMismatchError: it is on modules that ``target`` has none for.
    """
    config, layers = model.config, lora_layers(model)
    linears = {name for name, module in target.named_modules() if type(module) is nn.Linear}
    renamed = {name: hub_name(name, config, layout) for name in layers}
    lost = [name for name, new in renamed.items() if new not in linears]
    merged = [name for name in layers if ".shared_experts." in name and config.n_shared_experts > 1]
    if lost or merged:
        raise AdapterMismatchError(
            f"{layout.architecture} has no linear of its own for {', '.join((lost or merged)[:4])}"
            " (it keeps experts stacked in one tensor), so the adapter cannot stay apart; fold it "
            "in by --merge"
        )
    insert_lora(target, {renamed[name]: layer.lora_config for name, layer in layers.items()})
    with torch.no_grad():
        for name, layer in layers.items():
            other: Any = target.get_submodule(renamed[name])
            other.lora.A.weight.copy_(layer.lora.A.weight)
            b = _reordered(layer.lora.B.weight, name, config, layout)
            other.lora.B.weight.copy_(b)
    return list(renamed.values())


def _reordered(tensor: Tensor, module: str, config: LMConfig, layout: Layout) -> Tensor:
    """Rows of q and k as the layout's rotary embedding wants them; other tensors as they are."""
    structure = config.structure
    projections = (structure.names.q, structure.names.k)
    if structure.interleaved == layout.interleaved or module.rpartition(".")[2] not in projections:
        return tensor
    pairs = config.head_dim // 2
    inner = (2, pairs) if layout.interleaved else (pairs, 2)
    return tensor.unflatten(0, (-1, *inner)).transpose(1, 2).flatten(0, 2)
