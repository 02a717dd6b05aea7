"""Single tokens that an adapter trains: rows of an embedding, and of the head that is tied to it.

The rows lie in a child of the embedding, ``lora_tokens``, as parameters trained whole (`wholes`):
the base has none, each adapter its own. A hook puts them into what the module computes, so that
its weight stays as it is, and whole-size gradients are never made.

Source: PEFT's ``trainable_token_indices``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import LoRAConfig
from ..linear.factors import DEFAULT
from .sharding import gathering, is_emptied, is_sharded, whole
from .targets import ends_in_name, strip_wrappers
from .wholes import TOKEN_ROWS, insert_wholes, is_whole, slots, whole_tensors
from .wording import listed

_ROWS = "_lora_tokens"


class TokenRows(nn.Module):
    """Rows ``weight [T, D]`` in the place of those that ``index [T]`` names, in rising order."""

    index: Tensor

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        dtype = torch.promote_types(like.dtype, torch.float32)
        empty = torch.empty(0, width, device=like.device, dtype=dtype)
        self.weight = nn.Parameter(empty, requires_grad=False)
        self.register_buffer("index", torch.empty(0, device=like.device, dtype=torch.int64))


def _put_in(module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Tensor) -> Tensor:
    """The hook: what the module would have computed with these rows in its weight."""
    rows: TokenRows = module.__dict__[_ROWS]
    index, weight = rows.index, rows.weight
    if not len(index):
        return output
    x = args[0] if args else kwargs["input"]
    if isinstance(module, nn.Embedding):
        place = torch.searchsorted(index, x.contiguous()).clamp(max=len(index) - 1)
        own = F.embedding(place, weight.to(output.dtype))
        scale = getattr(module, "embed_scale", 1.0)  # of Gemma, whose embedding multiplies
        own = own * (scale.to(own.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where((index[place] == x).unsqueeze(-1), own, output)
    bias = getattr(module, "bias", None)
    own = F.linear(x, weight.to(x.dtype), None if bias is None else bias[index])
    return output.index_copy(-1, index, own.to(output.dtype))


def find_token_modules(model: nn.Module, config: LoRAConfig) -> dict[str, list[int]]:
    """Clean names of the modules of which ``config`` trains rows, and which, in rising order.

    Raises:
        ValueError: a name means no module, or several.
    """
    asked = config.trainable_token_indices
    if asked is None:
        return {}
    modules = {strip_wrappers(name): module for name, module in model.named_modules()}
    if not isinstance(asked, Mapping):
        getter = next(
            (m for m in model.modules() if callable(getattr(m, "get_input_embeddings", None))), None
        )
        embedding = getter.get_input_embeddings() if getter is not None else None  # type: ignore
        name = next((n for n, m in modules.items() if m is embedding), "embed_tokens")
        asked = {name: asked}
    found = {}
    for ending, indices in asked.items():
        matches = [name for name in modules if ends_in_name(name, ending)]
        matches = [ending] if ending in modules else matches
        if len(matches) != 1:
            raise ValueError(
                f"trainable_token_indices has {ending!r}, which means "
                f"{listed([*map(repr, matches)]) or 'no module'}; "
                'name one embedding, as in {"embed_tokens": [1, 2]}'
            )
        if matches[0] in found:
            raise ValueError(
                f"trainable_token_indices names {matches[0]!r} twice; put its tokens into one list"
            )
        found[matches[0]] = sorted(indices)
    return found


def token_refusals(model: nn.Module, tokens: Mapping[str, Any]) -> list[str]:
    """Why rows of these modules cannot be trained, a sentence each.

    ``tokens`` maps clean names to indices, whole numbers of at least 0.
    """
    modules = {strip_wrappers(name): module for name, module in model.named_modules()}
    problems = []
    for name, indices in tokens.items():
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        numbers = [int(i) for i in indices]
        if module is None or not isinstance(weight, nn.Parameter) or not _is_simple(module):
            kind = "no module" if module is None else f"a {type(module).__name__}"
            problems.append(f"tokens of {name!r}: it is {kind}, not an nn.Embedding or a head")
        elif is_emptied(weight):
            way = gathering("model.parameters()")
            problems.append(f"tokens of {name!r}: its weight is emptied by ZeRO-3; {way}")
        elif weight.is_meta or is_sharded(weight) or not weight.numel():
            problems.append(f"tokens of {name!r}: its weight is sharded or without memory")
        elif not numbers or len(set(numbers)) < len(numbers):
            problems.append(f"tokens of {name!r}: expected different indices, got {numbers[:8]}")
        elif min(numbers) < 0 or max(numbers) >= len(weight):
            problems.append(
                f"tokens of {name!r}: indices go to {max(numbers)}, its weight has {len(weight)} "
                "rows; call resize_token_embeddings first"
            )
        else:
            tied = [n for n, m in modules.items() if getattr(m, "weight", None) is weight]
            strange = [n for n in tied if not _is_simple(modules[n])]
            twice = [n for n in tied if n != name and n in tokens]
            if strange:
                problems.append(f"tokens of {name!r}: {strange[0]!r}, tied to it, is no plain head")
            elif twice and [int(i) for i in tokens[twice[0]]] != numbers:
                problems.append(f"tokens of {name!r} and {twice[0]!r} differ, and they are tied")
    return problems


def _is_simple(module: nn.Module) -> bool:
    """Whether the hook knows what the module computes."""
    if isinstance(module, nn.Embedding):
        plain = type(module).forward is nn.Embedding.forward or hasattr(module, "embed_scale")
        return plain and module.max_norm is None and "forward" not in module.__dict__
    return type(module) is nn.Linear and "forward" not in module.__dict__


def insert_tokens(
    model: nn.Module, tokens: Mapping[str, tuple[Any, Tensor | None]], adapter: str = DEFAULT
) -> None:
    """Give an adapter rows of its own: ``{module: (indices, rows [T, D] or None for the base's)}``.

    Of modules that are tied one has the rows, the first that was asked for, and the others follow
    it. Nothing is looked at here: `token_refusals` has been asked.
    """
    modules = {strip_wrappers(name): module for name, module in model.named_modules()}
    found = slots(model)
    done: set[int] = set()
    for name in (name for name in modules if name in tokens):
        indices, values = tokens[name]
        weight: Any = modules[name].weight
        rows = modules[name].__dict__.get(_ROWS)
        if rows is None:
            rows = TokenRows(weight.shape[1], weight)
            modules[name].add_module(TOKEN_ROWS, rows)
            for module in modules.values():
                if getattr(module, "weight", None) is weight:
                    module.__dict__[_ROWS] = rows
                    module.register_forward_hook(_put_in, with_kwargs=True)
        if id(rows) in done:
            continue  # tied to one before it
        done.add(id(rows))
        index = torch.as_tensor(indices, dtype=torch.int64)
        order = torch.argsort(index)
        if values is None:
            original = found[f"{name}.weight"].value_of(None)
            values = whole(original.detach())[index.to(original.device)]
        owner = next(n for n, m in modules.items() if m._modules.get(TOKEN_ROWS) is rows)
        names = [f"{owner}.{TOKEN_ROWS}.weight", f"{owner}.{TOKEN_ROWS}.index"]
        insert_wholes(model, names, adapter)
        kept = whole_tensors(model, adapter)
        kept[names[0]].data = values[order.to(values.device)].to(kept[names[0]], copy=True)
        kept[names[1]].data = index[order].to(kept[names[1]].device)


def refuse_unfoldable(model: nn.Module) -> None:
    """Raise ValueError where `folded_tokens` would write NaN or infinity."""
    for name, module in model.named_modules():
        rows: Any = module._modules.get(TOKEN_ROWS)
        if rows is not None and not torch.isfinite(rows.weight.to(module.weight.dtype)).all():
            raise ValueError(
                f"cannot merge the tokens of {name!r}: they hold NaN or infinity, or what is too "
                f"large for {module.weight.dtype}"
            )


@contextmanager
def folded_tokens(model: nn.Module) -> Iterator[None]:
    """Write the rows in use into the weights, and take them out.

    Where the block raises the weights are as before; the modules are the caller's to bring back.
    """
    written: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for module in list(model.modules()):
            rows: Any = module._modules.get(TOKEN_ROWS)
            if isinstance(rows, TokenRows) and len(rows.index):
                with torch.no_grad():
                    weight: Any = module.weight
                    written.append((weight, rows.index, weight[rows.index]))
                    weight[rows.index] = rows.weight.to(weight.dtype)
        drop_tokens(model)
        yield
    except BaseException:
        with torch.no_grad():
            for weight, index, before in written:
                weight[index] = before
        raise


def has_tokens(module: nn.Module) -> bool:
    """Whether an adapter trains single tokens of the module."""
    return _ROWS in module.__dict__


def drop_tokens(model: nn.Module, *, unused: bool = False) -> None:
    """Take out the rows, and the hooks that put them in: of all adapters, or those of none."""
    for module in list(model.modules()):
        rows = module.__dict__.get(_ROWS)
        if rows is None or (unused and is_whole(rows)):
            continue
        del module.__dict__[_ROWS]
        if isinstance(module._modules.get(TOKEN_ROWS), TokenRows):
            del module._modules[TOKEN_ROWS]
        for key in [k for k, hook in module._forward_hooks.items() if hook is _put_in]:
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
