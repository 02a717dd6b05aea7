"""Members that share x, made up for tests, and the statement that a group must equal."""

from __future__ import annotations

import oracle
import torch

from lora_kernels import lora_linear_group

# Of each member: outputs, rank (None for no LoRA), bias, scale.
MEMBERS = {
    "q, k, v": ((6, 2, False, 0.7), (3, 3, True, 1.3), (3, 2, False, -0.5)),
    "alone": ((4, 2, True, 0.7),),
    "one without LoRA": ((4, 2, False, 0.7), (5, None, True, 1.0), (2, 1, True, 1.5)),
    "none with LoRA": ((4, None, False, 1.0), (3, None, True, 1.0)),
    "six": tuple((n, 1 + n % 3, n % 2 == 0, 0.1 * n) for n in (2, 3, 4, 5, 6, 7)),
}


class Group:
    """x and the members' tensors by name, such as ``"lora_a1"``; absent ones are left out."""

    def __init__(self, members, m=4, k=5, dtype=torch.float64, lead=None, wide=None):
        self.scales = tuple(scale for *_, scale in members)
        self.count = len(members)
        self.tensors = {"x": torch.randn((*(lead if lead is not None else (m,)), k), dtype=dtype)}
        for i, (n, rank, bias, _) in enumerate(members):
            self.tensors[f"weight{i}"] = torch.randn(n, k, dtype=dtype) / k**0.5
            if rank is not None:
                self.tensors[f"lora_a{i}"] = torch.randn(rank, k, dtype=wide or dtype) / k**0.5
                self.tensors[f"lora_b{i}"] = torch.randn(n, rank, dtype=wide or dtype)
            if bias:
                self.tensors[f"bias{i}"] = torch.randn(n, dtype=dtype)
        self.names = tuple(self.tensors)
        self.inputs = tuple(self.tensors.values())

    def to(self, dtype, device=None):
        """The same in another dtype, as leaves of their own that require what these require."""
        other = object.__new__(Group)
        other.__dict__.update(self.__dict__)
        other.tensors = {
            name: t.detach().to(device or t.device, dtype).requires_grad_(t.requires_grad)
            for name, t in self.tensors.items()
        }
        other.inputs = tuple(other.tensors.values())
        return other

    def train(self, *names):
        """Ask for the gradients of these, by default of all."""
        for name in names or self.names:
            self.tensors[name].requires_grad_()
        return self

    def kinds(self, inputs=None):
        """weights, A's, B's and biases as `lora_linear_group` takes them."""
        found = self.tensors if inputs is None else dict(zip(self.names, inputs, strict=True))
        return [
            [found.get(f"{kind}{i}") for i in range(self.count)]
            for kind in ("weight", "lora_a", "lora_b", "bias")
        ]

    def ours(self, *inputs, seed=8, **options):
        """`lora_linear_group` of tensors in the order of ``names``, drawing one mask each time."""
        torch.manual_seed(seed)
        inputs = inputs or self.inputs
        options = {"scales": self.scales, "training": True, **options}
        return lora_linear_group(inputs[0], *self.kinds(inputs), **options)

    def statement(self, *inputs, keep=None, dropout_p=0.0):
        """The same by torch's own autograd, with a given mask."""
        inputs = inputs or self.inputs
        ys = []
        for weight, lora_a, lora_b, bias, scale in zip(
            *self.kinds(inputs), self.scales, strict=True
        ):
            if lora_a is None:
                ys.append(torch.nn.functional.linear(inputs[0], weight, bias))
            else:
                ys.append(
                    oracle.lora_linear(
                        inputs[0],
                        weight,
                        lora_a.to(weight.dtype),
                        lora_b.to(weight.dtype),
                        bias,
                        scale=scale,
                        keep=keep,
                        dropout_p=dropout_p,
                    )
                )
        return tuple(ys)

    def gradients(self, ys, dys):
        """Of what requires one, by name; a y without a dy is unused."""
        wanted = {name: t for name, t in self.tensors.items() if t.requires_grad}
        pairs = zip(ys, dys, strict=True)
        used = [(y, dy) for y, dy in pairs if dy is not None and y.requires_grad]
        found = torch.autograd.grad(
            [y for y, _ in used], list(wanted.values()), [dy for _, dy in used], allow_unused=True
        )
        return dict(zip(wanted, found, strict=True))
