"""Calls of the launchers of groups on made-up operands, as `cases` has them of single layers."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from ..group import backward, dxa_db, forward, reference
from ..group.one_kernel import group_one_kernel
from ..group.reference import GroupNeeds
from ..kernels import group_gemm, group_hopper, sum_gemm, sum_hopper, tuning
from ..kernels.dropout import keep_mask, pack_bits
from ..kernels.tiles import ceil_div
from ..kernels.tuning import Config, Shape
from .cases import DTYPE_NAMES, SCALE, Draw, Tensors, described, drop, without_bits

# Products with an output a member, and those that add up to one.
MANY = ("group_y", "group_y_hopper", "group_expand")
ONE = ("group_dx", "group_dx_hopper")
FACTORS_ON_SCALE = (1.0, 2.0, -0.5, 1.0)


@dataclass(frozen=True)
class _Group:
    """What both kinds of cases have: how many members, and what they are.

    Attributes:
        dtype, shape, bias, dropout_p, wide, tf32, scale: as of `cases.Case`; the first member has
            ``shape.n`` outputs, the others ``others``. For dx too: n is the width of dy.
        members: how many.
        lacking: the second member has no LoRA.
        others: about a quarter of ``shape.n`` if 0.
    """

    dtype: torch.dtype
    shape: Shape
    bias: bool = False
    dropout_p: float = 0.0
    wide: bool = False
    tf32: bool = False
    scale: float = SCALE
    members: int = 3
    lacking: bool = False
    others: int = 0

    @property
    def dtype_name(self) -> str:
        """Such as ``bf16``."""
        return "tf32" if self.tf32 else DTYPE_NAMES[self.dtype]

    @property
    def variant(self) -> str:
        """What else was asked for, in a few words."""
        words = {"one without LoRA": self.lacking, "bias": self.bias}
        words |= {"dropout": self.dropout_p > 0, "fp32 A,B": self.wide}
        words[f"scale {self.scale}"] = self.scale != SCALE
        asked = [word for word, on in words.items() if on]
        return ", ".join([f"{self.members} members", f"rank {self.shape.r}", *asked])

    @property
    def ns(self) -> list[int]:
        """Outputs of each member."""
        n = self.shape.n
        even = next(size for size in (16, 8, 1) if n % size == 0)
        other = self.others or ceil_div(n, 4 * even) * even
        return [n] + [other] * (self.members - 1)

    @property
    def ranks(self) -> list[int]:
        """Rank of each member, 0 of one without LoRA."""
        return [0 if self.lacking and i == 1 else self.shape.r for i in range(self.members)]

    @property
    def scales(self) -> list[float]:
        """Factor on each member's branch."""
        return [self.scale * factor for factor in FACTORS_ON_SCALE[: self.members]]

    @property
    def spans(self) -> list[slice]:
        """Each member's columns of xa."""
        ends = list(accumulate(self.ranks))
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    @property
    def config_rank(self) -> int:
        """Of all members together."""
        return sum(self.ranks)

    def of_members(self, t: Tensors, name: str) -> list[Tensor | None]:
        """``name0`` and so on, None where there is none."""
        return [t.get(f"{name}{i}") for i in range(self.members)]

    def there(self, t: Tensors, name: str) -> list[Tensor]:
        """The same of what every member has."""
        return [t[f"{name}{i}"] for i in range(self.members)]

    def draw(self, device: torch.device, kinds: str) -> Tensors:
        """Of each member what ``kinds`` names: its w, a, b, dy; and x."""
        (m, _, k, _), dtype, draw = self.shape, self.dtype, Draw(device)
        factor = torch.float32 if self.wide else dtype
        made: Tensors = {}
        for i, (n, r) in enumerate(zip(self.ns, self.ranks, strict=True)):
            if "w" in kinds:
                made[f"w{i}"] = draw(n, k, dtype=dtype, over=k)
            if "a" in kinds and r:
                made[f"a{i}"] = draw(r, k, dtype=factor, over=k)
            if "b" in kinds and r:
                made[f"b{i}"] = draw(n, r, dtype=factor, over=r)
            if "d" in kinds:
                made[f"dy{i}"] = draw(m, n, dtype=dtype)
            if self.bias and i != 1:
                made[f"bias{i}"] = draw(n, dtype=dtype)
        if "x" in kinds:
            made["x"] = draw(m, k, dtype=dtype)
        if "u" in kinds:
            made["xa"] = draw(m, self.config_rank, dtype=dtype)  # for dx, dxa
        if "A" in kinds:
            made["a"] = draw(self.config_rank, k, dtype=factor, over=k)
        if self.dropout_p:
            made["seed"] = draw.seed()
            made["keep"] = keep_mask(made["seed"], m, k, self.dropout_p)
        return made


