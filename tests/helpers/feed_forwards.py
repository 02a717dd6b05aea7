"""A feed-forward's tensors, made up for tests, and the statement it must equal."""

from __future__ import annotations

import oracle
import torch
from gated_activations import OWN
from kernel_cases import drawn_mask

from lora_kernels import lora_feed_forward

# Ranks of gate, up and down (None for no LoRA), and which of them have a bias.
KINDS = {
    "all three": ((2, 3, 2), (False, True, True)),
    "down alone": ((None, None, 2), (True, False, False)),
    "gate alone": ((1, None, None), (False, False, False)),
    "up and down": ((None, 3, 1), (False, True, False)),
    "none": ((None, None, None), (True, True, True)),
}
SCALES = (0.7, 1.3, -0.5)


class FeedForward:
    """x and the projections' tensors by name, such as ``"lora_a1"``; absent ones are left out."""

    def __init__(self, kind, m=4, k=5, hidden=9, n=6, dtype=torch.float64, lead=None, wide=None):
        ranks, biases = KINDS[kind]
        self.tensors = {"x": torch.randn((*((m,) if lead is None else lead), k), dtype=dtype)}
        sizes = (hidden, k), (hidden, k), (n, hidden)
        for i, ((out, into), rank, bias) in enumerate(zip(sizes, ranks, biases, strict=True)):
            self.tensors[f"weight{i}"] = torch.randn(out, into, dtype=dtype) / into**0.5
            if rank is not None:
                self.tensors[f"lora_a{i}"] = (
                    torch.randn(rank, into, dtype=wide or dtype) / into**0.5
                )
                self.tensors[f"lora_b{i}"] = torch.randn(out, rank, dtype=wide or dtype) / 2
            if bias:
                self.tensors[f"bias{i}"] = torch.randn(out, dtype=dtype)
        self.names = tuple(self.tensors)
        self.inputs = tuple(self.tensors.values())
        self.widths = k, hidden

    def to(self, dtype, device=None):
        """The same in another dtype, as leaves of their own that require what these require."""
        other = object.__new__(FeedForward)
        other.__dict__.update(self.__dict__)
        other.tensors = {
            name: t.detach().to(device or t.device, dtype).requires_grad_(t.requires_grad)
            for name, t in self.tensors.items()
        }
        other.inputs = tuple(other.tensors.values())
        return other

    def without_lora(self):
        """The same projections, none of them with LoRA."""
        other = self.to(self.inputs[0].dtype)
        other.tensors = {n: t for n, t in other.tensors.items() if "lora" not in n}
        other.names, other.inputs = tuple(other.tensors), tuple(other.tensors.values())
        return other

    def train(self, *names):
        """Ask for the gradients of these, by default of all."""
        for name in names or self.names:
            self.tensors[name].requires_grad_()
        return self

    def kinds(self, inputs=None):
        """weights, A's, B's and biases as `lora_feed_forward` takes them."""
        found = self.tensors if inputs is None else dict(zip(self.names, inputs, strict=True))
        return [
            [found.get(f"{kind}{i}") for i in range(3)]
            for kind in ("weight", "lora_a", "lora_b", "bias")
        ]

    def ours(self, *inputs, seed=8, **options):
        """`lora_feed_forward` of tensors in the order of ``names``, with equal masks each time."""
        torch.manual_seed(seed)
        inputs = inputs or self.inputs
        options = {"scales": SCALES, "training": True, **options}
        return lora_feed_forward(inputs[0], *self.kinds(inputs), **options)

    def masks(self, dropout_p, backend="reference", seed=8):
        """The masks over x's rows and over h that `ours` draws, None for one that is not needed."""
        if not dropout_p:
            return None, None
        torch.manual_seed(seed)
        with_lora = [f"lora_a{i}" in self.tensors for i in range(3)]
        x = self.inputs[0].detach().reshape(-1, self.widths[0])
        hidden = x.new_empty(x.shape[0], self.widths[1])
        return (
            drawn_mask(x, dropout_p, backend) if any(with_lora[:2]) else None,
            drawn_mask(hidden, dropout_p, backend) if with_lora[2] else None,
        )

    def statement(self, *inputs, masks=(None, None), dropout_p=0.0, activation="silu"):
        """The same by torch's own autograd, with given masks."""
        inputs = inputs or self.inputs
        x, kinds = inputs[0], self.kinds(inputs)

        def project(x, i, keep):
            weight, lora_a, lora_b, bias = (kind[i] for kind in kinds)
            if lora_a is None:
                return torch.nn.functional.linear(x, weight, bias)
            factors = lora_a.to(weight.dtype), lora_b.to(weight.dtype)
            keep = keep if keep is None else keep.reshape(x.shape)
            options = {"scale": SCALES[i], "keep": keep, "dropout_p": dropout_p}
            return oracle.lora_linear(x, weight, *factors, bias, **options)

        gate, up = project(x, 0, masks[0]), project(x, 1, masks[0])
        return project(OWN[activation](gate) * up, 2, masks[1])

    def gradients(self, y, dy):
        """Of what requires one, by name."""
        wanted = {name: t for name, t in self.tensors.items() if t.requires_grad}
        found = torch.autograd.grad(y, list(wanted.values()), dy, allow_unused=True)
        return dict(zip(wanted, found, strict=True))
