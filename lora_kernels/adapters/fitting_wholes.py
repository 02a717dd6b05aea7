"""Whether the parameters trained whole that a file holds fit a model; nothing is changed here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linear.factors import DEFAULT
from .content import Content
from .fitting_tokens import fit_tokens, of_tokens
from .heads import classifier_heads
from .sharding import whole
from .targets import strip_wrappers
from .wholes import Slot, is_inside, names_inside, refusals, slots, whole_slots
from .wording import listed


class WholeFit(NamedTuple):
    """What loading will do.

    Attributes:
        loaded: tensors to copy into the adapter's parameters and buffers, by clean name.
        inserted: names of those that the adapter has to be given first.
        frozen: those among them that the file has of the base, not trained, and that differ from
            the model's.
        tokens: rows that the adapter has to be given, see `insert_tokens`.
        problems: what does not fit, a sentence each.
    """

    loaded: dict[str, Tensor]
    inserted: list[str]
    frozen: list[str]
    tokens: dict[str, tuple[Any, Tensor]]
    problems: list[str]


def fit_wholes(
    model: nn.Module, content: Content, fresh: bool, strict: bool, adapter: str = DEFAULT
) -> WholeFit:
    """Hold them against ``model``, which, if ``fresh``, has no such adapter."""
    found = slots(model)
    own = whole_slots(model, adapter)
    problems: list[str] = []
    copies: dict[str, Tensor] = {}
    if content.base:
        wanted = names_inside(model, classifier_heads(model)) if fresh else list(own)
        wanted += [name for name in content.base if fresh and of_tokens(name)]
        values = {n: content.base[t] for n in wanted if (t := _there(found, n, content.base))}
        missing = [name for name in wanted if name not in values]
    else:
        values = {n: t for n, t in content.whole.items() if strict or n in found or of_tokens(n)}
        absent = _absent(model, content)
        problems += [f"missing from the file: {name}, of modules_to_save" for name in absent]
        if content.tying:
            values |= {twin: t for name, t in values.items() for twin in _twins(found, name)}
        beside = {name: t for name, t in content.copies.items() if name not in values}
        copies, strange = _differing(model, found, beside)
        problems += strange
        missing = [n for n in own if n not in values and not own[n].is_frozen(adapter)]
        if not fresh:
            unexpected = [n for n in values if n in found and n not in own]
            if strict and unexpected:
                problems.append(
                    f"in the file but not trained whole in the model: {listed(unexpected)}; "
                    "call apply_lora with modules_to_save, or load into the bare base"
                )
            values = {name: t for name, t in values.items() if name not in unexpected}
        values |= copies
    rows = fit_tokens(model, own, {n: t for n, t in values.items() if of_tokens(n)}, fresh, adapter)
    problems += rows.problems
    values = {name: t for name, t in values.items() if not of_tokens(name)}
    if strict and missing:
        problems.append(f"missing from the file: {listed(missing)}")
    for name, tensor in values.items():
        problems += _differences(model, found, name, tensor)
    problems += [
        f"{name} and {twin} are one tensor in the model, and two that differ in the file; untie "
        "the model's first (tie_word_embeddings=False)"
        for name in values
        for twin in _twins(found, name)
        if twin > name and twin in values and not _equal(values[twin], values[name])
    ]
    inserted = [name for name in values if name in found and name not in own]
    problems += refusals(model, inserted)
    frozen = [name for name in inserted if name in copies]
    return WholeFit({**values, **rows.loaded}, inserted, frozen, rows.inserted, problems)


def _absent(model: nn.Module, content: Content) -> list[str]:
    """Modules of the model that the file should have whole, and of which it has nothing."""
    if not content.saved:
        return []
    return [
        module
        for name, _ in model.named_modules()
        if (module := strip_wrappers(name)).endswith(content.saved)
        and names_inside(model, [module])
        and not any(is_inside(key, module) for key in content.whole)
    ]


def _twins(found: Mapping[str, Slot], name: str) -> list[str]:
    """Other names of the same tensor."""
    if name not in found:
        return []
    return [n for n, slot in found.items() if n != name and slot.value is found[name].value]


def _there(found: Mapping[str, Slot], name: str, base: Iterable[str]) -> str | None:
    """The name under which a checkpoint holds a tensor: of what is tied it holds one."""
    return next((n for n in (name, *_twins(found, name)) if n in base), None)


def _differing(
    model: nn.Module, found: Mapping[str, Slot], copies: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], list[str]]:
    """Those of the base's tensors in a file that are not the model's own, and those not known.

    PEFT saves them where LoRA is on the head or the vocabulary was resized, and loads them.
    """
    ends = [_call(model, f"get_{end}_embeddings") for end in ("input", "output")]
    differing: dict[str, Tensor] = {}
    strange: list[str] = []
    for name, copy in copies.items():
        slot = found.get(name)
        if slot is None:
            strange.append(f"unexpected key {name!r}: the model has no such parameter")
        elif not _equal(slot.value_of(None), copy):
            if not any(slot.module is end for end in ends):
                strange.append(
                    f"unexpected key {name!r}: it is the base's, and another than the model's; "
                    "load the base that the adapter was trained on"
                )
            differing |= dict.fromkeys((name, *_twins(found, name)), copy)
    return differing, strange


def _call(model: nn.Module, method: str) -> object:
    owner = next((m for m in model.modules() if callable(getattr(m, method, None))), None)
    return None if owner is None else getattr(owner, method)()


def _equal(own: Tensor, copy: Tensor) -> bool:
    """Whether two tensors are the same, once rounded to the narrower of their dtypes."""
    if own.shape != copy.shape or own.is_meta:
        return False
    narrow = min(own.dtype, copy.dtype, key=lambda dtype: dtype.itemsize)
    return torch.equal(whole(own.detach()).to("cpu", narrow), copy.to(narrow))


def _differences(
    model: nn.Module, found: Mapping[str, Slot], name: str, tensor: Tensor
) -> list[str]:
    if name not in found:
        return [f"the model has no parameter {name!r}"]
    value = found[name].value
    if value.shape != tensor.shape:
        resizable = callable(getattr(model, "resize_token_embeddings", None))
        rows = tensor.dim() and tensor.shape[1:] == value.shape[1:] and resizable
        hint = f"; call resize_token_embeddings({len(tensor)}) first" if rows else ""
        return [f"{name}: expected {list(value.shape)}, found {list(tensor.shape)}{hint}"]
    if value.is_floating_point() != tensor.is_floating_point():
        return [f"{name}: expected {value.dtype}, found {tensor.dtype}"]
    if value.is_floating_point() and not torch.isfinite(tensor.to(value.dtype)).all():
        return [f"{name}: too large for the model's {value.dtype}"]
    return []
