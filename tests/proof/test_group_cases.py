"""The cases of groups pass what is right and notice what is wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("triton")

import torch

from lora_kernels.kernels import group_gemm, tuning
from lora_kernels.kernels.tuning import Config, Shape
from lora_kernels.proof.check import run_case
from lora_kernels.proof.group_cases import MANY, ONE, GroupCase, GroupLayerCase
from lora_kernels.proof.group_probes import MASKED

CASE = GroupCase(
    torch.float16, Shape(20, 40, 24, 3), kernel="group_y", config=Config(16, 16, 16), lacking=True
)
LAYER = GroupLayerCase(
    torch.float16, Shape(9, 40, 16, 4), bias=True, dropout_p=0.3, forward="fused", dx="fused"
)


def problems(case):
    return {output.name: output.problem for output in run_case(case)}


@pytest.mark.interpreted
@pytest.mark.parametrize("kernel", tuning.GROUP_KERNELS)
@pytest.mark.parametrize("members", [2, 3, 4])
def test_a_right_kernel_passes(members, kernel):
    case = replace(
        CASE,
        kernel=kernel,
        members=members,
        bias=kernel not in ONE,
        dropout_p=0.3 if kernel in MASKED else 0.0,
        config=Config(32, 32, 32),
    )
    found = problems(case)
    assert set(found.values()) == {""}
    ys = [f"y{i}" for i in range(members)]
    if kernel in MANY:
        assert list(found) == ys
    elif kernel == "group_dxa_db":
        assert {"dxa", "db0", "dbias1"} <= set(found) and "db1" not in found
    else:
        assert set(found) == {"dx"} if kernel in ONE else {*ys, "xa", "keep"}


@pytest.mark.interpreted
def test_a_right_group_passes():
    found = problems(LAYER)
    names = [f"{kind}{i}" for kind in ("y", "dw", "da", "db") for i in range(3)]
    assert set(found) == {*names, "xa", "dx", "dbias0", "dbias2", "keep"}
    assert set(found.values()) == {""}


@pytest.mark.interpreted
@pytest.mark.parametrize("changed", [0, 2])
def test_a_wrong_member_is_noticed(changed, monkeypatch):
    real = group_gemm.group_gemm

    def wrong(*arguments, **options):
        outs = list(real(*arguments, **options))
        outs[changed] = outs[changed] * 1.01
        return outs

    monkeypatch.setattr(group_gemm, "group_gemm", wrong)
    found = problems(CASE)
    assert [name for name, problem in found.items() if problem] == [f"y{changed}"]


@pytest.mark.interpreted
def test_a_member_that_is_not_computed_is_noticed(monkeypatch):
    real = group_gemm.group_gemm
    monkeypatch.setattr(group_gemm, "group_gemm", lambda *a, **k: real(*a, **k)[:2])
    assert problems(CASE)["y2"] == "not computed"


def test_a_strategy_that_cannot_serve_says_so():
    assert LAYER.refusal == ""
    assert "no dropout" in replace(LAYER, forward="aten").refusal
    assert "do not suit TMA" in replace(LAYER, forward="hopper", shape=Shape(9, 41, 16, 4)).refusal


def test_widths_keep_to_what_the_first_can_be_divided_by():
    assert replace(CASE, shape=Shape(1, 201, 1, 1)).ns == [201, 51, 51]
    assert replace(CASE, shape=Shape(1, 200, 1, 1)).ns == [200, 56, 56]
    assert replace(CASE, shape=Shape(1, 4096, 1, 1), members=2).ns == [4096, 1024]
    assert replace(CASE, others=7, members=4).ns == [40, 7, 7, 7]
