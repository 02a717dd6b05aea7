"""Modules that are linears to the eye and cannot take LoRA: what they are, and what to do."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, nn

from ..linear.factors import DTYPES
from ..linear.module import LoRALinear

# Words by which quantised linears are known: bitsandbytes', GPTQ's, AWQ's and others'.
_QUANTISED = re.compile(
    r"[48]bit|aqlm|awq|bitblas|bitlinear|bitnet|bitsandbytes|compressed|eetq|exllama|fbgemm|fp[48]|"
    r"gguf|gptq|hqq|int[48]|marlin|mxfp|quant|spqr|vptq",
    re.IGNORECASE,
)


def said_of_lookalikes(modules: Mapping[str, nn.Module]) -> list[str]:
    """A line for each class of such modules: how many there are, the first one's name, a way out.

    ``modules`` are by name, all of a model.
    """
    found: dict[str, list[str]] = {}
    for name, module in modules.items():
        said = way_out(module)
        if said:
            found.setdefault(f"{type(module).__name__}|{said}", []).append(name)
    return [
        f"{len(names)} {kind} (the first is {names[0]!r}): {said}"
        for key, names in found.items()
        for kind, _, said in [key.partition("|")]
    ]


def way_out(module: nn.Module) -> str:
    """Why a module that is a linear to the eye cannot take LoRA, and what to do.

    Empty for what can, and for what is no linear.
    """
    kind = type(module)
    if kind in (nn.Linear, LoRALinear):
        return ""
    features = [getattr(module, f"{end}_features", None) for end in ("in", "out")]
    if isinstance(module, nn.Linear) or all(isinstance(number, int) for number in features):
        if kind.__module__.startswith("torch.nn.modules"):
            return "nn.MultiheadAttention uses its weight without calling it; leave it out"
        weight = getattr(module, "weight", None)
        plain = isinstance(weight, Tensor) and weight.dtype in DTYPES
        if not plain or _QUANTISED.search(f"{kind.__module__} {kind}"):
            return (
                "quantised, which is not supported; load the model without quantization_config, "
                "or call its dequantize() first"
            )
        return (
            "not exactly an nn.Linear, and may compute something else; put an nn.Linear in its "
            "place first, or leave it out"
        )
    if kind.__name__ == "Conv1D" and isinstance(getattr(module, "nf", None), int):
        return (
            "its weight is transposed; put an nn.Linear with the weight turned round in its place "
            "first"
        )
    matrices = [p for p in module._parameters.values() if p is not None and p.dim() > 1]
    if "expert" in kind.__name__.lower() and matrices:
        return (
            "fused experts, whose matrices are parameters and no linears; target the linears "
            "beside them"
        )
    return ""