@dataclass(frozen=True)
class GroupCase(_Group):
    """One call of one launcher of groups; ``kernel`` is of `tuning.GROUP_KERNELS`."""

    kernel: str = ""
    config: Config = Config()

    @property
    def block(self) -> str:
        """The configuration in short."""
        return described(self.config)

    @property
    def name(self) -> str:
        """The kernel."""
        return self.kernel

    def operands(self, device: torch.device) -> Tensors:
        """As `Case.operands`."""
        if self.kernel in MANY:
            return self.draw(device, "wbxu")
        if self.kernel in ONE:
            return self.draw(device, "wduA")
        return self.draw(device, "wbxA" if self.kernel == "group_one_kernel" else "dbu")

    def run(self, t: Tensors) -> Tensors:
        """Call the launcher; masks an element each."""
        return without_bits(self.launch(t), self.shape.k)

    def launch(self, t: Tensors) -> Tensors:
        """Call the launcher and nothing else, but for packing a mask that it reads."""
        config, scales, p = self.config, self.scales, self.dropout_p
        bs, biases = self.of_members(t, "b"), self.of_members(t, "bias")
        if self.kernel in MANY:
            operands = self.there(t, "w"), t["xa"], bs, biases, scales
            if self.kernel == "group_y_hopper":
                ys = group_hopper.group_hopper(t["x"], *operands, config=config)
            else:
                x = None if self.kernel == "group_expand" else t["x"]
                # Packed outputs are what `expand` alone is asked for.
                packed = x is None and self.bias
                ys = group_gemm.group_gemm(x, *operands, packed=packed, config=config)
            return named("y", ys)
        if self.kernel in ONE:
            launcher = sum_gemm.sum_gemm if self.kernel == "group_dx" else sum_hopper.sum_hopper
            bits = pack_bits(t["keep"]) if "keep" in t else None
            given = self.there(t, "dy"), self.there(t, "w"), t["xa"], t["a"]
            return {"dx": launcher(*given, keep_bits=bits, dropout_p=p, config=config)}
        if self.kernel == "group_one_kernel":
            given = t["x"], self.there(t, "w"), t["a"], bs, biases, scales  # type: ignore[assignment]
            ys, xa, bits = group_one_kernel(*given, t.get("seed"), p, config=config)  # type: ignore[arg-type]
            return named("y", ys) | {"xa": xa} | ({} if bits is None else {"keep": bits})
        columns = [span.start for span in self.spans]
        found = dxa_db.compute_group_dxa_db(
            self.there(t, "dy"), bs, t["xa"], columns, scales, need_dbias=self.bias, config=config
        )
        assert found.dxa is not None
        return {"dxa": found.dxa} | named("db", found.dbs) | named("dbias", found.dbiases)

    def state(self, t: Tensors) -> Tensors:
        """The same in plain torch, in the operands' dtype."""
        keep, p = t.get("keep"), self.dropout_p
        masked = {} if keep is None else {"keep": keep}
        if self.kernel in ONE:
            dx = t["xa"] @ t["a"].to(t["xa"].dtype)
            dx = dx if keep is None else drop(dx, keep, p)
            for dy, w in zip(self.there(t, "dy"), self.there(t, "w"), strict=True):
                dx = dx + dy @ w
            return {"dx": dx}
        if self.kernel == "group_one_kernel":
            x, a = t["x"], t["a"]
            xa = (x if keep is None else drop(x, keep, p)) @ a.to(x.dtype).t()
            return named("y", self._ys(t, xa)) | {"xa": xa} | masked
        if self.kernel in MANY:
            return named("y", self._ys(t, t["xa"]))
        found: Tensors = {}
        dxas = []
        for i, (dy, scale, span) in enumerate(
            zip(self.there(t, "dy"), self.scales, self.spans, strict=True)
        ):
            if f"b{i}" in t:
                b = t[f"b{i}"]
                dxas.append((dy @ b.to(dy.dtype)).mul_(scale))
                found[f"db{i}"] = (dy.t() @ t["xa"][:, span]).mul_(scale).to(b.dtype)
            if self.bias:
                wide = torch.float32 if dy.itemsize == 2 else dy.dtype
                found[f"dbias{i}"] = dy.sum(0, dtype=wide).to(dy.dtype)
        return {"dxa": torch.cat(dxas, 1), **found}

    def _ys(self, t: Tensors, xa: Tensor) -> list[Tensor]:
        ys = []
        for i, (w, scale, span) in enumerate(
            zip(self.there(t, "w"), self.scales, self.spans, strict=True)
        ):
            y = xa.new_zeros(len(xa), len(w)) if self.kernel == "group_expand" else t["x"] @ w.t()
            if f"bias{i}" in t:
                y += t[f"bias{i}"]
            if f"b{i}" in t:
                y.addmm_(xa[:, span], t[f"b{i}"].to(xa.dtype).t(), alpha=scale)
            ys.append(y)
        return ys


