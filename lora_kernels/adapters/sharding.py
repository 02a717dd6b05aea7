"""Adapters of a model that is spread over processes.

By FSDP2's ``fully_shard`` it may be saved and loaded as it stands. DeepSpeed's ZeRO-3 empties every
parameter between its uses, and FSDP1 makes one flat parameter of many: there it is said what to do.

FSDP2's parameters are DTensors: gathered to be saved, cut to be loaded. After a forward it may
leave a module's parameters gathered, as plain tensors that it throws away later: what reads or
writes parameters calls `reshard` first. torch's modules are looked up, not imported: importing
them takes half a second, and where nobody has, no model is sharded.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from torch import Tensor, nn


def reshard(model: nn.Module) -> None:
    """Make FSDP's gathered parameters of ``model`` sharded ones again; nothing without FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds a part of ``tensor`` only (or a copy that others hold too)."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """``tensor`` itself, or, of a sharded one, all of it: a call that every process must make."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def cut_like(like: Tensor, tensor: Tensor) -> Tensor:
    """``tensor``, which is whole, in the dtype and on the device of ``like``, sharded as that is.

    Each process cuts its own part out of what it has; nothing is exchanged.
    """
    tensor = tensor.to(like.device, like.dtype)
    if not is_sharded(like):
        return tensor
    distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
    return distribute(tensor, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def is_writer(tensors: Iterable[Tensor]) -> bool:
    """Whether this process is the one to write what all have gathered: the first of their mesh.

    True where nothing is sharded: there, who writes is the caller's to say.
    """
    mesh = next((t.device_mesh for t in tensors if is_sharded(t)), None)  # type: ignore[attr-defined]
    return mesh is None or not any(mesh.get_coordinate() or ())


def is_emptied(tensor: Tensor) -> bool:
    """Whether DeepSpeed's ZeRO-3 holds the values of a parameter elsewhere."""
    shape = getattr(tensor, "ds_shape", None)
    return shape is not None and tuple(tensor.shape) != tuple(shape)


def gathering(parameters: str) -> str:
    """What to do where `is_emptied`, with the parameters as one may write them."""
    return (
        f"do this inside `with deepspeed.zero.GatheredParameters({parameters}, modifier_rank=0):`, "
        "which every process must enter"
    )


def refuse_emptied(named: Mapping[str, Tensor], parameters: str) -> None:
    """Raise ValueError where one of these is emptied; ``parameters`` as for `gathering`."""
    for name, tensor in named.items():
        if is_emptied(tensor):
            raise ValueError(f"{name!r} is emptied by DeepSpeed's ZeRO-3; {gathering(parameters)}")


def refuse_flattened(name: str, weight: Tensor) -> None:
    """Raise ValueError where FSDP1 has made a factor part of one flat parameter."""
    if is_sharded(weight) or weight.is_meta:
        return
    freed = weight.numel() > 0 and weight.untyped_storage().nbytes() == 0
    if weight.dim() < 2 or freed:
        raise ValueError(
            f"the factors of {name!r} are flattened by FullyShardedDataParallel; shard with "
            "torch.distributed.fsdp.fully_shard, or, with use_orig_params=True, do this inside "
            "FullyShardedDataParallel.summon_full_params(model)"
        )


def refuse_sharded(name: str, weight: Tensor, remedy: str) -> None:
    """Raise ValueError where a weight is sharded and what was asked for needs all of it."""
    if is_sharded(weight):
        raise ValueError(f"{name!r} is sharded over processes; {remedy}")
