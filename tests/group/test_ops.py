"""The operators of groups as torch checks and traces them."""

from __future__ import annotations

import kernel_groups
import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES, seed_of
from kernel_groups import MEMBERS

from lora_kernels import lora_linear_group, use_backend
from lora_kernels.group import ops
from lora_kernels.kernels import tuning
from lora_kernels.kernels.launching import recording

# dynamo itself makes an instance of the Function, which torch deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("packed", [False, True], ids=["apart", "packed"])
@pytest.mark.parametrize("m", [1, 12])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck(dropout_p, m, packed, device):
    group = kernel_groups.make(
        MEMBERS["one without LoRA"], torch.float32, device, m=m, packed=packed
    )
    seed = seed_of(5, device) if dropout_p else None
    arguments = group.x, *group.kinds, seed, group.scales, dropout_p
    torch.library.opcheck(torch.ops.lora_kernels.group_forward.default, arguments)
    _, _, _, xa, *bits = torch.ops.lora_kernels.group_forward(*arguments)
    rest = xa, bits[0] if bits else None, group.scales, dropout_p
    for dys in (group.dys, [None, *group.dys[1:]]):
        operands = dys, group.x, *group.kinds[:3], *rest
        needs = [True, *[True] * 3, *[True, False, True] * 2, True, True, False]
        torch.library.opcheck(torch.ops.lora_kernels.group_backward.default, (*operands, needs))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("strategy", ["fused", "beta1"])
def test_compiles_whole(strategy, device):
    group = kernel_groups.make(
        MEMBERS["q, k, v"], torch.float32, device, m=12, packed=strategy == "beta1"
    )
    leaves = [group.x, *(t for kind in group.kinds[1:3] for t in kind)]

    def call(x, lora_as, lora_bs):
        return lora_linear_group(
            x, group.weights, lora_as, lora_bs, group.biases, scales=group.scales
        )

    def gradients(function):
        inputs = [leaf.clone().requires_grad_() for leaf in leaves]
        ys = function(inputs[0], inputs[1:4], inputs[4:])
        return [*ys, *torch.autograd.grad(ys, inputs, group.dys)]

    with use_backend("triton"), tuning.use_strategy(strategy, strategy):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        pairs = zip(gradients(compiled), gradients(call), strict=True)
        for one, other in pairs:
            torch.testing.assert_close(one, other)


@pytest.mark.interpreted
def test_an_operator_asks_for_no_slices_that_it_would_have_to_copy():
    members = ((16, 4, False), (8, 4, False))
    group = kernel_groups.make(members, torch.float32, "cpu", packed=True)
    rest = None, group.scales, 0.0
    for forward, packed in ((ops.forward, True), (torch.ops.lora_kernels.group_forward, False)):
        with recording() as launches, tuning.use_strategy(forward="beta1"):
            forward(group.x, *group.kinds, *rest)
        found = [launch.arguments for launch in launches if "PACKED" in launch.arguments]
        assert [arguments["PACKED"] for arguments in found] == [packed]
