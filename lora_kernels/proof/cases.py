"""Calls of every launcher on made-up operands: how to build them, run them, and what is true.

One place for the tools that go through all kernels: `check` runs the cases, `resources` compiles
them on the ``meta`` device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..kernels import gemm, hopper, tuning
from ..kernels.dropout import keep_mask, pack_bits, unpack_bits
from ..kernels.thin import compute_da
from ..kernels.tuning import Config, Shape
from ..linear import backward, dxa_db, forward, reference, xa
from ..linear.backward import SKINNY_RANK

Tensors = dict[str, Tensor]

# One that rounds what it is multiplied with, and one that does not: a kernel may tell them apart.
SCALE, EXACT_SCALE = 0.7, 0.5
# The products that stand in for forward and, with other operands, for dx.
PRODUCTS: dict[str, Callable[..., Tensor]] = {
    "gemm": gemm.pointer_gemm,
    "hopper": hopper.hopper_gemm,
    "expand": gemm.expand,
}
# The table serves these kernels up to a rank; beyond it another strategy takes over.
MOST_RANK = {
    **dict.fromkeys(("one_kernel", "group_one_kernel"), tuning.ONE_KERNEL_RANK),
    **dict.fromkeys(("dxa_db", "group_dxa_db"), SKINNY_RANK),
}
NARROW = (torch.bfloat16, torch.float16)
DTYPE_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def served(
    kernel: str, capability: tuple[int, int], itemsize: int, rank: int
) -> list[tuple[Config, Shape]]:
    """What the table gives for a kernel at this rank, each with a shape for which it does so.

    Empty where the table has no row of this kernel, as of `hopper` off Hopper.
    """
    rows = [
        row
        for row in tuning.rows_for(capability)
        if row.kernel == kernel and row.itemsize == itemsize
    ]
    if not rows or rank > MOST_RANK.get(kernel, rank):
        return []

    def bounds(name: str, beyond: int) -> list[int]:
        return [beyond, *sorted({getattr(row, name) for row in rows} - {None}, reverse=True)]

    found: dict[Config, Shape] = {}
    for m, n, k in product(bounds("m", 8192), bounds("n", 4096), bounds("k", 4096)):
        shape = Shape(m, n, k, rank)
        found.setdefault(tuning.lookup(kernel, capability, itemsize, shape), shape)
    return list(found.items())


def ranks_of(kernel: str, capability: tuple[int, int]) -> list[int]:
    """Ranks that between them take every row and every tile of the rank that the kernel has."""
    rows = [row for row in tuning.rows_for(capability) if row.kernel == kernel]
    return sorted({16, 32, 64} | {row.r for row in rows if row.r})


def described(c: Config) -> str:
    """Such as ``128x256x64 w8 s3``."""
    sizes = "x".join(str(size) for size in (c.block_m, c.block_n, c.block_k) if size)
    return f"{sizes} w{c.warps} s{c.stages}" + (f" x{c.per_sm}" if c.per_sm > 1 else "")


@contextmanager
def products_in(tf32: bool) -> Iterator[None]:
    """Take float32 products in TF32, or in IEEE arithmetic, inside the ``with``."""
    # The older `torch.get_float32_matmul_precision` raises where somebody has set this one.
    matmul: Any = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "tf32" if tf32 else "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@dataclass(frozen=True)
class Case:
    """One call of one kernel's launcher.

    Attributes:
        kernel: of `tuning.KERNELS`.
        shape: rows and columns of what comes out, contraction and rank; for ``xa``, ``dxa_db``
            and ``da``, ``x [m, k]`` and ``dy [m, n]``.
        dx: the operands of dx instead of forward's, where the kernel is a product of both.
        bias: with a bias, or for ``dxa_db`` with its gradient.
        wide: with A and B in float32.
        tf32: float32 products in TF32.
        scale: factor on the LoRA branch.
    """

    kernel: str
    config: Config
    dtype: torch.dtype
    shape: Shape
    dx: bool = False
    bias: bool = False
    dropout_p: float = 0.0
    wide: bool = False
    tf32: bool = False
    scale: float = SCALE

    @property
    def name(self) -> str:
        """The kernel, and which of its two uses this is."""
        return (
            f"{self.kernel} {'dx' if self.dx else 'y'}" if self.kernel in PRODUCTS else self.kernel
        )

    @property
    def block(self) -> str:
        """The configuration in short: block sizes that the kernel has, warps, stages, per_sm."""
        return described(self.config)

    @property
    def dtype_name(self) -> str:
        """Such as ``bf16``."""
        return "tf32" if self.tf32 else DTYPE_NAMES[self.dtype]

    @property
    def variant(self) -> str:
        """What else was asked for, in a few words."""
        words = {"bias": self.bias, "dropout": self.dropout_p > 0, "fp32 A,B": self.wide}
        words[f"scale {self.scale}"] = self.scale != SCALE
        return ", ".join([f"rank {self.shape.r}", *(word for word, on in words.items() if on)])

    def operands(self, device: torch.device) -> Tensors:
        """What the launcher and the statement read, drawn with a fixed seed unless on meta."""
        (m, n, k, r), dtype = self.shape, self.dtype
        factor = torch.float32 if self.wide else dtype
        draw = Draw(device)
        made: Tensors = {}
        if self.kernel in PRODUCTS:
            q = draw(k, n, dtype=dtype, over=k) if self.dx else draw(n, k, dtype=dtype, over=k).t()
            v = draw(r, n, dtype=factor, over=r)
            v = v if self.dx else v.t().contiguous().t()  # B itself is [N, R]
            made |= {"p": draw(m, k, dtype=dtype), "q": q, "u": draw(m, r, dtype=dtype), "v": v}
            if self.dropout_p:
                made["keep"] = draw.keep(m, n, self.dropout_p)
        else:
            made["x"] = draw(m, k, dtype=dtype)
            made["xa"] = draw(m, r, dtype=dtype)  # for da, dxa
            made["a"] = draw(r, k, dtype=factor, over=k)
            if self.kernel in ("one_kernel", "dxa_db"):
                made["weight"] = draw(n, k, dtype=dtype, over=k)
                made["dy"] = draw(m, n, dtype=dtype)
                made["b"] = draw(n, r, dtype=factor, over=r)
            if self.dropout_p:
                made["seed"] = draw.seed()
                made["keep"] = keep_mask(made["seed"], m, k, self.dropout_p)
        if self.bias:
            made["bias"] = draw(n, dtype=dtype)
        return made

    def run(self, t: Tensors) -> Tensors:
        """Call the launcher; masks as of `state`, an element each."""
        if "keep" in t:
            t = {**t, "bits": pack_bits(t["keep"])}
        return without_bits(self.launch(t), self.shape.k)

    def launch(self, t: Tensors) -> Tensors:
        """Call the launcher and nothing else; masks packed, as ``bits`` in ``t``."""
        config, p, bits = self.config, self.dropout_p, t.get("bits")
        bias, seed = t.get("bias"), t.get("seed")
        out: dict[str, Tensor | None]
        if self.kernel in PRODUCTS:
            operands = [t["u"], t["v"]] if self.kernel == "expand" else [t[i] for i in "pquv"]
            launcher = PRODUCTS[self.kernel]
            options = {"bias": bias, "scale": self.scale, "keep_bits": bits, "dropout_p": p}
            out = {"dx" if self.dx else "y": launcher(*operands, **options, config=config)}
        elif self.kernel == "xa":
            made, drawn = xa.compute_xa(t["x"], t["a"], seed, p, config=config)
            out = {"xa": made, "keep": drawn}
        elif self.kernel == "one_kernel":
            y, made, drawn = forward.one_kernel(
                t["x"], t["weight"], t["a"], t["b"], bias, self.scale, seed, p, config=config
            )
            out = {"y": y, "xa": made, "keep": drawn}
        elif self.kernel == "dxa_db":
            dxa, db, dbias = dxa_db.compute_dxa_db(
                t["dy"], t["b"], t["xa"], self.scale, need_dbias=self.bias, config=config
            )
            out = {"dxa": dxa, "db": db, "dbias": dbias}
        else:
            dtype = t["a"].dtype
            out = {"da": compute_da(t["xa"], t["x"], bits, p, dtype=dtype, config=config)}
        return {name: made for name, made in out.items() if made is not None}

    def state(self, t: Tensors) -> Tensors:
        """The same in plain torch, in the operands' dtype."""
        p, keep, bias = self.dropout_p, t.get("keep"), t.get("bias")
        if self.kernel in PRODUCTS:
            u, v = t["u"], t["v"].to(t["u"].dtype)
            out = torch.zeros_like(u @ v) if self.kernel == "expand" else t["p"] @ t["q"]
            out = out if bias is None else out.add_(bias)
            if keep is None:
                out.addmm_(u, v, alpha=self.scale)
            else:
                out.add_(drop((u @ v).mul_(self.scale), keep, p))
            return {"dx" if self.dx else "y": out}
        if self.kernel in ("xa", "one_kernel"):
            x, a = t["x"], t["a"]
            masked = {} if keep is None else {"keep": keep}
            if self.kernel == "xa":
                dropped = x if keep is None else drop(x, keep, p)
                return {"xa": dropped @ a.to(x.dtype).t(), **masked}
            y, xa = reference.forward(x, t["weight"], a, t["b"], bias, self.scale, keep, p)
            return {"y": y, "xa": xa, **masked}
        if self.kernel == "dxa_db":
            needs = reference.Needs(False, False, False, True, self.bias)
            operands = t["dy"], t["x"], t["weight"], t["a"], t["b"], t["xa"]
            grads = reference.backward(*operands, self.scale, None, 0.0, needs)
            dxa = (t["dy"] @ t["b"].to(t["dy"].dtype)).mul_(self.scale)
            found = {"dxa": dxa, "db": grads.db, "dbias": grads.dbias}
            return {name: grad for name, grad in found.items() if grad is not None}
        dropped = t["x"] if keep is None else drop(t["x"], keep, p)
        return {"da": (t["xa"].t() @ dropped).to(t["a"].dtype)}


