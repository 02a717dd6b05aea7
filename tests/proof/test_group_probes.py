"""Which calls of groups are checked and compiled: all that the table can give."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")

from lora_kernels.kernels import tuning
from lora_kernels.kernels.tiles import block_of
from lora_kernels.kernels.tuning import Shape
from lora_kernels.proof import cases, check, group_probes
from lora_kernels.proof.commands import TARGETS

FULL = {"quick": False, "tf32": True}


def drawn(capability, count):
    """Kernels, dtypes and shapes, each with what the table has for it."""
    draw = random.Random(0)
    for _ in range(count):
        sizes = [int(2 ** draw.uniform(0, 15)) for _ in range(3)]
        kernel, dtype = draw.choice(tuning.GROUP_KERNELS), draw.choice(list(cases.DTYPE_NAMES))
        rank = draw.randint(1, min(256, cases.MOST_RANK.get(kernel, 256)))
        try:
            config = tuning.lookup(kernel, capability, dtype.itemsize, Shape(*sizes, rank))
        except LookupError:
            assert kernel in group_probes.HOPPER
            continue
        yield kernel, dtype, config, rank


def test_every_kernel_of_groups_in_every_dtype_with_all_it_can_take_along():
    found = group_probes.group_kernel_cases((9, 0), check.ON_GPU, **FULL)
    kinds = {(case.kernel, case.dtype_name) for case in found}
    assert kinds == {
        (kernel, dtype)
        for kernel in tuning.GROUP_KERNELS
        for dtype in ("bf16", "fp16", "fp32", "tf32")
        if not (kernel in group_probes.HOPPER and dtype in ("fp32", "tf32"))
    }
    for kernel in tuning.GROUP_KERNELS:
        of_kernel = [case for case in found if case.kernel == kernel]
        masked = kernel in group_probes.MASKED
        assert {case.dropout_p > 0 for case in of_kernel} == ({False, True} if masked else {False})
        assert {case.members for case in of_kernel} == {2, 3, 4}
        assert {case.lacking for case in of_kernel} == {False, True}


@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (10, 0), (12, 0)], ids=str)
def test_every_configuration_that_a_call_can_get_is_among_the_cases(capability):
    checked = {
        (case.kernel, case.dtype, case.config)
        for case in group_probes.group_kernel_cases(capability, check.ON_GPU, **FULL)
    }
    for kernel, dtype, config, _ in drawn(capability, 2000):
        assert (kernel, dtype, config) in checked


@pytest.mark.parametrize("target", TARGETS)
def test_every_configuration_that_a_call_can_get_is_compiled(target):
    capability, _ = TARGETS[target]
    swept = {
        (case.kernel, case.dtype, case.config, block_of(case.shape.r))
        for case in group_probes.group_sweep_cases(capability)
    }
    for kernel, dtype, config, rank in drawn(capability, 1000):
        tile = block_of(rank)
        if dtype != cases.NARROW[0]:  # the others are compiled at the widest tile alone
            tile = max(b for k, d, c, b in swept if (k, d, c) == (kernel, dtype, config))
        assert (kernel, dtype, config, tile) in swept


def test_products_that_unroll_their_members_are_compiled_for_every_number_of_them():
    swept = group_probes.group_sweep_cases((9, 0))
    for kernel in (*group_probes.HOPPER, "group_dx"):
        assert {case.members for case in swept if case.kernel == kernel} == {2, 3, 4}
    looks = [case for case in swept if case.kernel == "group_y_hopper"]
    assert {(case.members, case.scale == cases.EXACT_SCALE) for case in looks} == {
        (members, exact) for members in (2, 3, 4) for exact in (False, True)
    }


def test_every_strategy_of_groups_whole_and_packed_or_not():
    found = group_probes.group_layer_cases((9, 0), check.ON_GPU, **FULL)
    assert {case.forward for case in found} == set(tuning.STRATEGIES["forward"])
    assert {case.dx for case in found} == set(tuning.STRATEGIES["dx"])
    assert {case.packed for case in found} == {False, True}
    refused = {case.forward for case in found if case.refusal}
    assert refused == {"hopper", "aten"}  # float32, and dropout


def test_a_pack_has_the_groups_that_are_looked_at_first():
    found = group_probes.group_pack_cases((9, 0), check.ON_GPU)
    widths = {tuple(case.ns) for case in found}
    assert {(4096, 1024, 1024), (14336, 14336)} <= widths
    assert not [case for case in found if getattr(case, "refusal", "")]
    assert {case for case in found if hasattr(case, "kernel")} == set(
        group_probes.group_kernel_cases((9, 0), check.ON_GPU, **FULL)
    )
