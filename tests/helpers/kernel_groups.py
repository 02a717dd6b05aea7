"""Groups of members for every test that runs a kernel of groups, and what is true of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from closeness import assert_close

# Of each member: outputs, rank (None for no LoRA), and whether it has a bias.
MEMBERS = {
    "q, k, v": ((72, 16, True), (24, 16, False), (24, 16, True)),
    "one without LoRA": ((33, 5, True), (17, None, True), (65, 16, False)),
    "the first without LoRA": ((17, None, False), (1, 1, False)),
    "four of several ranks": ((8, 8, False), (72, 24, False), (40, 48, True), (16, 8, True)),
    "alone": ((24, 3, True),),
    "long ranks": ((20, 130, False), (24, 70, True)),
}
SCALES = (0.7, 1.0, -0.5, 2.0)


class Group(NamedTuple):
    x: torch.Tensor
    weights: list
    lora_as: list
    lora_bs: list
    biases: list
    scales: tuple
    dys: list

    @property
    def kinds(self):
        """What forward and backward take after x."""
        return self.weights, self.lora_as, self.lora_bs, self.biases

    @property
    def ranks(self):
        return [0 if lora_a is None else lora_a.shape[0] for lora_a in self.lora_as]

    def spans(self):
        """Each member's columns of xa."""
        ends = [sum(self.ranks[: i + 1]) for i in range(len(self.ranks))]
        return [slice(end - r, end) for end, r in zip(ends, self.ranks, strict=True)]

    def to(self, dtype):
        """Every tensor in ``dtype``; not twice what is already."""

        def cast(value):
            if torch.is_tensor(value):
                return value.to(dtype)
            return [None if t is None else t.to(dtype) for t in value]

        return Group(*(v if isinstance(v, tuple) else cast(v) for v in self))


def make(members, dtype, device, m=37, k=56, factors=None, packed=False):
    """Random tensors of a group; with ``packed`` the weights are views of one buffer."""
    found = {"weights": [], "lora_as": [], "lora_bs": [], "biases": [], "dys": []}
    for n, rank, bias in members:
        drawn = {
            "weights": torch.randn(n, k),
            "lora_as": None if rank is None else torch.randn(rank, k),
            "lora_bs": None if rank is None else torch.randn(n, rank),
            "biases": torch.randn(n) if bias else None,
            "dys": torch.randn(m, n),
        }
        for kind, tensor in drawn.items():
            wide = factors if kind.startswith("lora") and factors else dtype
            found[kind].append(None if tensor is None else tensor.to(device, wide))
    if packed:
        ns = [n for n, *_ in members]
        found["weights"] = list(torch.cat(found["weights"]).split(ns))
    return Group(torch.randn(m, k).to(device, dtype), scales=SCALES[: len(members)], **found)


def close_all(names, ours, plain, truth):
    """Hold tensors, or tuples of them and None, against what is true, one by one."""
    for name, one, other, true in zip(names, ours, plain, truth, strict=True):
        if isinstance(true, (tuple, list)):
            assert len(one) == len(true), name
            close_all([f"{name}{i}" for i in range(len(true))], one, other, true)
        elif true is None:
            assert one is None, name
        else:
            assert one is not None, f"{name} was not computed"
            assert_close(one.to(other.dtype), other, true, name)
