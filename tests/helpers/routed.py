"""Groups of rows with a matrix each, made up for tests, and what they must equal."""

from __future__ import annotations

import oracle
import torch

from lora_kernels import lora_grouped_linear

NAMES = ("x", "weight", "lora_a", "lora_b", "bias")
# Rows of each group, and how many rows belong to none.
ROUTINGS = {
    "uneven": ((3, 1, 4), 0),
    "empty groups": ((0, 3, 0, 0, 2, 0), 0),
    "one row each": ((1, 1, 1), 0),
    "one group": ((5,), 0),
    "rows beyond": ((2, 0, 3), 2),
    "nobody": ((0, 0), 3),
    "no rows": ((0, 0), 0),
}


class Routed:
    """Tensors by name, of routing ``sizes`` with ``beyond`` rows that no group has."""

    def __init__(
        self,
        sizes,
        beyond=0,
        n=6,
        k=5,
        r=2,
        dtype=torch.float64,
        bias=True,
        transposed=False,
        scale=0.7,
        wide=None,
        device="cpu",
    ):
        count, wide = len(sizes), wide or dtype
        weight = torch.randn(count, k, n).mT if transposed else torch.randn(count, n, k)
        made = {
            "x": torch.randn(sum(sizes) + beyond, k).to(dtype),
            "weight": (weight / k**0.5).to(dtype),
            "lora_a": (torch.randn(count, r, k) / k**0.5).to(wide),
            "lora_b": torch.randn(count, n, r).to(wide),
        }
        if bias:
            made["bias"] = torch.randn(count, n).to(dtype)
        self.sizes, self.scale = sizes, scale
        self.tensors = {name: tensor.to(device) for name, tensor in made.items()}
        self.offsets = torch.tensor(sizes, device=device).cumsum(0, dtype=torch.int32)

    def train(self, *names):
        for name in names or self.tensors:
            self.tensors[name].requires_grad_()
        return self

    def to(self, dtype):
        """The same in another dtype, as leaves of their own that require what these require."""
        other = object.__new__(Routed)
        other.__dict__.update(self.__dict__)
        other.tensors = {
            name: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad)
            for name, t in self.tensors.items()
        }
        return other

    @property
    def inputs(self):
        return tuple(self.tensors.values())

    def ours(self, *inputs, seed=8, **options):
        torch.manual_seed(seed)
        x, weight, lora_a, lora_b, *bias = inputs or self.inputs
        options = {"scale": self.scale, "training": True, **options}
        return lora_grouped_linear(x, weight, lora_a, lora_b, self.offsets, *bias, **options)

    def statement(self, *inputs, keep=None, dropout_p=0.0):
        """Each group by itself, differentiated by torch's own autograd; zero beyond."""
        x, weight, lora_a, lora_b, *bias = inputs or self.inputs
        ys, start = [], 0
        for g, size in enumerate(self.sizes):
            rows = slice(start, start + size)
            ys.append(
                oracle.lora_linear(
                    x[rows],
                    weight[g],
                    lora_a[g].to(x.dtype),
                    lora_b[g].to(x.dtype),
                    bias[0][g] if bias else None,
                    scale=self.scale,
                    keep=None if keep is None else keep[rows],
                    dropout_p=dropout_p,
                )
            )
            start += size
        return torch.cat([*ys, x[start:] @ weight[0].t() * 0.0])

    def gradients(self, y, dy):
        """Of what requires one, by name; zero where nothing reaches it."""
        wanted = {name: t for name, t in self.tensors.items() if t.requires_grad}
        found = torch.autograd.grad(y, list(wanted.values()), dy, materialize_grads=True)
        return dict(zip(wanted, found, strict=True))
