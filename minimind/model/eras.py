"""The three eras of MiniMind: what each calls its modules, how they differ, how to tell them.

- 2025-02, ``layers.N.attention.wq``: neighbouring values turn in pairs in the rotary embedding.
- 2025-04, ``model.layers.N.self_attn.q_proj``: the halves of a head turn against each other, which
  makes the dense model a Llama. Its experts are those of 2025-02: two of four, and a shared one.
- 2026-03, the same names, and a norm on each query and key head, which makes it a Qwen3. A token
  visits one expert, none is shared.

Directories that hold a Llama or Qwen3 of these names load as such.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from lora_kernels.adapters import shortened

Shapes = Mapping[str, Sequence[int]]


class CheckpointError(ValueError):
    """A weight or configuration file that cannot be used; the text says why and what to do."""

    def __init__(self, message: str) -> None:
        super().__init__(shortened(message))


@dataclass(frozen=True)
class Names:
    """What an era calls its modules; each field is one word between the dots of a tensor's name.

    ``body`` is the module that holds all but the head; empty where the model itself does.
    ``inner`` are SwiGLU's gate, down and up projections, in the order they are made in.
    """

    body: str
    embedding: str
    head: str
    attention: str
    attention_norm: str
    feed_forward: str
    feed_forward_norm: str
    q: str
    k: str
    v: str
    o: str
    gate: str
    down: str
    up: str

    def path(self, inside: str) -> str:
        """The whole name of what is called ``inside`` in the body."""
        return f"{self.body}.{inside}" if self.body else inside

    def translate(self, name: str, other: Names) -> str:
        """A tensor's or module's ``name`` as the era with the names ``other`` has it."""
        words = {getattr(self, f.name): getattr(other, f.name) for f in fields(self)[1:]}
        parts = name.split(".")
        parts = parts[1:] if self.body and parts[0] == self.body else parts
        renamed = ".".join(words.get(part, part) for part in parts)
        return renamed if parts[0] == self.head else other.path(renamed)


@dataclass(frozen=True)
class Era:
    """How one era's model is built, and the values its configurations usually have."""

    names: Names
    interleaved: bool  # rotary pairs are neighbours (2p, 2p+1), not halves (p, p + P)
    qk_norm: bool
    shared_list: bool  # shared experts are a list, even if there is one
    normalises_one: bool  # a single chosen expert's score is rescaled to 1, too
    most_shared: int | None  # shared experts that the weights have room for; None: any number
    inner_width: Callable[[int, int], int]  # (dim, multiple_of) -> hidden_dim
    usual: Mapping[str, Any]


