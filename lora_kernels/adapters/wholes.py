"""Parameters that an adapter trains whole, beside its factors: heads, embeddings, norms, biases.

The value in use is registered in its module under the name that it always had, so that optimizers,
state dicts and wrappers find it there. What the base has in its place, and what adapters have that
are not in use, is kept aside in a plain attribute of the module: copied and pickled with it, and
brought to the device and dtype of the value in use when it takes its place.

Buffers that are saved (the statistics of a BatchNorm) belong to a module as its parameters do.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..linear.factors import DEFAULT, LoRA
from ..linear.module import DTYPES
from .sharding import gathering, is_emptied, is_sharded, reshard
from .targets import strip_wrappers
from .wording import listed

ASIDE = "_lora_aside"
# The child of an embedding or a head in which `tokens` keeps rows: an adapter's, not the module's.
TOKEN_ROWS = "lora_tokens"


@dataclass
class Aside:
    """What a parameter or buffer is for the base and for each adapter that trains it.

    Attributes:
        using: the adapter whose value is registered, None for the base's.
        others: the values that are not, by adapter, None for the base's.
        frozen: adapters that carry the value without training it.
        off: how many times it is at rest, see `rest_wholes`.
        resting: the adapter that is used again after the last of them.
    """

    using: str | None
    others: dict[str | None, Tensor]
    frozen: set[str] = field(default_factory=set)
    off: int = 0
    resting: str | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has no block that would end for it, and would keep the base's value.
        if self.off:
            raise RuntimeError(
                "cannot copy or pickle a model with whole trained modules inside disable_lora; "
                "leave the block first"
            )
        return self.__dict__

    def has(self, adapter: str | None) -> bool:
        """Whether the adapter has a value of its own here."""
        return adapter == self.using or adapter in self.others

    def adapters(self) -> list[str]:
        """Those that have a value of their own here."""
        return [name for name in (self.using, *self.others) if name is not None]


class Slot(NamedTuple):
    """Where a parameter or buffer is registered."""

    module: nn.Module
    attribute: str

    @property
    def value(self) -> Tensor:
        return getattr(self.module, self.attribute)

    @property
    def aside(self) -> Aside:
        return self.module.__dict__[ASIDE][self.attribute]

    def value_of(self, adapter: str | None) -> Tensor:
        """What it is for an adapter that has it, or with None for the base, in use or not."""
        if ASIDE not in self.module.__dict__ or self.attribute not in self.module.__dict__[ASIDE]:
            return self.value
        return self.value if self.aside.using == adapter else self.aside.others[adapter]

    def is_frozen(self, adapter: str) -> bool:
        """Whether the adapter carries its value without training it."""
        return adapter in self.aside.frozen


def slots(model: nn.Module) -> dict[str, Slot]:
    """Every parameter and saved buffer by its name without wrapper prefixes, under each name."""
    found = {}
    loras = [module for module in model.modules() if isinstance(module, LoRA)]
    factors = {id(part) for lora in loras for part in lora.modules()}
    for name, module in model.named_modules():
        if id(module) in factors:
            continue
        saved = [b for b in module._buffers if b not in module._non_persistent_buffers_set]
        for attribute in (*module._parameters, *saved):
            if getattr(module, attribute) is not None:
                clean = ".".join(filter(None, (strip_wrappers(name), attribute)))
                found[clean] = Slot(module, attribute)
    return found


def whole_slots(model: nn.Module, adapter: str | None = None) -> dict[str, Slot]:
    """Those that an adapter trains whole, or with ``adapter`` given, this one."""
    return {
        name: slot
        for name, slot in slots(model).items()
        if slot.attribute in slot.module.__dict__.get(ASIDE, ())
        and (adapter is None or slot.aside.has(adapter))
    }


def whole_tensors(model: nn.Module, adapter: str = DEFAULT) -> dict[str, Tensor]:
    """``{"<module>.<parameter>": tensor}`` of an adapter, whether it is in use or not."""
    return {name: slot.value_of(adapter) for name, slot in whole_slots(model, adapter).items()}


def whole_parameters(
    model: nn.Module, adapters: Collection[str] = (DEFAULT,)
) -> list[nn.Parameter]:
    """The parameters that these adapters train whole, in use or not, each once."""
    found = {}
    for slot in whole_slots(model).values():
        for name in adapters:
            if slot.aside.has(name) and not slot.is_frozen(name):
                value = slot.value_of(name)
                if isinstance(value, nn.Parameter):
                    found[id(value)] = value
    return list(found.values())


def is_whole(module: nn.Module) -> bool:
    """Whether an adapter trains something of the module itself whole."""
    return ASIDE in module.__dict__


def whole_values(model: nn.Module) -> list[Tensor]:
    """The parameters that adapters have of their own, in use or not."""
    return [
        value
        for slot in whole_slots(model).values()
        for name in slot.aside.adapters()
        if isinstance(value := slot.value_of(name), nn.Parameter)
    ]


def names_inside(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Names of the parameters and saved buffers inside of modules (by their own names), without the
    single tokens that an adapter trains there."""
    clean = tuple(strip_wrappers(name) for name in modules)
    return [
        name
        for name in slots(model)
        if TOKEN_ROWS not in name.split(".") and any(is_inside(name, module) for module in clean)
    ]


