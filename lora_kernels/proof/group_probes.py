"""Which calls of groups prove their kernels: for `check`, for `resources`, and to be packed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, NamedTuple

import torch

from ..kernels import tuning
from ..kernels.tuning import Config, Shape
from .cases import EXACT_SCALE, NARROW, SCALE, ranks_of, served
from .group_cases import MANY, ONE, GroupCase, GroupLayerCase

HOPPER = ("group_y_hopper", "group_dx_hopper")
MASKED = (*ONE, "group_one_kernel")


class GroupProbe(NamedTuple):
    """As `check.Probe`, and what the group is made of."""

    rank: int
    sizes: str
    dropped: bool
    bias: bool
    wide: bool
    members: int
    lacking: bool


PROBES = (
    GroupProbe(16, "odd", True, True, True, 3, True),
    GroupProbe(16, "round", False, True, False, 3, False),
    GroupProbe(5, "round", True, True, False, 4, True),
    GroupProbe(1, "odd", False, False, True, 2, False),
    GroupProbe(32, "round", True, False, True, 2, False),
    GroupProbe(48, "odd", True, True, False, 3, False),
    GroupProbe(64, "round", False, False, True, 2, True),
    GroupProbe(128, "odd", False, True, False, 2, False),
    GroupProbe(16, "many", True, True, False, 3, False),
)
QUICK_PROBES = PROBES[:3]
LAYER_RANKS = {"odd": 5, "round": 16, "odd_tma": 160}


def _dtypes(quick: bool, tf32: bool) -> list[tuple[torch.dtype, bool]]:
    narrow = [dtype for dtype in NARROW if not (quick and dtype == torch.float16)]
    found = [(dtype, False) for dtype in (*narrow, torch.float32)]
    return [*found, (torch.float32, True)] if tf32 else found


def group_kernel_cases(
    capability: tuple[int, int], sizes: Any, *, quick: bool, tf32: bool
) -> list[GroupCase]:
    """Every configuration of the table in every dtype that it serves, by every probe.

    ``sizes`` are `check.Sizes`.
    """
    cases = []
    for kernel, (dtype, as_tf32) in product(tuning.GROUP_KERNELS, _dtypes(quick, tf32)):
        for probe in QUICK_PROBES if quick else PROBES:
            tma = kernel in HOPPER and probe.sizes == "odd"
            m, n, k = getattr(sizes, "odd_tma" if tma else probe.sizes)
            if probe.sizes == "many" and kernel not in (*MANY, *ONE):
                continue
            for config, _ in served(kernel, capability, dtype.itemsize, probe.rank):
                cases.append(
                    GroupCase(
                        dtype,
                        Shape(m, n, k, probe.rank),
                        bias=probe.bias and kernel not in ONE,
                        dropout_p=0.1 if probe.dropped and kernel in MASKED else 0.0,
                        wide=probe.wide and dtype != torch.float32,
                        tf32=as_tf32,
                        scale=SCALE if probe.dropped else EXACT_SCALE,
                        members=probe.members,
                        lacking=probe.lacking,
                        kernel=kernel,
                        config=config,
                    )
                )
    return list(dict.fromkeys(cases))


def group_layer_cases(
    capability: tuple[int, int], sizes: Any, *, quick: bool, tf32: bool
) -> list[GroupLayerCase]:
    """Every strategy of forward and of dx in every dtype, with dropout and without.

    Some may be refused by `GroupLayerCase.refusal`.
    """
    cases = []
    for (fwd, dx), (dtype, as_tf32), p in product(_pairs(), _dtypes(quick, tf32), (0.0, 0.1)):
        for name, rank in LAYER_RANKS.items():
            m, n, k = getattr(sizes, name)
            if (fwd == "one_kernel" and rank > tuning.ONE_KERNEL_RANK) or (
                fwd == "hopper" and name == "odd"
            ):
                continue
            cases.append(
                GroupLayerCase(
                    dtype,
                    Shape(m, n, k, rank),
                    bias=name != "round",
                    dropout_p=p,
                    wide=name == "round" and dtype != torch.float32,
                    tf32=as_tf32,
                    scale=EXACT_SCALE if name == "round" else SCALE,
                    lacking=name == "odd",
                    forward=fwd,
                    dx=dx,
                    capability=capability,
                    packed=name == "round",
                )
            )
    return cases


def _pairs() -> list[tuple[str, str]]:
    """Each strategy of either side at least once, without all pairs."""
    backwards = tuning.STRATEGIES["dx"]
    forwards = tuning.STRATEGIES["forward"]
    return [(name, name if name in backwards else "fused") for name in forwards]


def group_sweep_cases(capability: tuple[int, int]) -> list[GroupCase]:
    """What `resources.sweep` compiles of groups, by the rules of its own cases.

    Where a member has a branch or a loop of its own, their number makes another kernel.
    """
    cases: list[GroupCase] = []
    dtypes = [
        *((narrow, False) for narrow in NARROW),
        (torch.float32, False),
        (torch.float32, True),
    ]
    for kernel, (dtype, tf32) in product(tuning.GROUP_KERNELS, dtypes):
        ranks: dict[Config, list[Shape]] = {}
        for rank in ranks_of(kernel, capability):
            for config, shape in served(kernel, capability, dtype.itemsize, rank):
                ranks.setdefault(config, []).append(shape)
        for config, shapes in ranks.items():
            every = [
                GroupCase(dtype, shape, tf32=tf32, kernel=kernel, config=config) for shape in shapes
            ]
            exact = kernel == "group_y_hopper"  # no other looks at it
            if dtype == torch.bfloat16:
                cases.append(replace(every[0], scale=EXACT_SCALE) if exact else every[0])
            for case in every if dtype == torch.bfloat16 else every[-1:]:
                loaded = replace(
                    case,
                    bias=kernel not in ONE,
                    dropout_p=0.1 if kernel in MASKED else 0.0,
                    wide=dtype != torch.float32,
                )
                cases += [loaded, replace(loaded, scale=EXACT_SCALE)] if exact else [loaded]
            if kernel in HOPPER or kernel == "group_dx":
                first = cases[-1] if dtype != torch.bfloat16 else every[0]
                cases += [replace(first, members=members) for members in (2, 4)]
                if exact:
                    cases += [
                        replace(first, members=members, scale=EXACT_SCALE, bias=True)
                        for members in (2, 4)
                    ]
    return list(dict.fromkeys(cases))


# Llama-3-8B's q, k, v and gate, up: outputs of the first member and of the others, contraction.
GROUPS = ((4096, 1024, 4096, 3), (14336, 14336, 4096, 2))
TOKENS = (16, 512, 8192)


def group_pack_cases(capability: tuple[int, int], sizes: Any) -> list[GroupCase | GroupLayerCase]:
    """What ``check`` runs of groups on such a GPU, and the groups that are looked at first."""
    options: dict[str, Any] = {"quick": False, "tf32": True}
    layers = group_layer_cases(capability, sizes, **options)
    for (n, others, k, members), m, pair, p in product(GROUPS, TOKENS, _pairs(), (0.0, 0.1)):
        layers.append(
            GroupLayerCase(
                torch.bfloat16,
                Shape(m, n, k, 16),
                dropout_p=p,
                wide=True,
                scale=EXACT_SCALE,
                members=members,
                others=others,
                forward=pair[0],
                dx=pair[1],
                capability=capability,
            )
        )
    cases: list[GroupCase | GroupLayerCase] = [*group_kernel_cases(capability, sizes, **options)]
    return cases + [layer for layer in layers if not layer.refusal]
