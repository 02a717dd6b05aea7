"""Several adapters on one LoRALinear."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from lora_kernels import LoRALinear, explain, use_backend
from lora_kernels.config import LayerConfig
from lora_kernels.dispatch import MOST_RANK, TRITON_INSTALLED
from lora_kernels.linear import module as module_file

F64 = torch.float64
CONFIGS = {
    "default": LayerConfig(4, 6.0),
    "fr": LayerConfig(2, 3.0, use_rslora=True),
    "tone": LayerConfig(3),
}


def layer_of(configs=CONFIGS, k=12, n=7, dtype=F64, bias=True, seed=0):
    """A layer with these adapters, of which the first is in use, and B not zero."""
    torch.manual_seed(seed)
    first, *others = configs
    linear = nn.Linear(k, n, bias, dtype=dtype)
    config = configs[first]
    layer = LoRALinear.from_linear(
        linear,
        config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        name=first,
    )
    for name in others:
        layer.add_adapter(name, configs[name])
    for lora in layer.adapters().values():
        nn.init.normal_(lora.A.weight, std=0.3)
        nn.init.normal_(lora.B.weight, std=0.3)
    return layer


def written_out(layer, x, weights):
    """The sum of the branches, from the definition."""
    y = nn.functional.linear(x, layer.weight, layer.bias)
    for name, weight in weights.items():
        lora, config = layer.adapters()[name], CONFIGS[name]
        root = math.sqrt(config.rank) if config.use_rslora else config.rank
        scale = 1.0 if config.alpha is None else config.alpha / root
        y = y + weight * scale * (x @ lora.A.weight.t() @ lora.B.weight.t())
    return y


IN_USE = [
    {},
    {"default": 1.0},
    {"default": 0.5},
    {"fr": 1.0},
    {"fr": -2.0},
    {"default": 1.0, "fr": 1.0},
    {"tone": 0.25, "default": 3.0, "fr": -1.0},
    {"fr": 0.0, "tone": 1.0},
]


@pytest.mark.parametrize("weights", IN_USE, ids=str)
@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12)])
def test_the_sum_and_its_gradients(weights, shape):
    layer = layer_of()
    layer.use_adapters(weights)
    assert layer.adapters_in_use == weights
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    dy = torch.randn(*shape[:-1], 7, dtype=F64)
    parameters = dict(layer.named_parameters())
    got, expected = (
        (y, *torch.autograd.grad(y, [x, *parameters.values()], dy, allow_unused=True))
        for y in (layer(x), written_out(layer, x, weights))
    )
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    for name, grad in zip(parameters, got[2:], strict=True):
        owner = name.split(".")[1] if name.startswith("loras") else "default"
        assert (grad is not None) == ("lora" not in name or owner in weights), name


@pytest.mark.parametrize("weights", IN_USE, ids=str)
def test_merging_adds_the_same(weights):
    layer = layer_of()
    layer.use_adapters(weights)
    x = torch.randn(3, 12, dtype=F64)
    y = nn.functional.linear(x, layer.weight + layer.delta_weight(), layer.bias)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    assert not layer.delta_weight().requires_grad


def test_names_that_the_layer_lacks_are_passed_over():
    layer, x = layer_of(), torch.randn(3, 12, dtype=F64)
    layer.use_adapters({"de": 1.0, "fr": 1.0})
    assert layer.adapters_in_use == {"fr": 1.0}
    layer.use_adapters({"de": 1.0})
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_state_dict_keys():
    layer = layer_of()
    factors = ("A.weight", "B.weight")
    others = [f"loras.{name}.{factor}" for name in ("fr", "tone") for factor in factors]
    assert list(layer.state_dict()) == ["weight", "bias", *(f"lora.{f}" for f in factors), *others]
    other = layer_of(seed=1)
    other.load_state_dict(layer.state_dict())
    layer.use_adapters({"tone": 1.0, "fr": 2.0})
    other.use_adapters({"tone": 1.0, "fr": 2.0})
    x = torch.randn(3, 12, dtype=F64)
    assert torch.equal(layer(x), other(x))


def test_a_layer_without_a_default_one():
    layer = layer_of({"fr": CONFIGS["fr"]})
    assert layer.lora is None and list(layer.adapters()) == ["fr"]
    assert list(layer.state_dict()) == ["weight", "bias", "loras.fr.A.weight", "loras.fr.B.weight"]
    x = torch.randn(3, 12, dtype=F64)
    torch.testing.assert_close(layer(x), written_out(layer, x, {"fr": 1.0}))
    layer.add_adapter("default", LayerConfig(2))
    assert layer.lora.rank == 2 and layer.adapters_in_use == {"fr": 1.0}


def test_taken_out_one_by_one():
    layer, x = layer_of(), torch.randn(3, 12, dtype=F64)
    layer.use_adapters({"default": 1.0, "fr": 2.0})
    layer.remove_adapter("default")
    assert layer.lora is None and layer.adapters_in_use == {"fr": 2.0}
    torch.testing.assert_close(layer(x), written_out(layer, x, {"fr": 2.0}))
    layer.remove_adapter("tone")
    layer.remove_adapter("fr")
    assert "loras" not in dict(layer.named_children()) and layer.adapters() == {}
    with pytest.raises(KeyError):
        layer.remove_adapter("fr")
    back = layer.to_linear()
    assert back.__dict__.keys() == nn.Linear(3, 3).__dict__.keys()
    assert torch.equal(back(x), layer(x))


def test_to_linear_leaves_nothing_behind():
    layer = layer_of()
    back = layer.to_linear()
    assert type(back) is nn.Linear and list(back.state_dict()) == ["weight", "bias"]
    assert back.__dict__.keys() == nn.Linear(3, 3).__dict__.keys()
    assert layer.adapters().keys() == CONFIGS.keys()  # the layer itself goes on


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("default", "named 'default' already"),
        ("fr", "named 'fr' already"),
        ("a.b", "without dots"),
        ("", "without dots"),
        ("_orig_mod", "begin with an underscore"),
        ("keys", "word of torch's modules"),
        ("training", "word of torch's modules"),
        ("lora", "word of torch's modules"),
        ("module", "word of torch's modules"),
        (3, "must be the name of an adapter, got 3"),
        (None, "must be the name of an adapter, got None"),
    ],
)
def test_names_are_looked_at(name, error):
    layer = layer_of()
    before = layer.state_dict().keys()
    with pytest.raises((TypeError, ValueError), match=error):
        layer.add_adapter(name, LayerConfig(2))
    assert layer.state_dict().keys() == before and layer.lora_configs == CONFIGS


def test_copies_pickles_casts_and_modes():
    layer = layer_of()
    layer.use_adapters({"fr": 2.0, "tone": 1.0})
    x = torch.randn(3, 12, dtype=F64)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y) and twin.lora_configs == CONFIGS
        twin.use_adapters({})
        twin.remove_adapter("tone")
        assert torch.equal(layer(x), y)
    assert {p.dtype for p in layer.to(torch.bfloat16).parameters()} == {torch.bfloat16}
    assert not any(m.training for m in layer.eval().modules())
    layer.add_adapter("later", LayerConfig(2))
    assert not layer.loras["later"].A.training
    fresh = LoRALinear.from_linear(nn.Linear(3, 3).eval(), 2, name="fr")
    assert not any(m.training for m in fresh.modules())


def test_meta_then_reset():
    with torch.device("meta"):
        layer = LoRALinear(6, 5, rank=2)
        layer.add_adapter("fr", LayerConfig(3))
    assert layer.loras["fr"].A.weight.is_meta
    layer.use_adapters({"default": 1.0, "fr": 1.0})
    assert layer(torch.empty(2, 6, device="meta")).shape == (2, 5)
    layer = layer.to_empty(device="cpu")
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(layer.loras["fr"].B.weight, torch.zeros(5, 3))
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_what_it_says_of_itself():
    layer = layer_of({"default": LayerConfig(4, 6.0, 0.1), "fr": CONFIGS["fr"]})
    assert (layer.rank, layer.alpha, layer.scale, layer.dropout) == (4, 6.0, 1.5, 0.1)
    assert repr(layer).startswith(
        "LoRALinear(\n  in_features=12, out_features=7, bias=True, default: rank=4, scale=1.5, "
        "dropout=0.1; fr: rank=2, scale=2.12132, not in use\n"
    )
    layer.use_adapters({"default": 2.0})
    assert layer.scale == 3.0 and layer.lora_config == LayerConfig(4, 6.0, 0.1)
    assert "default: rank=4, scale=1.5, dropout=0.1, weight=2; fr" in repr(layer)
    layer.use_adapters({"default": 1.0, "fr": 1.0})
    assert layer.lora_config == LayerConfig(6, None, 0.1) and layer.scale == 1.0
    layer.use_adapters({})
    assert layer.lora_config == LayerConfig(4, 6.0, 0.1)
    assert repr(LoRALinear(3, 3, rank=2)).startswith(
        "LoRALinear(\n  in_features=3, out_features=3, bias=True, rank=2, scale=1\n"
    )


def test_explain_judges_by_the_whole_rank():
    rank = MOST_RANK // 2 + 1
    configs = {"default": LayerConfig(rank), "fr": LayerConfig(rank)}
    layer = layer_of(configs, dtype=torch.float32)
    with use_backend("reference"):
        assert explain(layer).startswith("reference: ")
        layer.use_adapters({})
        assert explain(layer) == "reference: no adapter is in use, torch's own linear is called"
    layer.use_adapters({"default": 1.0, "fr": 1.0})
    with use_backend("triton"):
        said = explain(layer)
    # Without Triton that is what is said.
    assert said.startswith("none: ") and (f"rank is {2 * rank}," in said or not TRITON_INSTALLED)


# --- dropout --------------------------------------------------------------------------------------


def dropping(**dropouts):
    return {name: LayerConfig(CONFIGS[name].rank, dropout=p) for name, p in dropouts.items()}


def test_one_call_serves_those_of_one_dropout(monkeypatch):
    calls = []
    real = module_file.lora_linear

    def counting(x, weight, lora_a, lora_b, bias, **kwargs):
        calls.append((lora_a.shape[0], kwargs["dropout_p"]))
        return real(x, weight, lora_a, lora_b, bias, **kwargs)

    monkeypatch.setattr(module_file, "lora_linear", counting)
    layer = layer_of(dropping(default=0.1, fr=0.1, tone=0.4))
    layer.use_adapters(dict.fromkeys(CONFIGS, 1.0))
    x = torch.randn(3, 12, dtype=F64)
    layer(x)
    layer.eval()(x)
    assert calls == [(6, 0.1), (9, 0.0)]


def test_each_adapter_keeps_its_own_probability():
    """Of one input that is 1 and factors that are 1, y says which branches were dropped."""
    layer = LoRALinear(1, 1, False, rank=1, dropout=0.25, dtype=F64)
    layer.add_adapter("fr", LayerConfig(1, dropout=0.5))
    layer.use_adapters({"default": 1.0, "fr": 1.0})
    with torch.no_grad():
        layer.weight.fill_(1000.0)
        for weight, value in zip(
            (p for lora in layer.adapters().values() for p in (lora.A.weight, lora.B.weight)),
            (1.0, 3.0, 1.0, 100.0),  # kept, they give 4 and 200
            strict=True,
        ):
            weight.fill_(value)
        torch.manual_seed(0)
        y = layer(torch.ones(20000, 1, dtype=F64))
    found = {
        round(v): c
        for v, c in zip(*(t.tolist() for t in y.unique(return_counts=True)), strict=True)
    }
    assert found.keys() == {1000, 1004, 1200, 1204}
    # Independent, with standard deviations of about 0.003.
    assert abs((found[1004] + found[1204]) / 20000 - 0.75) < 0.015
    assert abs((found[1200] + found[1204]) / 20000 - 0.5) < 0.018
    assert abs(found[1204] / 20000 - 0.375) < 0.018


def test_gradients_go_by_the_masks_that_forward_drew():
    layer = layer_of(dropping(default=0.1, fr=0.3, tone=0.3))
    layer.use_adapters({"default": 2.0, "fr": 0.5, "tone": 1.0})
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def run(x, *_):
        torch.manual_seed(5)
        return layer(x)

    x = torch.randn(4, 12, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, *parameters))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_wide_factors_over_a_narrow_base(dtype):
    layer = layer_of(dropping(default=0.1, fr=0.3), dtype=torch.float32)
    layer.use_adapters({"default": 2.0, "fr": 0.5})
    layer.weight.data, layer.bias.data = layer.weight.to(dtype), layer.bias.to(dtype)
    x = torch.randn(4, 12, dtype=dtype)
    for mode in (True, False):
        y = layer.train(mode)(x)
        assert y.dtype == dtype
        y.float().sum().backward()
    assert layer.loras["fr"].A.weight.grad.dtype == torch.float32
    y = layer.eval()(x)
    exact = copy.deepcopy(layer).double()(x.double())
    torch.testing.assert_close(y.double(), exact, rtol=0.02, atol=0.02)


def test_under_autocast():
    layer = layer_of(dropping(default=0.1, fr=0.3), dtype=torch.float32)
    layer.use_adapters({"default": 2.0, "fr": 0.5})
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(4, 12))
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.parameters())
