"""LoRA and LoRALinear as drop-ins for nn.Linear."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lora_kernels import LoRA, LoRALinear


def trained(*args, **kwargs):
    """A LoRALinear whose B is not zero, so that the branch is seen."""
    layer = LoRALinear(*args, **kwargs)
    nn.init.normal_(layer.lora.B.weight, std=0.1)
    return layer


def test_initialisation():
    lora = LoRA(400, 300, 8)
    assert lora.A.weight.shape == (8, 400) and lora.B.weight.shape == (300, 8)
    assert isinstance(lora.A, nn.Linear) and lora.A.bias is None and lora.B.bias is None
    assert torch.equal(lora.B.weight, torch.zeros(300, 8))
    # 3,200 draws: the standard deviation of the estimate is 0.00025.
    assert abs(lora.A.weight.std().item() - 0.02) < 0.001
    assert abs(lora.A.weight.mean().item()) < 0.0015


def test_a_fresh_layer_computes_what_the_linear_computes():
    linear = nn.Linear(12, 7)
    layer = LoRALinear.from_linear(linear, rank=3)
    x = torch.randn(5, 12)
    assert torch.equal(layer(x), linear(x))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rslora", [True, False])
def test_forward_is_the_scaled_sum(bias, rslora):
    layer = trained(12, 7, bias, rank=4, alpha=6.0, use_rslora=rslora)
    x = torch.randn(2, 5, 12)
    scale = 6.0 / (2.0 if rslora else 4.0)
    expected = nn.functional.linear(x, layer.weight, layer.bias) + scale * layer.lora(x)
    torch.testing.assert_close(layer(x), expected)
    assert layer.scale == scale and layer.rank == 4 and layer.alpha == 6.0


def test_state_dict_keys_and_base_checkpoints():
    layer, linear = LoRALinear(6, 5), nn.Linear(6, 5)
    assert list(layer.state_dict()) == ["weight", "bias", "lora.A.weight", "lora.B.weight"]
    result = layer.load_state_dict(linear.state_dict(), strict=False)
    assert result.missing_keys == ["lora.A.weight", "lora.B.weight"] and not result.unexpected_keys
    assert torch.equal(layer.weight, linear.weight)


def test_from_linear_shares_everything():
    linear = nn.Linear(6, 5, dtype=torch.float64).eval()
    linear.weight.requires_grad_(False)
    calls = []
    handle = linear.register_forward_hook(lambda *_: calls.append(1))
    layer = LoRALinear.from_linear(linear, rank=2, alpha=4, dropout=0.5)
    assert layer.weight is linear.weight and layer.bias is linear.bias
    assert not layer.training and not layer.lora.A.training and not layer.weight.requires_grad
    assert layer.lora.A.weight.dtype == torch.float64 and layer.lora.A.weight.requires_grad
    layer(torch.randn(3, 6, dtype=torch.float64))
    assert calls == [1]
    handle.remove()
    layer(torch.randn(3, 6, dtype=torch.float64))
    assert calls == [1]
    assert not hasattr(linear, "lora")  # the original is still plain


def test_to_linear_is_the_way_back():
    linear = nn.Linear(6, 5)
    back = LoRALinear.from_linear(linear).to_linear()
    assert type(back) is nn.Linear and back.weight is linear.weight
    assert back.__dict__.keys() == linear.__dict__.keys()
    assert list(back.state_dict()) == ["weight", "bias"]


def test_from_linear_refuses_other_modules():
    class Twice(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(TypeError, match="exactly an nn.Linear, got Twice"):
        LoRALinear.from_linear(Twice(3, 3))
    with pytest.raises(TypeError, match="got LoRALinear"):
        LoRALinear.from_linear(LoRALinear(3, 3))
    whole = nn.Linear(3, 3)
    whole.weight = nn.Parameter(torch.ones(3, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="torch.float64, got torch.int8; quantised"):
        LoRALinear.from_linear(whole)
    with pytest.raises(ValueError, match="rank must be at least 1"):
        LoRALinear(3, 3, rank=0)


def test_from_linear_refuses_what_would_bypass_lora():
    hooked = nn.Linear(3, 3)
    hooked.forward = lambda x: x
    with pytest.raises(TypeError, match="forward has been replaced"):
        LoRALinear.from_linear(hooked)
    pruned = prune.l1_unstructured(nn.Linear(3, 3), "weight", amount=1)
    with pytest.raises(TypeError, match="not a parameter but computed"):
        LoRALinear.from_linear(pruned)


def test_a_compiled_linear_does_not_keep_calling_the_old_one():
    linear = nn.Linear(3, 3)
    linear.compile(backend="eager")
    layer = LoRALinear.from_linear(linear, rank=2)
    nn.init.ones_(layer.lora.B.weight)
    x = torch.randn(2, 3)
    assert not torch.allclose(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


def test_a_layer_of_no_inputs_is_its_bias():
    with pytest.warns(UserWarning, match="zero-element"):
        layer = LoRALinear(0, 3, rank=2)
    assert torch.equal(layer(torch.empty(2, 4, 0)), layer.bias.expand(2, 4, 3))


def test_runs_on_the_meta_device():
    layer = LoRALinear(6, 5, rank=2, device="meta")
    assert layer(torch.empty(2, 3, 6, device="meta")).shape == (2, 3, 5)


def test_copies_are_independent_and_pickles_are_equal():
    layer = trained(6, 5, rank=2, alpha=3, dropout=0.25).eval()
    x = torch.randn(4, 6)
    y = layer(x)
    twin = copy.deepcopy(layer)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (
        twin,
        pickle.loads(pickle.dumps(layer)),
        torch.load(buffer, weights_only=False),
    ):
        assert torch.equal(other(x), y) and other.scale == 1.5 and other.dropout == 0.25
    nn.init.zeros_(twin.lora.B.weight)
    assert torch.equal(layer(x), y)


def test_moves_and_casts_as_one():
    layer = trained(6, 5).to(torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.half().lora.A.weight.dtype == torch.float16


def test_meta_device_then_reset():
    layer = LoRALinear(6, 5, rank=2, device="meta")
    assert layer.lora.A.weight.is_meta
    layer = layer.to_empty(device="cpu")
    for parameter in layer.parameters():
        nn.init.constant_(parameter, float("nan"))
    # As torch's deferred initialisers do it: every module that can, parents first.
    for module in layer.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert torch.equal(layer.lora.B.weight, torch.zeros(5, 2))
    assert all(torch.isfinite(p).all() for p in layer.parameters())
    assert layer.lora.A.weight.abs().max() < 0.2


def test_prints_like_a_linear():
    text = repr(LoRALinear(6, 5, bias=False, rank=2, alpha=3, dropout=0.1))
    assert text.startswith(
        "LoRALinear(\n  in_features=6, out_features=5, bias=False, rank=2, scale=1.5, dropout=0.1"
    )
    assert "(A): Linear(in_features=6, out_features=2, bias=False)" in text


def test_dropout_follows_the_mode_of_the_module():
    layer, x = trained(64, 8, rank=4, dropout=0.5), torch.randn(10, 64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_delta_weight_is_what_the_branch_adds():
    layer = trained(6, 5, rank=2, alpha=3).to(torch.bfloat16)
    delta = layer.delta_weight()
    assert delta.dtype == torch.float32
    a, b = layer.lora.A.weight.double(), layer.lora.B.weight.double()
    torch.testing.assert_close(delta.double(), 1.5 * b @ a)


def test_dropout_can_be_changed_for_further_training():
    layer = LoRALinear(8, 8, rank=2, alpha=4, dropout=0.5)
    layer.set_dropout(0.0)
    assert layer.dropout == 0.0 and "dropout" not in repr(layer) and layer.scale == 2
    nn.init.normal_(layer.lora.B.weight)
    x = torch.randn(4, 8)
    torch.testing.assert_close(layer.train()(x), layer.eval()(x))
    layer.set_dropout(0.5)
    assert layer.lora_config.dropout == 0.5
    assert not torch.allclose(layer.train()(x), layer.eval()(x))
    with pytest.raises(ValueError, match="dropout must be in"):
        layer.set_dropout(1.0)
    assert layer.dropout == 0.5


def test_a_layer_has_rank_sixteen_unless_asked_otherwise():
    assert LoRALinear(4, 4).rank == LoRALinear.from_linear(nn.Linear(4, 4)).rank == 16


@pytest.mark.parametrize("factors", [torch.float32, torch.float64])
def test_one_vector_is_a_batch_of_one(factors):
    """Also with factors of another dtype, whose gradients are theirs."""
    layer = LoRALinear(4, 3, rank=2, dtype=torch.float64, lora_dtype=factors)
    nn.init.normal_(layer.lora.B.weight)
    x, found = torch.randn(4, dtype=torch.float64), []
    for rows in (x, x[None]):
        rows = rows.clone().requires_grad_()
        y = layer(rows)
        assert y.shape == (*rows.shape[:-1], 3) and y.dtype == torch.float64
        grads = torch.autograd.grad(y.sum(), [rows, *layer.parameters()])
        assert [g.dtype for g in grads[-2:]] == [factors, factors]
        found.append([y.flatten(), grads[0].flatten(), *grads[1:]])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
