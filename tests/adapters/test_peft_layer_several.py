"""Several active adapters of a PEFT layer as one of a wider rank; MiCA; what PEFT says of it."""

from __future__ import annotations

import copy

import pytest
import torch
from closeness import assert_close
from kernel_cases import PATHS
from torch import nn

from lora_kernels import accelerate_peft, explain, use_backend

peft = pytest.importorskip("peft")

from tiny_peft_layer import K, N, count_served, pair, results  # noqa: E402


@pytest.fixture
def served(monkeypatch):
    return count_served(monkeypatch)


def activate(layer, names, scales):
    layer.set_adapter(names)
    layer.scaling.update(zip(("default", "second"), scales, strict=True))


ACTIVE = {
    "of one scale": (["default", "second"], (1.5, 1.5)),
    "of two scales": (["default", "second"], (1.5, -0.5)),
    "in the other order": (["second", "default"], (1.5, -0.5)),
    "one twice": (["default", "default"], (1.5, 1.5)),
    "one of them elsewhere": (["elsewhere", "second"], (1.5, 0.5)),
}


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("case", ACTIVE)
def test_equals_peft(served, case, device, backend):
    names, scales = ACTIVE[case]
    stock, ours = (layer.to(device) for layer in pair(lora_dropout=0.1))
    for layer in (stock, ours):
        activate(layer, names, scales)
        layer.eval()
    x = torch.randn(2, 5, K, device=device)
    truth = results(copy.deepcopy(stock).double(), x.double())
    with use_backend(backend):
        got = results(ours, x)
    expected = results(stock, x)
    assert len(served) == 1
    assert got.keys() == expected.keys() and len(got) >= 4
    for name, value in got.items():
        assert_close(value, expected[name], truth[name], name)


@pytest.mark.parametrize("case", ACTIVE)
def test_equals_peft_in_float64_and_in_training(served, case):
    names, scales = ACTIVE[case]
    stock, ours = pair(torch.float64)
    for layer in (stock, ours):
        activate(layer, names, scales)
    x = torch.randn(5, K, dtype=torch.float64)
    expected, got = results(stock, x), results(ours, x)
    assert ours.training and len(served) == 1
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)


def test_adapters_of_two_ranks_and_dtypes(served):
    stock, ours = pair(torch.bfloat16)
    for layer in (stock, ours):
        layer.update_layer("third", r=7, lora_alpha=3, config=peft.LoraConfig(r=7, lora_alpha=3))
        nn.init.normal_(layer.lora_B["third"].weight, std=0.3)
        layer.lora_A["third"].bfloat16(), layer.lora_B["third"].bfloat16()
    ours.load_state_dict(stock.state_dict())
    for layer in (stock, ours):
        layer.set_adapter(["default", "third"])
    truth = copy.deepcopy(stock).double()
    x = torch.randn(5, K).bfloat16()
    expected, got, exact = results(stock, x), results(ours, x), results(truth, x.double())
    assert len(served) == 1
    for name, value in got.items():
        assert value.dtype == expected[name].dtype
        assert_close(value.bfloat16(), expected[name].bfloat16(), exact[name], name)


def test_those_that_drop_elements_go_to_peft(served):
    """Each draws a mask of its own there; one for all would be another distribution."""
    stock, ours = pair(lora_dropout=0.1)
    x, drawn = torch.randn(5, K), []
    for layer in (stock, ours):
        layer.set_adapter(["default", "second"])
        torch.manual_seed(3)
        drawn.append(results(layer, x))
    assert not served and "drops elements of its own" in ours.parts()
    assert all(torch.equal(value, drawn[0][name]) for name, value in drawn[1].items())


def test_what_the_model_says_of_it(served):
    stock, ours = pair()
    ours.set_adapter(["default", "second"])
    parts = ours.parts()
    assert parts.lora_a.shape == (8, K) and parts.lora_b.shape == (N, 8)
    assert explain((parts.weight, *parts[:4])).startswith("reference: x is on cpu")
    assert repr(ours).splitlines() == repr(stock).splitlines()


def test_status_names_the_layer_as_peft_does():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(K, N)), peft.LoraConfig(r=2, target_modules=["0"])
    )
    before = model.get_layer_status()
    accelerate_peft(model)
    assert model.get_layer_status() == before
    assert before[0].module_type == "lora.Linear"


def test_mica_runs_here(served):
    """It is plain LoRA but for how it begins and that B is frozen."""
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"])
    try:
        config.init_lora_weights = "mica"
        stock = peft.get_peft_model(nn.Sequential(nn.Linear(K, N)), config)
    except ValueError as error:
        pytest.skip(f"this peft has no MiCA: {error}")
    layer = stock.base_model.model[0]
    nn.init.normal_(layer.lora_A["default"].weight)
    assert not layer.lora_B["default"].weight.requires_grad
    ours = copy.deepcopy(stock)
    assert not accelerate_peft(ours).handing_over
    x = torch.randn(5, K)
    expected, got = results(stock, x), results(ours, x)
    assert len(served) == 1 and got.keys() == expected.keys()
    for name, value in got.items():
        torch.testing.assert_close(value, expected[name])