def _eight_thirds(dim: int, multiple_of: int) -> int:
    return -(-int(4 * dim * 2 / 3) // multiple_of) * multiple_of


def _pi(dim: int, multiple_of: int) -> int:
    return math.ceil(dim * math.pi / multiple_of) * multiple_of


_FIRST_NAMES = Names(
    body="", embedding="tok_embeddings", head="output",
    attention="attention", attention_norm="attention_norm",
    feed_forward="feed_forward", feed_forward_norm="ffn_norm",
    q="wq", k="wk", v="wv", o="wo", gate="w1", down="w2", up="w3",
)  # fmt: skip
HUB_NAMES = Names(
    body="model", embedding="embed_tokens", head="lm_head",
    attention="self_attn", attention_norm="input_layernorm",
    feed_forward="mlp", feed_forward_norm="post_attention_layernorm",
    q="q_proj", k="k_proj", v="v_proj", o="o_proj",
    gate="gate_proj", down="down_proj", up="up_proj",
)  # fmt: skip
_FIRST_USUAL = {
    "dim": 512, "n_kv_heads": 2, "norm_eps": 1e-5, "max_seq_len": 8192,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "aux_loss_alpha": 0.1, "seq_aux": True,
}  # fmt: skip
ERAS: dict[str, Era] = {
    "2025-02": Era(
        _FIRST_NAMES, interleaved=True, qk_norm=False, shared_list=False, normalises_one=False,
        most_shared=1, inner_width=_eight_thirds, usual=_FIRST_USUAL,
    ),
    "2025-04": Era(
        HUB_NAMES, interleaved=False, qk_norm=False, shared_list=True, normalises_one=False,
        most_shared=None, inner_width=_eight_thirds,
        usual={**_FIRST_USUAL, "max_seq_len": 32768},
    ),
    "2026-03": Era(
        HUB_NAMES, interleaved=False, qk_norm=True, shared_list=True, normalises_one=True,
        most_shared=0, inner_width=_pi,
        usual={
            "dim": 768, "n_kv_heads": 4, "norm_eps": 1e-6, "max_seq_len": 32768,
            "num_experts_per_tok": 1, "n_shared_experts": 0, "aux_loss_alpha": 5e-4,
            "seq_aux": False,
        },
    ),
}  # fmt: skip
USUAL_HEADS = 8

_MARKS = {
    "2026-03": re.compile(r"\.self_attn\.[qk]_norm\.weight$"),
    "2025-04": re.compile(r"\.self_attn\.[qkvo]_proj\.weight$"),
    "2025-02": re.compile(r"(^|\.)layers\.\d+\.attention\.w[qkvo]\.weight$"),
}
_ADAPTED = {
    ("2025-02",): re.compile(r"layers\.\d+\.(attention|feed_forward)\."),
    ("2025-04", "2026-03"): re.compile(r"model\.layers\.\d+\.(self_attn|mlp)\."),
}


def recognise_era(names_to_shapes: Shapes) -> str:
    """Tell which MiniMind a state dict belongs to.

    Args:
        names_to_shapes: tensor names, without wrapper prefixes, and their shapes.

    Returns:
        ``"2025-02"``, ``"2025-04"`` or ``"2026-03"``, by the table above.

    Raises:
        CheckpointError: none of them, or a mixture.
    """
    matrices = [name for name, shape in names_to_shapes.items() if len(shape) == 2]
    vectors = [name for name, shape in names_to_shapes.items() if len(shape) == 1]
    found = {
        era
        for era, mark in _MARKS.items()
        if any(mark.search(name) for name in (vectors if era == "2026-03" else matrices))
    }
    if "2026-03" in found:
        found.discard("2025-04")  # the later era kept the projections' names
    if len(found) == 1:
        return found.pop()
    if any(".lora." in name or "lora_A" in name for name in names_to_shapes):
        raise CheckpointError(
            "these tensors are a LoRA adapter, not a model; load the base model's weights first, "
            "then put the adapter on it with lora_kernels.load_lora"
        )
    raise CheckpointError(
        f"expected the weights of one MiniMind, got names that fit "
        f"{'several: ' + ', '.join(sorted(found)) if found else 'none'} "
        f"({some(sorted(names_to_shapes)) or 'no tensors at all'}); check that this is the file "
        "you meant"
    )


def adapter_eras(modules: Iterable[str]) -> tuple[str, ...]:
    """The eras whose models have modules of such names as an adapter's; none if no era does.

    2025-04 and 2026-03 share their names, so an adapter's names never tell these two apart.
    """
    modules = list(modules)
    for eras, mark in _ADAPTED.items():
        if modules and all(mark.match(name) for name in modules):
            return eras
    return ()


def infer_arguments(era: str, shapes: Shapes) -> dict[str, Any]:
    """LMConfig's arguments as far as shapes tell them.

    With a norm on each head its width tells the heads. Without, every published model has 8 query
    and 2 key heads: that is assumed where the shapes allow it. The rest that leaves no trace takes
    the era's usual values: see `untraceable`.

    Raises:
        CheckpointError: the file is incomplete, or of an unusual number of heads.
    """
    names = ERAS[era].names
    layer = names.path("layers.0.")
    at, ff = f"{layer}{names.attention}.", f"{layer}{names.feed_forward}."
    router = shapes.get(f"{ff}gate.weight")
    inner = f"{ff}{names.gate}.weight" if router is None else f"{ff}experts.0.{names.gate}.weight"
    embedding = names.path(f"{names.embedding}.weight")
    table = shapes.get(embedding) or shapes.get(f"{names.head}.weight")
    queries, keys = (shapes.get(f"{at}{word}.weight") for word in (names.q, names.k))
    if (
        table is None
        or queries is None
        or keys is None
        or inner not in shapes
        or any(len(shape) != 2 for shape in (table, queries, keys, shapes[inner]))
    ):
        raise CheckpointError(
            f"the sizes cannot be inferred, expected {embedding}, {at}{names.q}.weight, "
            f"{at}{names.k}.weight and {inner}, got {some(sorted(shapes))}; the file is incomplete"
        )
    prefix = re.escape(names.path("layers."))
    layers = [int(found[1]) for name in shapes if (found := re.match(rf"{prefix}(\d+)\.", name))]
    if len(set(layers)) <= max(layers):
        raise CheckpointError(
            f"the sizes cannot be inferred, expected the layers 0 to {max(layers)}, got "
            f"{len(set(layers))} of them; the file is incomplete"
        )
    found_sizes: dict[str, Any] = {
        "era": era,
        "vocab_size": table[0],
        "dim": table[1],
        "n_layers": max(layers) + 1,
        "hidden_dim": shapes[inner][0],
        **_infer_heads(era, table[1], queries, keys, shapes.get(f"{at}q_norm.weight")),
    }
    if router is not None:
        marks = {name.split(".")[-3] for name in shapes if ".shared_experts." in name}
        found_sizes |= {
            "use_moe": True,
            "n_routed_experts": router[0],
            "n_shared_experts": len(marks),
            "num_experts_per_tok": min(ERAS[era].usual["num_experts_per_tok"], router[0]),
        }
    return found_sizes


def _infer_heads(
    era: str, dim: int, queries: Sequence[int], keys: Sequence[int], norm: Sequence[int] | None
) -> dict[str, int]:
    if norm is not None:
        width = norm[0]
        if queries[0] % width or keys[0] % width:
            raise CheckpointError(
                f"the number of heads cannot be inferred, expected heads as wide as their norm, "
                f"{width}, got queries {list(queries)} and keys {list(keys)}; the file is damaged"
            )
        return {"head_dim": width, "n_heads": queries[0] // width, "n_kv_heads": keys[0] // width}
    usual = ERAS[era].usual["n_kv_heads"]
    if dim % (2 * USUAL_HEADS) or keys[0] * USUAL_HEADS != dim * usual:
        names = ERAS[era].names
        raise CheckpointError(
            f"the number of heads cannot be inferred, expected the usual {USUAL_HEADS} query and "
            f"{usual} key heads, got {names.k} of shape {list(keys)} at dim {dim}; pass config "
            "with n_heads and n_kv_heads"
        )
    return {"n_heads": USUAL_HEADS, "n_kv_heads": usual}


# What transformers' configurations call LMConfig's arguments, where the name is another.
_HUB_ARGUMENTS = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_attention_heads": "n_heads",
    "num_key_value_heads": "n_kv_heads",
    "intermediate_size": "hidden_dim",
    "max_position_embeddings": "max_seq_len",
    "rms_norm_eps": "norm_eps",
    "num_experts": "n_routed_experts",
    "num_local_experts": "n_routed_experts",
    "router_aux_loss_coef": "aux_loss_alpha",
}
_SAME_ARGUMENTS = (
    "vocab_size", "head_dim", "rope_theta", "dropout", "use_moe", "num_experts_per_tok",
    "n_routed_experts", "n_shared_experts", "scoring_func", "aux_loss_alpha", "seq_aux",
    "norm_topk_prob", "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
)  # fmt: skip
_MODEL_TYPES = {"llama": "2025-04", "qwen3": "2026-03", "qwen3_moe": "2026-03"}
# Settings that change what a model computes, and the values of them that MiniMind has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish", None),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "inference_rope_scaling": (False, None),
    "rope_scaling": (None,),
    "mlp_only_layers": ([], None),
    "decoder_sparse_step": (1, None),
    "partial_rotary_factor": (1, None),
}


