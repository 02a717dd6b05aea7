"""Backward of a group by every strategy, against the reference in float64."""

from __future__ import annotations

import itertools

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES, seed_of
from kernel_groups import MEMBERS

from lora_kernels.group import backward as kernels
from lora_kernels.group import reference
from lora_kernels.group.reference import GroupGrads, GroupNeeds
from lora_kernels.kernels import plans, tuning
from lora_kernels.kernels.dropout import keep_mask, pack_bits
from lora_kernels.kernels.launching import recording

STRATEGIES = tuning.STRATEGIES["dx"]


def needs_of(group, x=True, weights=True, lora_as=True, lora_bs=True, biases=True):
    """For every member that has one."""
    asked = (
        tuple(needed and one is not None for one in kind)
        for needed, kind in zip((weights, lora_as, lora_bs, biases), group.kinds, strict=True)
    )
    return GroupNeeds(x, *asked)


def calls(group, xa, keep, dropout_p, needs):
    """Arguments of the reference in the dtype of x, and in float64."""
    narrow = group.to(group.x.dtype)
    for of, rank in ((narrow, xa), (narrow.to(torch.float64), xa.double())):
        weights, lora_as, lora_bs, _ = of.kinds
        operands = of.dys, of.x, weights, lora_as, lora_bs, rank
        yield (*operands, group.scales, keep, dropout_p, needs)


def check(group, name, needs, dropout_p=0.0, device="cpu", dtype=torch.float32):
    m, k = group.x.shape
    xa = torch.randn(m, sum(group.ranks)).to(device, group.x.dtype)
    keep = keep_mask(seed_of(5, device), m, k, dropout_p) if dropout_p else None
    bits = None if keep is None else pack_bits(keep)
    capability = torch.cuda.get_device_capability() if device == "cuda" else (9, 0)
    operands = group.dys, group.x, *group.kinds[:3], xa, group.scales
    with tuning.use_strategy(dx=name):
        ours = kernels.backward(*operands, bits, dropout_p, needs, capability)
        again = kernels.backward(*operands, bits, dropout_p, needs, capability)
    plain, truth = (
        reference.backward(*arguments) for arguments in calls(group, xa, keep, dropout_p, needs)
    )
    kernel_groups.close_all(GroupGrads._fields, ours, plain, truth)
    for one, other in zip(flat(ours), flat(again), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)
    for kind, of in zip(ours[1:4], group.kinds[:3], strict=True):
        assert all(a is None or a.dtype == b.dtype for a, b in zip(kind, of, strict=True))
    return ours


def needs_tma(device, group):
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    if any(len(weight) % 8 for weight in group.weights):
        pytest.skip("these rows of dy do not suit TMA")


def flat(grads):
    return [grads.dx, *itertools.chain(*grads[1:])]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy(name, members, dropout_p, device, poisoned):
    if name == "aten" and dropout_p:
        pytest.skip("this strategy takes no dropout, see test_tuning")
    group = kernel_groups.make(members, torch.bfloat16, device, m=70, factors=torch.float32)
    if name == "hopper":
        needs_tma(device, group)
    check(group, name, needs_of(group), dropout_p, device)


@pytest.mark.interpreted
@pytest.mark.parametrize("asked", list(itertools.product([False, True], repeat=5)), ids=str)
@pytest.mark.parametrize("members", ["one without LoRA", "long ranks"])
def test_every_kind_of_gradient_alone_and_with_others(members, asked, poisoned):
    group = kernel_groups.make(MEMBERS[members], torch.float32, "cpu")
    check(group, "fused", needs_of(group, *asked))


@pytest.mark.interpreted
@pytest.mark.parametrize("kind", ["weights", "lora_as", "lora_bs", "biases"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gradients_of_some_members(dropout_p, kind, poisoned):
    group = kernel_groups.make(MEMBERS["four of several ranks"], torch.float32, "cpu")
    whole = needs_of(group)
    for some in ((True, False, False, False), (False, False, True, True)):
        asked = tuple(one and two for one, two in zip(getattr(whole, kind), some, strict=True))
        check(group, "fused", whole._replace(**{kind: asked}), dropout_p)


@pytest.mark.interpreted
@pytest.mark.parametrize("members", MEMBERS)
@pytest.mark.parametrize("unused", [0, 1, (0, 1), (0, 2)])
@pytest.mark.parametrize("name", STRATEGIES)
def test_outputs_that_nobody_used(name, unused, members, poisoned):
    unused = (unused,) if isinstance(unused, int) else unused
    group = kernel_groups.make(MEMBERS[members], torch.float16, "cpu")
    if name == "hopper":
        needs_tma("cpu", group)
    dys = [None if i in unused else dy for i, dy in enumerate(group.dys)]
    if all(dy is None for dy in dys):
        pytest.skip("then there is no backward")
    group = group._replace(dys=dys)
    check(group, name, needs_of(group), 0.0 if name == "aten" else 0.3)


STRIDED = {
    "transposed": lambda m, n: torch.randn(n, m).t(),
    "one number expanded": lambda m, n: torch.randn(()).expand(m, n),
    "one row expanded": lambda m, n: torch.randn(1, n).expand(m, n),
    "every other column": lambda m, n: torch.randn(m, 2 * n)[:, ::2],
    "columns of wider rows": lambda m, n: torch.randn(m, n + 7)[:, 3 : n + 3],
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["fused", "beta1"])
@pytest.mark.parametrize("kind", STRIDED)
def test_any_strides_of_dy(kind, name, device, poisoned):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.float32, device)
    dys = [STRIDED[kind](*dy.shape).to(device) for dy in group.dys]
    xa, capability = torch.randn(37, 48, device=device), (9, 0)
    rest = group.x, *group.kinds[:3], xa, group.scales, None, 0.0, needs_of(group), capability
    with tuning.use_strategy(dx=name):
        ours = kernels.backward(dys, *rest)
        same = kernels.backward([dy.contiguous() for dy in dys], *rest)
    for one, other in zip(flat(ours), flat(same), strict=True):
        assert (one is None and other is None) or torch.equal(one, other)


@pytest.mark.interpreted
def test_factors_of_several_dtypes(poisoned):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.float16, "cpu")
    group.lora_as[1], group.lora_bs[2] = group.lora_as[1].float(), group.lora_bs[2].float()
    check(group, "fused", needs_of(group))


@pytest.mark.interpreted
def test_db_taken_apart_is_db(monkeypatch, poisoned):
    group = kernel_groups.make(MEMBERS["one without LoRA"], torch.bfloat16, "cpu", m=70)
    monkeypatch.setattr(kernels, "slabs_outweigh", lambda *_: True)
    plans.clear()
    check(group, "fused", needs_of(group))
    plans.clear()


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("fused", ["group_dxa_db_kernel", "thin_kernel", "sum_gemm_kernel"]),
        ("hopper", ["group_dxa_db_kernel", "thin_kernel", "sum_hopper_kernel"]),
        ("beta1", ["group_dxa_db_kernel", "thin_kernel", "pointer_gemm_kernel"]),
    ],
)
def test_one_launch_serves_all_members(name, names):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.bfloat16, "meta", m=8192)
    xa = torch.empty(8192, 48, dtype=torch.bfloat16, device="meta")
    operands = group.dys, group.x, *group.kinds[:3], xa, group.scales, None, 0.0
    with recording(132) as launches, tuning.use_strategy(dx=name):
        kernels.backward(*operands, needs_of(group), (9, 0))
    kinds = [launch.kernel.__name__ for launch in launches]
    assert [kind for kind in kinds if kind != "sum_partials_kernel"] == names
