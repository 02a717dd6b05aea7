"""Modules and tokens trained whole under DDP and fully_shard: as on one process, or refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_processes import results
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    remove_lora,
    save_lora,
)

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums are only taken in another order
FILES = ("adapter.safetensors", "adapter.pth", "adapter")
IDS = torch.tensor([[1, 4, 2], [4, 4, 0], [3, 1, 5], [2, 2, 2]])


def bare():
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh())
    head = nn.Linear(6, 3)
    return nn.Sequential(nn.Embedding(7, 6), body, nn.LayerNorm(6), head, nn.Tanh()).double()


def adapted():
    model = bare()
    apply_lora(
        model,
        3,
        alpha=6,
        target_modules=["1.0", "1.2"],
        modules_to_save=["3"],
        bias="lora_only",
        trainable_token_indices={"0": [4, 1]},
        verbose=False,
    )
    mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn_like(parameter))
    return model


def sharded(model):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model[1], mesh=mesh)
    return fully_shard(model, mesh=mesh)


def in_ddp(model):
    return nn.parallel.DistributedDataParallel(model)


def train(model, rows):
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    for _ in range(3):
        model(IDS[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def joined(function, *arguments):
    dist.init_process_group("gloo")
    answer = function(*arguments)
    dist.destroy_process_group()
    return answer


def train_and_save(wrap, folder):
    model = train(wrap(adapted()), slice(dist.get_rank(), None, 2))
    for name in FILES:
        if wrap is sharded or dist.get_rank() == 0:
            save_lora(model, folder / name)
    dist.barrier()
    state, answers = lora_state_dict(model), []
    for name in FILES:
        fresh = wrap(adapted())
        load_lora(fresh, folder / name)
        with torch.no_grad():
            answers.append(fresh(IDS))
    return state, answers


@pytest.mark.parametrize("wrap", [in_ddp, sharded])
def test_two_processes_make_what_one_makes(tmp_path, wrap):
    model = train(adapted(), slice(None))
    expected = lora_state_dict(model)
    assert {"3.weight", "3.bias", "1.0.bias", "0.lora_tokens.weight"} <= expected.keys()
    for state, answers in results(joined, train_and_save, wrap, tmp_path):
        torch.testing.assert_close(state, expected, **EXACT)
        for y in answers:
            torch.testing.assert_close(y, model(IDS), **EXACT)
    for name in ("adapter.safetensors", "adapter"):
        loaded = bare()
        load_lora(loaded, tmp_path / name)
        torch.testing.assert_close(loaded(IDS), model(IDS), **EXACT)
        with disable_lora(loaded):
            assert torch.equal(loaded(IDS), bare()(IDS))


def said(error, function, *arguments):
    with pytest.raises(error) as caught:
        function(*arguments)
    return str(caught.value)


def enter(context):
    with context:
        pass


def refusals(folder):
    model = sharded(adapted())
    state = lora_state_dict(model)
    messages = [
        said(ValueError, enter, disable_lora(model)),
        said(ValueError, remove_lora, model),
        said(AdapterMismatchError, load_lora, sharded(bare()), folder / "a"),
    ]
    after = lora_state_dict(model)
    assert all(torch.equal(state[key], after[key]) for key in state)
    return messages


def test_what_needs_the_base_is_refused_and_nothing_changes(tmp_path):
    save_lora(adapted(), tmp_path / "a")
    for off, removed, inserted in results(joined, refusals, tmp_path):
        assert "is trained whole and sharded over processes" in off
        assert "sharded over processes" in removed
        assert "'1.0' is sharded already" in inserted
