"""A small model that two processes share."""

from __future__ import annotations

import torch
import torch.distributed as dist
from tiny_processes import results
from torch import nn

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums are only taken in another order
FILES = ("adapter.safetensors", "adapter.pth", "adapter")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), Block(), Block(), nn.Linear(6, 3), nn.Tanh()).double()


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model[1:3]:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def data():
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(3)).double()


def joined(function, *arguments):
    """Run by each process: ``function(*arguments)`` inside a group."""
    dist.init_process_group("gloo")
    answer = function(*arguments)
    dist.destroy_process_group()
    return answer


def on_two(function, *arguments):
    return results(joined, function, *arguments)