@dataclass(frozen=True)
class LayerCase:
    """A whole LoRA linear, forward and every gradient, by strategies named for forward and dx."""

    forward: str
    dx: str
    capability: tuple[int, int]
    dtype: torch.dtype
    shape: Shape
    bias: bool = False
    dropout_p: float = 0.0
    wide: bool = False
    tf32: bool = False
    scale: float = SCALE

    block = "whole layer"
    dtype_name = Case.dtype_name
    variant = Case.variant

    @property
    def name(self) -> str:
        """The two strategies."""
        return f"{self.forward} + {self.dx}"

    @property
    def refusal(self) -> str:
        """Why the strategies cannot serve this case, empty where they do."""
        m, n, k, r = self.shape
        dropped, tma = self.dropout_p > 0, n % 8 == 0 == k % 8
        try:
            with tuning.use_strategy(self.forward, self.dx):
                for role, shape in (("forward", self.shape), ("dx", Shape(m, k, n, r))):
                    # The size of the GPU is of no meaning to a strategy that is forced.
                    tuning.strategy(
                        role, self.capability, self.dtype, shape, dropped=dropped, tma=tma, sms=1
                    )
        except RuntimeError as refusal:
            return str(refusal)
        return ""

    def operands(self, device: torch.device) -> Tensors:
        """As `Case.operands`."""
        (m, n, k, r), dtype, draw = self.shape, self.dtype, Draw(device)
        factor = torch.float32 if self.wide else dtype
        made = {
            "x": draw(m, k, dtype=dtype),
            "weight": draw(n, k, dtype=dtype, over=k),
            "a": draw(r, k, dtype=factor, over=k),
            "b": draw(n, r, dtype=factor, over=r),
            "dy": draw(m, n, dtype=dtype),
        }
        if self.bias:
            made["bias"] = draw(n, dtype=dtype)
        if self.dropout_p:
            made["seed"] = draw.seed()
            made["keep"] = keep_mask(made["seed"], m, k, self.dropout_p)
        return made

    def run(self, t: Tensors) -> Tensors:
        """Forward and backward by the strategies."""
        operands = t["x"], t["weight"], t["a"], t["b"]
        p, seed, needs = self.dropout_p, t.get("seed"), self._needs()
        with tuning.use_strategy(self.forward, self.dx):
            y, xa, bits = forward.forward(
                *operands, t.get("bias"), self.scale, seed, p, self.capability
            )
            grads = backward.backward(
                t["dy"], *operands, xa, self.scale, bits, p, needs, self.capability
            )
        return without_bits(
            _named(y, xa, grads) | ({} if bits is None else {"keep": bits}), self.shape.k
        )

    def state(self, t: Tensors) -> Tensors:
        """The same in plain torch."""
        operands = t["x"], t["weight"], t["a"], t["b"]
        p, keep = self.dropout_p, t.get("keep")
        y, xa = reference.forward(*operands, t.get("bias"), self.scale, keep, p)
        grads = reference.backward(t["dy"], *operands, xa, self.scale, keep, p, self._needs())
        return _named(y, xa, grads) | ({} if keep is None else {"keep": keep})

    def _needs(self) -> reference.Needs:
        return reference.Needs(True, True, True, True, self.bias)


class Draw:
    """Normal numbers of unit size, or of one over the root of ``over``, on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.generator: torch.Generator | None = None
        if device.type != "meta":
            self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, dtype: torch.dtype, over: int = 1) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return (drawn / over**0.5).to(dtype)

    def keep(self, rows: int, cols: int, dropout_p: float) -> Tensor:
        drawn = torch.rand(rows, cols, generator=self.generator, device=self.device)
        return drawn >= dropout_p

    def seed(self) -> Tensor:
        return torch.randint(2**63 - 1, (1,), generator=self.generator, device=self.device)


def _named(y: Tensor, xa: Tensor, grads: reference.Grads) -> Tensors:
    found = {"y": y, "xa": xa} | grads._asdict()
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def without_bits(out: Tensors, cols: int) -> Tensors:
    """The same with the keep bits unpacked."""
    if "keep" in out:
        out["keep"] = unpack_bits(out["keep"], cols)
    return out


def drop(x: Tensor, keep: Tensor, dropout_p: float) -> Tensor:
    """``x`` as dropout with this mask leaves it."""
    return torch.where(keep, x * (1.0 / (1.0 - dropout_p)), 0.0)
