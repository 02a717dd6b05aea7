"""Linears that are computed together, under DDP and fully_shard: the same training as alone."""

from __future__ import annotations

import pytest
import torch
from tiny_sharded import EXACT, data, on_two
from torch import nn

from lora_kernels import apply_lora, lora_parameters, lora_state_dict, mark_only_lora_as_trainable
from lora_kernels.group import siblings as room


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(5, 6), nn.Linear(5, 6, bias=False), nn.Linear(5, 5)
        self.o = nn.Linear(5, 5)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.o(torch.tanh(v) * (q * k).sum(-1, keepdim=True))


def adapted(group):
    room._LEAST_ROWS_ON_CPU = 0
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block()).double()
    apply_lora(model, 3, alpha=6, target_modules="all-linear", verbose=False, group=group)
    mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn_like(parameter))
    return model


def train(model, rows):
    """Three steps on these rows, and whether groups were at work in the first."""
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    for _ in range(3):
        y = model(data()[rows])
        seen, waiting = set(), [y.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is not None and node not in seen:
                seen.add(node)
                waiting += [following for following, _ in node.next_functions]
        y.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return sum(node.name() == "_GroupBackward" for node in seen)


@pytest.fixture(scope="module")
def trained():
    before = room._LEAST_ROWS_ON_CPU
    model = adapted(False)
    assert train(model, slice(None)) == 0
    room._LEAST_ROWS_ON_CPU = before
    return lora_state_dict(model)


def by_one(way):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, world = dist.get_rank(), dist.get_world_size()
    model = adapted(True)
    rows = slice(rank * 8 // world, (rank + 1) * 8 // world)
    if way == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(model)
        return train(wrapped, rows), lora_state_dict(model)
    mesh = init_device_mesh("cpu", (world,))
    for block in model:
        for linear in (block.q, block.k, block.v) if way == "single linears" else ():
            fully_shard(linear, mesh=mesh)
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return train(model, rows), lora_state_dict(model)


@pytest.mark.slow
@pytest.mark.parametrize(("way", "grouped"), [("ddp", 2), ("blocks", 2), ("single linears", 0)])
def test_trained_by_two_processes(way, grouped, trained):
    """Where each linear is sharded by itself, the others' weights are not there to be used."""
    for groups, state in on_two(by_one, way):
        assert groups == grouped
        assert state.keys() == trained.keys()
        for key in trained:
            torch.testing.assert_close(state[key], trained[key], **EXACT)