def is_inside(name: str, module: str) -> bool:
    """Whether ``name`` is ``module`` itself or something in it."""
    return name == module or not module or name.startswith(f"{module}.")


def refusals(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Why these parameters cannot be trained whole, a sentence each."""
    reshard(model)
    found, wanted, problems = slots(model), dict.fromkeys(names), []
    for name in wanted:
        value = found[name].value
        parameter = isinstance(value, nn.Parameter)
        if is_sharded(value):
            problems.append(f"{name!r} is sharded already; do this before fully_shard")
        elif value.is_meta:
            problems.append(f"{name!r} is on the meta device; give the model memory first")
        elif is_emptied(value):
            problems.append(f"{name!r} is emptied by ZeRO-3; {gathering('model.parameters()')}")
        elif value.numel() == 0 and parameter:
            problems.append(f"{name!r} has been emptied; do this before it")
        elif parameter and (value.dtype not in DTYPES or type(value.data) is not Tensor):
            problems.append(f"{name!r} is {type(value.data).__name__} of {value.dtype}, quantised")
        else:
            twins = [n for n, slot in found.items() if slot.value is value and n not in wanted]
            if twins:
                problems.append(
                    f"{name!r} is tied to {listed([*map(repr, twins)])}: name both to train them "
                    "as one, or untie them first (tie_word_embeddings=False)"
                )
    return problems


def insert_wholes(
    model: nn.Module, names: Iterable[str], adapter: str = DEFAULT, *, frozen: Iterable[str] = ()
) -> None:
    """Give an adapter values of its own of these, beginning as copies of the base's.

    What is tied stays tied. They are not in use yet. Nothing is looked at here: `refusals` has been
    asked.
    """
    found, frozen = slots(model), set(frozen)
    copies: dict[int, Tensor] = {}
    for name in names:
        slot = found[name]
        value = slot.value_of(None)
        if id(value) not in copies:
            copy = value.detach().to(slot.value.device, slot.value.dtype, copy=True)
            if isinstance(value, nn.Parameter):
                copy = nn.Parameter(copy, requires_grad=name not in frozen)
            copies[id(value)] = copy
        asides = slot.module.__dict__.setdefault(ASIDE, {})
        aside = asides.setdefault(slot.attribute, Aside(None, {}))
        aside.others[adapter] = copies[id(value)]
        if name in frozen:
            aside.frozen.add(adapter)


def use_wholes(model: nn.Module, adapters: Collection[str]) -> None:
    """Register what one of the adapters has, and the base's where none has anything.

    Raises:
        ValueError: two of them have a value of the same parameter, or one of single tokens in it,
            or what would have to change places is sharded. Nothing is changed then.
    """
    wanted: list[tuple[Slot, str | None]] = []
    found = whole_slots(model)
    for name, slot in found.items():
        having = [adapter for adapter in adapters if slot.aside.has(adapter)]
        rows = found.get(f"{name.rpartition('.')[0]}.{TOKEN_ROWS}.weight")
        if rows is not None and any(not slot.is_frozen(adapter) for adapter in having):
            having += [a for a in adapters if a not in having and rows.aside.has(a)]
        if len(having) > 1:
            raise ValueError(
                f"{having[0]!r} and {having[1]!r} both train {name!r} whole, and it can have one "
                "value only; use one of them at a time"
            )
        wanted.append((slot, having[0] if having else None))
    changing = [(slot, adapter) for slot, adapter in wanted if slot.aside.using != adapter]
    if changing:
        _refuse_sharded(model, [slot for slot, _ in changing])
    for slot, adapter in changing:
        _use(slot, adapter)


def rest_wholes(model: nn.Module) -> list[Slot]:
    """Register the base's values until `wake_wholes` is given what this gives; may be nested.

    Raises:
        ValueError: a value in use is sharded. Nothing is changed then.
    """
    found = list({id(slot.aside): slot for slot in whole_slots(model).values()}.values())
    _refuse_sharded(model, found)
    for slot in found:
        if not slot.aside.off:
            slot.aside.resting = slot.aside.using
            _use(slot, None)
        slot.aside.off += 1
    return found


def wake_wholes(found: Iterable[Slot]) -> None:
    """The end of one `rest_wholes`; the last of several brings back what was in use."""
    for slot in found:
        aside = slot.aside
        if aside.off == 1:
            _use(slot, aside.resting)
        aside.off -= 1


def drop_wholes(model: nn.Module, adapter: str | None = None) -> None:
    """Forget what an adapter has, or with None all of it; the base's takes its place.

    Raises:
        ValueError: a value is sharded, or at rest. Nothing is changed then.
    """
    found = list(whole_slots(model, adapter).values())
    _refuse_sharded(model, found)
    if any(slot.aside.off for slot in found):
        raise ValueError("the base is in use, by disable_lora; leave its block first")
    for slot in found:
        aside = slot.aside
        if adapter is None or aside.using == adapter:
            _use(slot, None)
        gone = [*aside.others] if adapter is None else [adapter]
        for name in gone:
            aside.others.pop(name, None)
            aside.frozen.discard(str(name))
        if not aside.others:
            _forget(slot)


def keep_wholes(model: nn.Module) -> None:
    """Make the values in use the model's own, and forget all others: what merging leaves."""
    for slot in whole_slots(model).values():
        _forget(slot)


def _use(slot: Slot, adapter: str | None) -> None:
    aside, value = slot.aside, slot.value
    if aside.using == adapter:
        return
    new = aside.others.pop(adapter)
    if (new.device, new.dtype) != (value.device, value.dtype):  # the model has been moved or cast
        with torch.inference_mode(False):  # it may be trained later
            new.data = new.data.to(value.device, value.dtype)
    aside.others[aside.using] = value
    aside.using = adapter
    setattr(slot.module, slot.attribute, new)


def _forget(slot: Slot) -> None:
    asides = slot.module.__dict__[ASIDE]
    del asides[slot.attribute]
    if not asides:
        del slot.module.__dict__[ASIDE]


def _refuse_sharded(model: nn.Module, found: Iterable[Slot]) -> None:
    reshard(model)
    for slot in found:
        if is_sharded(slot.value):
            raise ValueError(
                f"a {type(slot.module).__name__}'s {slot.attribute} is trained whole and sharded "
                "over processes: the base's cannot take its place; save_lora, and load_lora into a "
                "model that is not sharded"
            )
