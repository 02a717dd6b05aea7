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
