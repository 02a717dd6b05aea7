"""The product with its rank part, as it is stated and as a launcher makes it."""

from __future__ import annotations

import torch
from closeness import assert_close

from lora_kernels.kernels.dropout import pack_bits


def statement(p, q, u, v, bias, scale, keep, dropout_p):
    branch = scale * (u @ v)
    if keep is not None:
        branch = branch * keep / (1 - dropout_p)
    out = branch if p is None else p @ q + branch
    return out if bias is None else out + bias


def check_product(kernel, p, q, u, v, bias, dropout_p=0.0, *, config, scale=0.7):
    """Hold a launcher of `gemm` or `hopper` against the statement, in float64 and in its dtype."""
    shape = u.shape[0], v.shape[1]
    keep = torch.rand(shape, device=u.device) >= dropout_p if dropout_p else None
    bits = None if keep is None else pack_bits(keep)
    options = {"bias": bias, "scale": scale, "keep_bits": bits, "dropout_p": dropout_p}
    tensors = [u, v] if p is None else [p, q, u, v]
    ours = kernel(*tensors, **options, config=config)
    rounded = [None if t is None else t.to(u.dtype) for t in (p, q, u, v, bias)]
    wide = [None if t is None else t.double() for t in rounded]
    plain = statement(*rounded, scale, keep, dropout_p)
    assert_close(ours, plain, statement(*wide, scale, keep, dropout_p), kernel.__name__)
    assert ours.is_contiguous()


def member_products(group, u, product=True):
    """``x·w_iᵀ + scale_i·u_i·b_iᵀ + bias_i`` of a group of `kernel_groups`."""
    outs, spans = [], group.spans()
    members = zip(group.weights, group.lora_bs, group.biases, strict=True)
    for i, (weight, lora_b, bias) in enumerate(members):
        out = group.x @ weight.t() if product else u.new_zeros(len(u), len(weight))
        if lora_b is not None:
            out = out + group.scales[i] * (u[:, spans[i]] @ lora_b.t())
        outs.append(out if bias is None else out + bias)
    return outs


def sum_of_products(ps, qs, u, v, keep, dropout_p):
    """``Σ p_i·q_i + mask⊙(u·v)/(1 - dropout_p)``."""
    branch = u @ v if keep is None else (u @ v) * keep / (1 - dropout_p)
    return sum((p @ q for p, q in zip(ps, qs, strict=True)), branch)
