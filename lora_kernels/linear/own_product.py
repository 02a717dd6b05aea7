"""LoRA on a weight that multiplies by itself: a tensor of a class that another library has made.

torchao's quantised weights are such: an ``nn.Linear`` holds them as any other, and they answer
``F.linear`` with products of their own, which no kernel here can take apart.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def onto_own_product(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    bias: Tensor | None,
    scale: float,
    dropout_p: float,
) -> Tensor:
    """As `lora_linear`: the weight's own product, differentiated by its own rules, and the branch
    by torch's. Under autocast y has the dtype that the product has.

    Raises:
        RuntimeError: the product passes no gradient on to x, which needs one.
    """
    frozen = bias is None or not bias.requires_grad
    y = F.linear(x, weight, bias if frozen else None)
    if x.requires_grad and torch.is_grad_enabled() and not y.requires_grad:
        raise RuntimeError(
            f"the product with a {type(weight).__name__} passes no gradient on to x, and what "
            "comes before it would learn wrongly; load the model without quantization, or with "
            "one of the weights alone (torchao's …WeightOnlyConfig), or run under torch.no_grad()"
        )
    if bias is not None and not frozen:
        y = y + bias.to(y.dtype)
    branch = F.dropout(x, dropout_p) if dropout_p else x
    for factor in (lora_a, lora_b):
        branch = F.linear(branch, factor.to(branch.dtype))
    return y + (branch * scale).to(y.dtype)
