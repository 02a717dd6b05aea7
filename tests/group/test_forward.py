"""Forward of a group by every strategy, against the reference in float64."""

from __future__ import annotations

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES, seed_of
from kernel_groups import MEMBERS

from lora_kernels.group import forward as kernels
from lora_kernels.group import reference
from lora_kernels.kernels import tuning
from lora_kernels.kernels.dropout import keep_mask, pack_bits
from lora_kernels.kernels.launching import recording

STRATEGIES = tuning.STRATEGIES["forward"]


def capability_of(device):
    return torch.cuda.get_device_capability() if device == "cuda" else (9, 0)


def needs_tma(device, group):
    if device == "cuda" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Hopper kernel needs compute capability 9.0")
    if any(len(weight) % 8 for weight in group.weights):
        pytest.skip("these outputs do not suit TMA, see below")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("members", MEMBERS.values(), ids=MEMBERS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy(name, members, packed, dropout_p, device, poisoned):
    if name == "aten" and dropout_p:
        pytest.skip("this strategy takes no dropout, see test_tuning")
    group = kernel_groups.make(
        members, torch.bfloat16, device, m=70, factors=torch.float32, packed=packed
    )
    if name == "one_kernel" and max(group.ranks) > tuning.ONE_KERNEL_RANK:
        pytest.skip("it holds ranks up to 64, see test_tuning")
    if name == "hopper":
        needs_tma(device, group)
    seed = seed_of(5, device) if dropout_p else None
    keep = keep_mask(seed, 70, 56, dropout_p) if dropout_p else None
    arguments = group.x, *group.kinds, group.scales, seed, dropout_p, capability_of(device)
    with tuning.use_strategy(forward=name):
        ys, xa, bits = kernels.forward(*arguments)
        again = kernels.forward(*arguments)
    narrow = group.to(torch.bfloat16)
    wide = narrow.to(torch.float64)
    plain = reference.forward(narrow.x, *narrow.kinds, group.scales, keep, dropout_p)
    truth = reference.forward(wide.x, *wide.kinds, group.scales, keep, dropout_p)
    kernel_groups.close_all(("y", "xa"), (ys, xa), plain, truth)
    for one, other in zip((*ys, xa), (*again[0], again[1]), strict=True):
        assert torch.equal(one, other)
    assert (bits is None) if keep is None else torch.equal(bits, pack_bits(keep))
    one_buffer = packed and name in ("beta1", "aten") and len(members) > 1
    assert (len({y.untyped_storage().data_ptr() for y in ys}) < len(ys)) == one_buffer


@pytest.mark.interpreted
@pytest.mark.parametrize("packed", [False, True])
def test_no_member_with_lora(packed, poisoned):
    members = ((8, None, True), (16, None, False))
    group = kernel_groups.make(members, torch.float32, "cpu", packed=packed)
    ys, xa, bits = kernels.forward(group.x, *group.kinds, group.scales, None, 0.0, (9, 0))
    assert xa is None and bits is None
    for y, weight, bias in zip(ys, group.weights, group.biases, strict=True):
        torch.testing.assert_close(y, torch.nn.functional.linear(group.x, weight, bias))


@pytest.mark.interpreted
def test_factors_of_several_dtypes(poisoned):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.float16, "cpu")
    group.lora_as[1], group.lora_bs[2] = group.lora_as[1].float(), group.lora_bs[2].float()
    for name in STRATEGIES:
        with tuning.use_strategy(forward=name):
            found = kernels.forward(group.x, *group.kinds, group.scales, None, 0.0, (9, 0))
        narrow = group.to(torch.float16)
        wide = narrow.to(torch.float64)
        plain = reference.forward(narrow.x, *narrow.kinds, group.scales, None, 0.0)
        truth = reference.forward(wide.x, *wide.kinds, group.scales, None, 0.0)
        kernel_groups.close_all(("y", "xa"), found[:2], plain, truth)


@pytest.mark.interpreted
def test_weights_of_differing_strides_go_to_products_that_take_them(poisoned):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.float32, "cpu")
    arguments = *group.kinds[1:], group.scales, None, 0.0, (9, 0)
    turned = [group.weights[0].t().contiguous().t(), *group.weights[1:]]
    for name in ("beta1", "aten"):
        with tuning.use_strategy(forward=name):
            ys, *_ = kernels.forward(group.x, turned, *arguments)
            same, *_ = kernels.forward(group.x, group.weights, *arguments)
        for one, other in zip(ys, same, strict=True):
            torch.testing.assert_close(one, other)
    for name in ("one_kernel", "fused", "hopper"):
        with (
            tuning.use_strategy(forward=name),
            pytest.raises(RuntimeError, match="differ in their strides"),
        ):
            kernels.forward(group.x, turned, *arguments)


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("fused", ["xa_kernel", "group_gemm_kernel"]),
        ("beta1", ["xa_kernel", "group_gemm_kernel"]),
        ("hopper", ["xa_kernel", "group_hopper_kernel"]),
        ("one_kernel", ["group_one_kernel_kernel"]),
    ],
)
def test_one_launch_serves_all_members(name, names):
    group = kernel_groups.make(MEMBERS["q, k, v"], torch.bfloat16, "meta", m=8192)
    with recording(132) as launches, tuning.use_strategy(forward=name):
        kernels.forward(group.x, *group.kinds, group.scales, None, 0.0, (9, 0))
    assert [launch.kernel.__name__ for launch in launches] == names


@pytest.mark.interpreted
@pytest.mark.parametrize("moved", ["x", "weight", "width"])
def test_what_does_not_suit_tma(moved):
    members = ((72, 16, True), (20 if moved == "width" else 24, 16, False))
    group = kernel_groups.make(members, torch.float16, "cpu")

    def off(tensor):
        return torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:].view(tensor.shape)

    x = off(group.x) if moved == "x" else group.x
    if moved == "weight":
        group.weights[1] = off(group.weights[1])
    arguments = group.scales, None, 0.0, (9, 0)
    with (
        tuning.use_strategy(forward="hopper"),
        pytest.raises(RuntimeError, match="do not suit TMA"),
    ):
        kernels.forward(x, *group.kinds, *arguments)
