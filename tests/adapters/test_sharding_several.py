"""Several adapters under DDP and fully_shard: chosen, trained, saved, loaded, refused."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from tiny_sharded import EXACT, FILES, base, data, on_two, sharded
from torch import nn

from lora_kernels import (
    apply_lora,
    load_lora,
    lora_adapters,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    remove_lora,
    save_lora,
    use_lora,
)

TARGETS = {"default": ["0", "up"], "fr": ["up", "down"], "tone": ["3"]}


def carrying(**settings):
    model = base()
    for rank, (name, targets) in enumerate(TARGETS.items(), 2):
        apply_lora(
            model, rank, alpha=5, target_modules=targets, name=name, verbose=False, **settings
        )
        with torch.no_grad():
            for parameter in lora_parameters(model, name):
                parameter.copy_(torch.randn_like(parameter))
    return model


def train(model, rows):
    """Three steps of ``fr`` over the frozen ``default``, one of ``tone`` by itself."""
    for names, trained, steps in ((["default", "fr"], "fr", 3), ("tone", None, 1)):
        use_lora(model, names)
        mark_only_lora_as_trainable(model, trained)
        optimizer = torch.optim.AdamW(lora_parameters(model, trained), lr=0.1)
        for _ in range(steps):
            model(data()[rows]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    use_lora(model, ["fr", "tone"], weights=[0.5, 2])
    return model


def states(model):
    return {name: lora_state_dict(model, name) for name in TARGETS}


@pytest.fixture(scope="module")
def expected():
    """What one process makes of all the rows."""
    model = train(carrying(), slice(None))
    with torch.no_grad():
        return states(model), model(data())


def test_the_default_one_was_frozen(expected):
    before, after = lora_state_dict(carrying()), expected[0]["default"]
    assert all(torch.equal(before[key], after[key]) for key in before)
    for name in ("fr", "tone"):
        before = lora_state_dict(carrying(), name)
        assert not any(torch.equal(before[key], expected[0][name][key]) for key in before)


def under_ddp():
    model = carrying()
    rows = slice(dist.get_rank(), None, 2)
    for names, trained, steps in ((["default", "fr"], "fr", 3), ("tone", None, 1)):
        use_lora(model, names)
        mark_only_lora_as_trainable(model, trained)
        # What is not in use is frozen, or DDP would wait for its gradients.
        wrapped = nn.parallel.DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(lora_parameters(wrapped, trained), lr=0.1)
        for _ in range(steps):
            wrapped(data()[rows]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    use_lora(wrapped, ["fr", "tone"], weights=[0.5, 2])
    with torch.no_grad():
        return states(wrapped), wrapped(data())


def test_ddp(expected):
    for got in on_two(under_ddp):
        torch.testing.assert_close(got, expected, **EXACT)


def train_and_save(folder):
    model = train(sharded(carrying()), slice(dist.get_rank(), None, 2))
    with torch.no_grad():
        y = model(data())  # leaves the root's parameters gathered
    for file in FILES:
        save_lora(model, folder / file, name="fr")
    dist.barrier()
    state = states(model)
    fresh = sharded(carrying())
    answers = []
    with torch.no_grad():
        for file in FILES:
            for parameter in lora_parameters(fresh, "fr"):
                parameter.mul_(0)
            load_lora(fresh, folder / file, name="fr")
            answers.append(lora_state_dict(fresh, "fr"))
    return (state, y), answers


def test_fully_shard(expected, tmp_path):
    for got, answers in on_two(train_and_save, tmp_path):
        torch.testing.assert_close(got, expected, **EXACT)
        for state in answers:
            torch.testing.assert_close(state, expected[0]["fr"], **EXACT)
    fresh = base()
    for name, (rank, targets) in zip(TARGETS, enumerate(TARGETS.values(), 2), strict=True):
        apply_lora(fresh, rank, alpha=5, target_modules=targets, name=name, verbose=False)
    for file in FILES:
        load_lora(fresh, tmp_path / file, name="fr")
        torch.testing.assert_close(lora_state_dict(fresh, "fr"), expected[0]["fr"], **EXACT)


def attempts():
    model = carrying()
    apply_lora(model, 2, target_modules=["0"], modules_to_save=["3"], name="whole", verbose=False)
    model = sharded(model)
    with torch.no_grad():
        before = model(data())
    said = []
    for act in (
        lambda: apply_lora(model, 2, target_modules=["down"], name="de"),
        lambda: remove_lora(model, "tone"),
        lambda: use_lora(model, ["default", "whole"]),
        lambda: merge_lora(model),
    ):
        with torch.no_grad():
            model(data())
        try:
            act()
        except ValueError as error:
            said.append(str(error))
    with torch.no_grad():
        return said, torch.equal(model(data()), before), lora_adapters(model)


def test_what_a_sharded_model_refuses():
    for said, same, adapters in on_two(attempts):
        assert len(said) == 4 and all("sharded" in message for message in said)
        assert "trained whole and sharded" in said[2]
        assert same and adapters == {"default": 1.0, "fr": None, "tone": None, "whole": None}
