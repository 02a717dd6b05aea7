"""The table: every shape finds a row on every GPU, and names are kept to."""

from __future__ import annotations

import pytest
import torch

from lora_kernels.kernels import tuning
from lora_kernels.kernels.tuning import Config, Shape

CAPABILITIES = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (13, 7)]
SHAPES = [Shape(*s) for s in [(1, 1, 1, 1), (64, 4096, 4096, 16), (8192, 14336, 4096, 512)]]


def choose(role, capability, dtype, shape, dropped=False, tma=True):
    return tuning.strategy(role, capability, dtype, shape, dropped=dropped, tma=tma, sms=132)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_gpu_finds_a_row(capability, shape, itemsize):
    for kernel in (*tuning.KERNELS, *tuning.GROUP_KERNELS):
        if not kernel.endswith("hopper"):
            assert isinstance(tuning.lookup(kernel, capability, itemsize, shape), Config)


@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("tma", [False, True])
def test_what_the_table_chooses_it_can_serve(capability, dtype, dropped, tma):
    for role, known in tuning.STRATEGIES.items():
        for m in (1, 64, 65, 8192):
            for n, k in ((8, 8), (1024, 4096), (4096, 1024), (4096, 14336), (14336, 4096)):
                for r in (1, 16, 64, 65, 512):
                    shape = Shape(m, n, k, r)
                    name = choose(role, capability, dtype, shape, dropped, tma)
                    assert name in known
                    with tuning.use_strategy(**{role: name}):  # raises if it cannot be served
                        assert choose(role, capability, dtype, shape, dropped, tma) == name
                    if name == "hopper":
                        for kernel in ("hopper", "group_y_hopper", "group_dx_hopper"):
                            tuning.lookup(kernel, capability, 2, shape)


def test_weights_of_differing_strides_take_cublas():
    shape = Shape(8192, 6144, 4096, 16)
    options = {"tma": True, "sms": 132}
    for role in tuning.STRATEGIES:
        for dropped in (False, True):
            asked = role, (9, 0), torch.bfloat16, shape._replace(k=2048)
            found = tuning.strategy(*asked, dropped=dropped, alike=True, **options)
            assert found == "hopper"
            found = tuning.strategy(*asked, dropped=dropped, alike=False, **options)
            assert found == ("beta1" if dropped else "aten")
            with (
                tuning.use_strategy(**{role: "fused"}),
                pytest.raises(RuntimeError, match="differ in their strides"),
            ):
                tuning.strategy(*asked, dropped=dropped, alike=False, **options)


def test_calls_of_like_size_share_a_row():
    kernels = [tuning.lookup("xa", (9, 0), 2, Shape(m, 64, 64, 16)) for m in (513, 700, 1024)]
    assert kernels[0] is kernels[1] is kernels[2]
    assert tuning.lookup("xa", (9, 0), 2, Shape(1025, 64, 64, 16)) is not kernels[0]


@pytest.mark.parametrize(
    ("role", "name", "changes", "reason"),
    [
        ("forward", "one_kernel", {"shape": Shape(9, 9, 9, 65)}, "ranks up to 64"),
        ("dx", "hopper", {"capability": (8, 0)}, "no row for sm_80"),
        ("dx", "hopper", {"capability": (10, 0)}, "no row for sm_100"),
        ("forward", "hopper", {"dtype": torch.float32}, "16-bit"),
        ("forward", "hopper", {"tma": False}, "TMA"),
        ("forward", "aten", {"dropped": True}, "no dropout"),
    ],
)
def test_a_strategy_asked_for_that_cannot_serve_says_why(role, name, changes, reason):
    call = {"capability": (9, 0), "dtype": torch.bfloat16, "shape": Shape(9, 9, 9, 9)} | changes
    with tuning.use_strategy(**{role: name}), pytest.raises(RuntimeError, match=reason):
        choose(role, **call)
    choose(role, **call)


def test_a_forced_strategy_ends_with_the_block():
    shape = Shape(8192, 4096, 4096, 16)
    free = choose("forward", (9, 0), torch.bfloat16, shape)
    with tuning.use_strategy(forward="fused"):
        with tuning.use_strategy(forward="beta1", dx="fused"):
            assert choose("forward", (9, 0), torch.bfloat16, shape) == "beta1"
        assert choose("forward", (9, 0), torch.bfloat16, shape) == "fused"
        assert choose("dx", (9, 0), torch.bfloat16, shape) != "fused"
    assert choose("forward", (9, 0), torch.bfloat16, shape) == free


def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="forward must be one of one_kernel, .*; got 'magic'"):
        tuning.use_strategy(forward="magic").__enter__()
    with pytest.raises(ValueError, match="dx must be one of fused"):
        tuning.use_strategy(dx="one_kernel").__enter__()
    with pytest.raises(ValueError, match="kernel must be one of xa"):
        tuning.candidates("magic", (9, 0))


@pytest.mark.parametrize("kernel", tuning.KERNELS)
def test_candidates_are_many_and_differ(kernel):
    found = tuning.candidates(kernel, (9, 0))
    assert len(found) >= 8 and len(set(found)) == len(found)


@pytest.mark.parametrize("role", ["forward", "dx"])
def test_few_tiles_go_to_cublas_and_many_do_not(role):
    for m in (1, 64, 65, 256, 512):
        shape = Shape(m, 4096, 4096, 16)
        assert choose(role, (9, 0), torch.bfloat16, shape) == "aten"
        assert choose(role, (9, 0), torch.bfloat16, shape, dropped=True) == "beta1"
    assert choose(role, (9, 0), torch.bfloat16, Shape(8192, 4096, 4096, 16)) == "hopper"
    assert choose(role, (9, 0), torch.bfloat16, Shape(8192, 4096, 14336, 16)) == "beta1"
    assert choose(role, (8, 0), torch.bfloat16, Shape(8192, 4096, 1024, 16)) == "fused"
