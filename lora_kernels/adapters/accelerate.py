"""Make a live PEFT model run on these kernels, and give it back.

peft is imported when `accelerate_peft` is called, not before: the package does not need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import ModuleType

from torch import nn

from ..dispatch import explain, together
from .changing import change_of
from .grouping import check_group, forget_groups, group_linears
from .wording import listed

_SHOWN = 3


@dataclass(frozen=True, repr=False)
class PeftReport:
    """How a PEFT model stands after `accelerate_peft`; ``print`` it.

    Attributes:
        taken: names of the layers that run on these kernels, in module order.
        handing_over: those of ``taken`` whose calls PEFT serves as things stand, with the reason:
            merged, disabled, a DoRA adapter … It is looked at anew in each call.
        left: names of the adapter layers that were not touched, with the reason.
        path: what `explain` says of the first layer that they serve, empty if there is none.
        together: which layers are computed together, where they read one tensor.
    """

    taken: tuple[str, ...]
    handing_over: Mapping[str, str]
    left: Mapping[str, str]
    path: str
    together: str = ""

    def __str__(self) -> str:
        lines = [
            f"accelerate_peft: {len(self.taken)} of {len(self.taken) + len(self.left)} adapter "
            "layers taken"
        ]
        if self.taken:
            lines.append(f"  taken: {listed(self.taken, _SHOWN)}")
        if self.path:
            lines.append(f"  path: {self.path}")
        if self.together:
            lines.append(f"  computed together: {self.together}")
        for title, reasons in (
            ("taken, but PEFT serves their calls for now", self.handing_over),
            ("left to PEFT", self.left),
        ):
            if reasons:
                lines.append(f"  {title}: {len(reasons)}")
            for reason in dict.fromkeys(reasons.values()):
                names = [name for name in reasons if reasons[name] == reason]
                lines.append(f"    {reason}: {listed(names, _SHOWN)}")
        return "\n".join(lines)

    __repr__ = __str__


def accelerate_peft(
    model: nn.Module, *, undo: bool = False, group: bool | None = None
) -> PeftReport:
    """Make the LoRA linears of a live PEFT model run on `lora_linear`, in place.

    Takes every module that is exactly ``peft.tuners.lora.layer.Linear``, whether it came there by
    ``get_peft_model``, ``PeftModel.from_pretrained`` or ``add_adapter`` of transformers. Parameters
    and names stay what they are, and so do all of PEFT's methods: save, merge, switch, add, disable
    and delete as before. Several active adapters are computed as one of a wider rank. What the
    kernels do not compute goes to PEFT's own forward call by call (several active ones that drop
    elements, merged ones, DoRA, ``lora_bias``, quantised weights, hooks, a library's own forward
    put on PEFT's class or on ``nn.Linear`` …).
    Results are PEFT's up to rounding: where float32 adapters sit on a narrower base, the branch is
    multiplied in the base's dtype, as under autocast, and the gradients are float32.

    Call it again after adding an adapter to further modules. Do it before DDP, ``fully_shard`` and
    ``torch.compile``.

    Args:
        model: a PEFT model, or any module with PEFT's layers in it.
        undo: give the layers back to PEFT instead; also for a copy, or a model unpickled.
        group: as for `apply_lora`: layers that are called with one tensor, as q, k and v are, are
            computed together, with one dropout mask where PEFT draws one for each.

    Returns:
        What was taken, what was left and why, as `PeftReport`.

    Raises:
        TypeError: ``model`` is not a module, or ``group`` is not True, False or None.
        ValueError: it has no layer of PEFT's.
        ImportError: peft is missing or older than 0.17.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_group(group)
    library = _import_peft_layer()
    fast = library.FastLinear
    layers = {n: m for n, m in model.named_modules() if isinstance(m, library.BaseTunerLayer)}
    if not layers:
        raise ValueError(
            "model has no PEFT adapter layer; call peft.get_peft_model first, or put LoRA in with "
            "lora_kernels.apply_lora, which needs no acceleration"
        )
    if undo:
        back = [layer for layer in layers.values() if type(layer) is fast]
        forget_groups(model, (fast,))
        for layer in back:
            layer.__class__ = library.Linear
        return PeftReport((), {}, dict.fromkeys(layers, "acceleration undone"), "")
    left = {
        name: reason
        for name, layer in layers.items()
        if type(layer) is not fast and (reason := library.lasting_refusal(layer))
    }
    taken = {name: layer for name, layer in layers.items() if name not in left}
    with change_of(model):
        for layer in taken.values():
            layer.__class__ = fast
        group_linears(model, group, (fast,))
    parts = {name: layer.parts() for name, layer in taken.items()}
    handing_over = {name: part for name, part in parts.items() if isinstance(part, str)}
    served = next((part for part in parts.values() if not isinstance(part, str)), None)
    path = "" if served is None else explain((served.weight, *served[:4]))
    return PeftReport(tuple(taken), handing_over, left, path, together(model))


def _import_peft_layer() -> ModuleType:
    try:
        from . import peft_layer
    except ImportError as error:
        raise ImportError(
            f"accelerate_peft needs peft 0.17 or newer ({error}); pip install --upgrade peft"
        ) from error
    return peft_layer