def file_arguments(content: Mapping[str, Any], era: str) -> dict[str, Any]:
    """LMConfig's arguments from a configuration file that lies with weights of ``era``.

    ``content`` is in LMConfig's own words, in those of the original MiniMindConfig, or in those of
    transformers' Llama and Qwen3.

    Raises:
        CheckpointError: it is for another era or another kind of model, or asks for what MiniMind
            does not do.
    """
    content = dict(content)
    kind = content.pop("model_type", None)
    said = content.pop("era", None) or _MODEL_TYPES.get(kind)
    if said is not None and said != era:
        raise CheckpointError(
            f"it describes a model of MiniMind {said}{f' ({kind})' if kind else ''}, but the "
            f"weights are of {era}; take the configuration that belongs to them, or leave it out"
        )
    if kind not in (None, *_MODEL_TYPES) and not str(kind).startswith("minimind"):
        raise CheckpointError(
            f"model_type is {kind!r}, expected minimind, {' or '.join(_MODEL_TYPES)}; other kinds "
            "of models are not MiniMinds"
        )
    if era == "2025-02" or "dim" in content:
        return {**content, "era": era}
    rope = content.pop("rope_parameters", None) or {}
    if isinstance(rope, Mapping):
        content |= {
            key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope
        }
        if rope.get("rope_type", "default") != "default":
            content["rope_scaling"] = rope
    for name, allowed in _FIXED.items():
        if name in content and content[name] not in allowed:
            raise CheckpointError(
                f"{name} is {content[name]!r}, expected {allowed[0]!r}: MiniMind's models are "
                "computed without it; set it so if the weights were trained that way"
            )
    arguments = {name: content[name] for name in _SAME_ARGUMENTS if name in content}
    arguments |= {ours: content[name] for name, ours in _HUB_ARGUMENTS.items() if name in content}
    if kind == "qwen3_moe":
        arguments["use_moe"] = True
    if arguments.get("use_moe") and content.get("moe_intermediate_size") is not None:
        arguments["hidden_dim"] = content["moe_intermediate_size"]
    return {**arguments, "era": era}


def untraceable(era: str, use_moe: bool) -> list[str]:
    """The arguments of LMConfig that leave no trace in the shapes of a model's tensors."""
    heads = [] if ERAS[era].qk_norm else ["n_heads", "n_kv_heads"]
    experts = ["num_experts_per_tok", "norm_topk_prob"] if use_moe else []
    return [*heads, *experts, "rope_theta", "norm_eps", "max_seq_len"]


def some(names: Sequence[str], limit: int = 6) -> str:
    """The first few of ``names``, and how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")