@dataclass(frozen=True)
class GroupLayerCase(_Group):
    """A whole group, forward and every gradient, by strategies named for forward and dx.

    Its weights lie one below the other if ``packed``.
    """

    forward: str = ""
    dx: str = ""
    capability: tuple[int, int] = (9, 0)
    packed: bool = False

    block = "whole group"

    @property
    def name(self) -> str:
        """The two strategies."""
        return f"group {self.forward} + {self.dx}"

    @property
    def refusal(self) -> str:
        """Why the strategies cannot serve this case, empty where they do."""
        m, _, k, r = self.shape
        n, tma = sum(self.ns), all(size % 8 == 0 for size in (*self.ns, k))
        try:
            with tuning.use_strategy(self.forward, self.dx):
                for role, shape in (("forward", Shape(m, n, k, r)), ("dx", Shape(m, k, n, r))):
                    # The size of the GPU is of no meaning to a strategy that is forced.
                    tuning.strategy(
                        role,
                        self.capability,
                        self.dtype,
                        shape,
                        dropped=self.dropout_p > 0,
                        tma=tma,
                        sms=1,
                    )
        except RuntimeError as refusal:
            return str(refusal)
        return ""

    def operands(self, device: torch.device) -> Tensors:
        """As `Case.operands`."""
        return self.draw(device, "wabxd")

    def run(self, t: Tensors) -> Tensors:
        """Forward and backward by the strategies."""
        weights, p = self.there(t, "w"), self.dropout_p
        if self.packed:
            weights = list(torch.cat(weights).split(self.ns))
        lora_as, lora_bs = self.of_members(t, "a"), self.of_members(t, "b")
        biases, dys = self.of_members(t, "bias"), self.of_members(t, "dy")
        with tuning.use_strategy(self.forward, self.dx):
            operands = weights, lora_as, lora_bs
            ys, xa, bits = forward.forward(
                t["x"], *operands, biases, self.scales, t.get("seed"), p, self.capability
            )
            needs = self._needs(t)
            grads = backward.backward(
                dys, t["x"], *operands, xa, self.scales, bits, p, needs, self.capability
            )
        masked = {} if bits is None else {"keep": bits}
        return without_bits(_named(ys, xa, grads) | masked, self.shape.k)

    def state(self, t: Tensors) -> Tensors:
        """The same in plain torch."""
        operands = self.there(t, "w"), self.of_members(t, "a"), self.of_members(t, "b")
        p, keep = self.dropout_p, t.get("keep")
        ys, xa = reference.forward(
            t["x"], *operands, self.of_members(t, "bias"), self.scales, keep, p
        )
        dys = self.of_members(t, "dy")
        grads = reference.backward(dys, t["x"], *operands, xa, self.scales, keep, p, self._needs(t))
        return _named(ys, xa, grads) | ({} if keep is None else {"keep": keep})

    def _needs(self, t: Tensors) -> GroupNeeds:
        there = ([f"{kind}{i}" in t for i in range(self.members)] for kind in ("a", "b", "bias"))
        return GroupNeeds(True, (True,) * self.members, *map(tuple, there))  # type: ignore[arg-type]


def named(name: str, tensors: object) -> Tensors:
    """``name0`` and so on, without those that are None."""
    return {f"{name}{i}": t for i, t in enumerate(tensors) if t is not None}  # type: ignore[arg-type,var-annotated]


def _named(ys: tuple[Tensor, ...], xa: Tensor | None, grads: reference.GroupGrads) -> Tensors:
    assert xa is not None and grads.dx is not None
    found = named("y", ys) | {"xa": xa, "dx": grads.dx}
    for kind, tensors in zip(("dw", "da", "db", "dbias"), grads[1:], strict=True):
        found |= named(kind, tensors)
    return found
