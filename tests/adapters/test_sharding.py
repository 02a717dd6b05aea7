"""Adapters under DDP, fully_shard and FSDP1: trained, saved, loaded, refused."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from tiny_sharded import EXACT, FILES, base, data, on_two, sharded
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
    save_lora,
)


def adapted(rank=3):
    """Rank 3 does not divide among two processes; the first and last linear are the root's own."""
    model = base()
    apply_lora(model, rank, alpha=6, target_modules=["0", "up", "down", "3"], verbose=False)
    mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.copy_(torch.randn_like(parameter))
    return model


def train(model, rows):
    """Three steps of Adam on these rows of the data; the parameters are looked up afterwards."""
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=0.1)
    for _ in range(3):
        model(data()[rows]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture(scope="module")
def trained():
    """What one process makes of all the rows: the model and its adapter."""
    model = train(adapted(), slice(None))
    return model, lora_state_dict(model)


# --- DistributedDataParallel ----------------------------------------------------------------------


def under_ddp(path):
    rank = dist.get_rank()
    model = nn.parallel.DistributedDataParallel(adapted())
    train(model, slice(rank, None, 2))
    if rank == 0:
        save_lora(model, path)
    dist.barrier()
    fresh = nn.parallel.DistributedDataParallel(adapted())
    load_lora(fresh, path)
    with torch.no_grad():
        return lora_state_dict(fresh), fresh(data())


def test_ddp(trained, tmp_path):
    model, expected = trained
    for state, y in on_two(under_ddp, tmp_path / "adapter.safetensors"):
        torch.testing.assert_close(state, expected, **EXACT)
        torch.testing.assert_close(y, model(data()), **EXACT)
    loaded = base()
    load_lora(loaded, tmp_path / "adapter.safetensors")
    torch.testing.assert_close(lora_state_dict(loaded), expected, **EXACT)


# --- fully_shard ----------------------------------------------------------------------------------


def train_and_save(folder):
    model = sharded(adapted())
    with torch.no_grad():
        model(data())  # leaves the root's parameters gathered, which are not those to train
    train(model, slice(dist.get_rank(), None, 2))
    with torch.no_grad():
        model(data())  # nor those to save
    for name in FILES:
        save_lora(model, folder / name)
    dist.barrier()  # the first has written all when it comes here
    state = lora_state_dict(model)
    with torch.no_grad():
        # Others than those in the file; the root's own are gathered again.
        fresh = sharded(adapted())
        for parameter in lora_parameters(fresh):
            parameter.mul_(0)
        fresh(data())
        answers = []
        for name in FILES:
            load_lora(fresh, folder / name)
            answers.append(fresh(data()))
            for parameter in lora_parameters(fresh):
                parameter.mul_(0)
            fresh(data())
    return state, answers


def test_fully_shard(trained, tmp_path):
    model, expected = trained
    for state, answers in on_two(train_and_save, tmp_path):
        torch.testing.assert_close(state, expected, **EXACT)
        for y in answers:
            torch.testing.assert_close(y, model(data()), **EXACT)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        loaded = base()
        load_lora(loaded, tmp_path / name)
        torch.testing.assert_close(lora_state_dict(loaded), expected, **EXACT)


def writes(folder):
    """Each process saves to a directory of its own, to see who writes."""
    model, own = sharded(adapted()), folder / str(dist.get_rank())
    own.mkdir()
    for name in FILES:
        save_lora(model, own / name)


def test_the_first_process_writes(tmp_path):
    on_two(writes, tmp_path)
    assert sorted(p.name for p in (tmp_path / "0").iterdir()) == sorted(FILES)
    assert list((tmp_path / "1").iterdir()) == []


def attempts(path):
    """What a sharded model refuses, and what it is afterwards."""
    bare, model = sharded(base()), sharded(adapted())
    x = data()
    with torch.no_grad():
        before, plain = model(x), bare(x)
    said = []
    for act in (
        lambda: apply_lora(bare, 2, target_modules=["0"]),
        lambda: apply_lora(bare, 2, target_modules=["up"]),
        lambda: load_lora(bare, path),
        lambda: merge_lora(model),
        lambda: merged_lora(model).__enter__(),
        lambda: remove_lora(model),
    ):
        with torch.no_grad():
            model(x)
        try:
            act()
        except ValueError as error:
            said.append((type(error), str(error)))
    with torch.no_grad():
        with disable_lora(model):
            disabled = model(x)
        same = torch.equal(model(x), before) and torch.equal(bare(x), plain)
    return said, same, torch.equal(disabled, plain)


def test_what_a_sharded_model_refuses(tmp_path):
    save_lora(adapted(), tmp_path / "adapter.pth")
    first = "put LoRA into the model first, then fully_shard it"
    elsewhere = "save_lora, and load_lora into a model that is not"
    for said, same, disabled in on_two(attempts, tmp_path / "adapter.pth"):
        assert same and disabled
        assert said[:2] == [
            (ValueError, f"'0' is sharded over processes; {first}"),
            (ValueError, f"'1.up' is sharded over processes; {first}"),
        ]
        kind, message = said[2]
        assert kind is AdapterMismatchError
        assert "'0' is sharded already; load the adapter before fully_shard" in message
        assert said[3:] == [(ValueError, f"'0' is sharded over processes; {elsewhere}")] * 3


# --- FSDP1 ----------------------------------------------------------------------------------------


def flattened(folder):
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    said = []
    for keep in (False, True):
        model = adapted()
        if not keep:
            model.requires_grad_(True)
        model = FSDP(model, use_orig_params=keep, device_id=torch.device("cpu"))
        for act in (save_lora, load_lora):
            try:
                act(model, folder / "adapter.pth")
            except ValueError as error:
                said.append(str(error))
    with FSDP.summon_full_params(model):
        return said, copy.deepcopy(lora_state_dict(model))


def test_fsdp1_is_refused_or_summoned(tmp_path):
    save_lora(adapted(), tmp_path / "adapter.pth")
    for said, state in on_two(flattened, tmp_path):
        assert len(said) == 4
        for message in said:
            assert message.startswith("the factors of '0' are flattened by FullyShardedData")
        torch.testing.assert_close(state, lora_state_dict(adapted()), **EXACT)
