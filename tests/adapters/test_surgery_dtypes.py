"""The dtype of A and B: what is made by default, what is asked for, and that it can be trained."""

from __future__ import annotations

import pytest
import torch
from tiny_model import IDS, SUFFIXES, Model, assert_untouched, snapshot, trained
from torch import nn

from lora_kernels import (
    LoRALinear,
    apply_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    save_lora,
)

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DEFAULTS = {F32: F32, BF16: F32, F16: F32, F64: F64}
MAKERS = {
    "the layer": lambda dtype, **more: LoRALinear(4, 4, rank=2, dtype=dtype, **more),
    "from a linear": lambda dtype, **more: LoRALinear.from_linear(
        nn.Linear(4, 4, dtype=dtype), 2, **more
    ),
    "on meta": lambda dtype, **more: LoRALinear(4, 4, rank=2, dtype=dtype, device="meta", **more),
    "the model": lambda dtype, **more: applied(dtype, **more),
    "another adapter": lambda dtype, **more: applied(dtype, name="other", **more),
}


def applied(dtype, name="default", **more):
    model = nn.Sequential(nn.Linear(4, 4, dtype=dtype))
    if name != "default":
        apply_lora(model, 2, verbose=False, lora_dtype=F64)
    apply_lora(model, 2, verbose=False, name=name, **more)
    return model[0].adapters()[name] if name != "default" else model[0]


def dtypes_of(module):
    return {p.dtype for n, p in module.named_parameters() if n.endswith(("A.weight", "B.weight"))}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("dtype", DEFAULTS)
def test_by_default_the_weights_or_float32(dtype, make):
    assert dtypes_of(MAKERS[make](dtype)) == {DEFAULTS[dtype]}


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("lora_dtype", [F32, BF16, F16, F64])
def test_asked_for(lora_dtype, make):
    assert dtypes_of(MAKERS[make](BF16, lora_dtype=lora_dtype)) == {lora_dtype}


def test_the_models_own_cast_casts_them_all():
    assert dtypes_of(trained(Model().bfloat16(), rank=2).bfloat16()) == {BF16}


BAD = [torch.int8, torch.float8_e4m3fn, "float32", "file", 32]


@pytest.mark.parametrize("bad", BAD, ids=str)
def test_another_is_refused_and_nothing_changed(tmp_path, bad):
    model = Model()
    before = snapshot(model)
    save_lora(trained(Model(), rank=2), tmp_path / "a.pth")
    with pytest.raises(TypeError, match="lora_dtype must be None or one of torch.float32"):
        apply_lora(model, 2, lora_dtype=bad)
    with pytest.raises(TypeError, match="lora_dtype must be"):
        LoRALinear.from_linear(nn.Linear(4, 4), 2, lora_dtype=bad)
    if bad != "file":
        with pytest.raises(TypeError, match="lora_dtype must be"):
            load_lora(model, tmp_path / "a.pth", lora_dtype=bad)
    assert_untouched(model, before)


@pytest.mark.parametrize("path", [*(f"a{suffix}" for suffix in SUFFIXES), "directory"])
@pytest.mark.parametrize(
    ("asked", "found"), [(None, F32), ("file", F16), (BF16, BF16)], ids=["default", "file", "bf16"]
)
def test_loading(tmp_path, path, asked, found):
    source = trained(Model().bfloat16(), rank=2, lora_dtype=F16)
    save_lora(source, tmp_path / path)
    target = Model().bfloat16()
    load_lora(target, tmp_path / path, lora_dtype=asked)
    assert dtypes_of(target) == {found}
    for key, value in lora_state_dict(source).items():
        assert torch.equal(lora_state_dict(target)[key], value.to(found))
    # Those that are there keep theirs.
    load_lora(target, tmp_path / path, lora_dtype=F64)
    assert dtypes_of(target) == {found}


@pytest.mark.parametrize("base", [BF16, F16])
def test_small_steps_are_not_lost(base):
    """At a usual learning rate: in 16 bits three of four would round away."""
    model = nn.Sequential(nn.Linear(32, 32)).to(base)
    apply_lora(model, rank=4, alpha=4, verbose=False)
    mark_only_lora_as_trainable(model)
    factors = lora_parameters(model)
    for factor in factors:
        nn.init.normal_(factor, std=0.1)
    before = [factor.detach().clone() for factor in factors]
    optimizer = torch.optim.AdamW(factors, lr=1e-4, weight_decay=0)
    for _ in range(3):
        model(torch.randn(16, 32).to(base)).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for factor, old in zip(factors, before, strict=True):
        assert (factor != old).float().mean() > 0.99


def test_float16_trains_with_a_gradient_scaler():
    model = nn.Sequential(nn.Linear(16, 16)).half()
    apply_lora(model, rank=2, verbose=False)
    mark_only_lora_as_trainable(model)
    before = model[0].lora.B.weight.detach().clone()
    optimizer, scaler = torch.optim.AdamW(lora_parameters(model)), torch.amp.GradScaler("cpu")
    with torch.autocast("cpu", F16):
        loss = model(torch.randn(4, 16).half()).float().square().mean()
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert not torch.equal(model[0].lora.B.weight, before)


def test_merged_the_weight_keeps_its_dtype():
    model = trained(Model().bfloat16(), rank=2)
    expected = model(IDS)
    assert expected.dtype == BF16
    merge_lora(model)
    assert {p.dtype for p in model.parameters()} == {BF16}
    torch.testing.assert_close(model(IDS), expected, rtol=0.05, atol=0.05)


def test_fully_shard_takes_both_dtypes():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    model = trained(Model().bfloat16(), rank=2)
    mark_only_lora_as_trainable(model)
    expected = model(IDS)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        sharded = fully_shard(model, mesh=dist.init_device_mesh("cpu", (1,)))
        y = sharded(IDS)
        y.float().sum().backward()
        assert torch.equal(y, expected)
        assert {(p.dtype, p.grad.dtype) for p in lora_parameters(model)} == {(F32, F32)}
    finally:
        dist.destroy_process_group()
