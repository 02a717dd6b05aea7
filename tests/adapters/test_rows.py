"""`use_lora(model, rows=…)`: a batch whose rows have adapters of their own."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_experts import with_experts
from tiny_families import family
from tiny_peft import TOKENS
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import (
    apply_lora,
    disable_lora,
    lora_adapters,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    remove_lora,
    use_lora,
)

ROWS = ["fr", "en", None, "fr", "en"]
IDS = torch.arange(5 * 6).reshape(5, 6) % 64


def adapted(name="llama", dropout=0.0, dtype=torch.float32, ranks=(3, 5)):
    """A model with two adapters of several ranks and scales, on layers that differ in part."""
    model = family(name, dtype)
    for i, (adapter, rank) in enumerate(zip(("fr", "en"), ranks, strict=True)):
        targets = (["q_proj", "v_proj", "down_proj"], ["q_proj", "k_proj"])[i]
        apply_lora(
            model,
            rank,
            alpha=4 + i,
            dropout=dropout,
            target_modules=targets,
            name=adapter,
            verbose=False,
        )
    use_lora(model, ["fr", "en"])
    mark_only_lora_as_trainable(model)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.3)
    return model


def by_itself(model, adapter, rows):
    with use_lora(model, adapter):
        return model(IDS[rows]).logits


@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_each_row_is_as_its_adapter_by_itself_has_it(name):
    model = adapted(name)
    use_lora(model, rows=ROWS)
    assert lora_adapters(model) == {"fr": 1.0, "en": 1.0}
    found = model(IDS).logits
    for adapter in ("fr", "en", None):
        rows = [i for i, name in enumerate(ROWS) if name == adapter]
        torch.testing.assert_close(
            found[rows], by_itself(model, adapter, rows), rtol=1e-4, atol=1e-5
        )
    assert torch.equal(model(IDS).logits, found)


def test_gradients_are_each_adapters_own():
    model = adapted()
    expected = {}
    for adapter in ("fr", "en"):
        rows = [i for i, name in enumerate(ROWS) if name == adapter]
        parameters = lora_parameters(model, adapter)
        loss = by_itself(model, adapter, rows).square().sum()
        for parameter, grad in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            expected[parameter] = grad
    use_lora(model, rows=ROWS)
    model(IDS).logits.square().sum().backward()
    for parameter, grad in expected.items():
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-3, atol=1e-4)


def test_an_adapter_without_rows_gets_nothing():
    model = adapted()
    use_lora(model, rows=["fr", None])
    found = model(IDS[:2]).logits
    torch.testing.assert_close(found[1:], family("llama")(IDS[1:2]).logits)
    found.sum().backward()
    assert all(p.grad is None for p in lora_parameters(model, "en"))
    assert any(p.grad.count_nonzero() for p in lora_parameters(model, "fr"))


def test_a_whole_feed_forward_is_by_rows_too():
    """One adapter in use on all of its linears, which are then computed as a whole elsewhere."""
    model = family("llama")
    targets = ["gate_proj", "up_proj", "down_proj"]
    apply_lora(model, 3, target_modules=targets, name="fr", verbose=False)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    alone = by_itself(model, "fr", slice(2))
    use_lora(model, rows=["fr", None])
    found = model(IDS[:2]).logits
    torch.testing.assert_close(found[0], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1:], family("llama")(IDS[1:2]).logits)
    layer = model.model.layers[0].mlp.up_proj
    assert layer.group_part(torch.ones(2, 32)) is None
    use_lora(model, "fr")
    assert layer.group_part(torch.ones(2, 32)) is not None


def test_it_ends_with_its_block_or_with_other_names():
    model = adapted()
    with use_lora(model, "fr"):
        with use_lora(model, rows=ROWS):
            mixed = model(IDS).logits
        assert torch.equal(model(IDS).logits, by_itself(model, "fr", slice(None)))
    use_lora(model, rows=ROWS)
    with use_lora(model, "en"):
        assert lora_adapters(model) == {"fr": None, "en": 1.0}
        assert not torch.equal(model(IDS).logits, mixed)
    assert torch.equal(model(IDS).logits, mixed)
    with disable_lora(model):
        torch.testing.assert_close(model(IDS).logits, family("llama")(IDS).logits)
    use_lora(model, None)
    torch.testing.assert_close(model(IDS).logits, family("llama")(IDS).logits)


def test_copies_and_pickles_keep_it():
    model = adapted()
    use_lora(model, rows=ROWS)
    expected = model(IDS).logits
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(copied(IDS).logits, expected)


def test_dropout_of_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 8))
    for adapter, dropout in (("fr", 0.5), ("en", 0.0)):
        apply_lora(model, 2, target_modules=["0"], dropout=dropout, name=adapter, verbose=False)
    use_lora(model, ["fr", "en"])
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter)
    x = torch.randn(3, 400)
    use_lora(model, rows=["fr", "en", None])
    still = model.eval()(x)
    model.train()
    drawn = torch.stack([model(x) for _ in range(400)])
    torch.testing.assert_close(drawn[0, 1:], still[1:])
    assert drawn[:, 0].std(0).min() > 1
    off = (drawn[:, 0].mean(0) - still[0]).abs() / (drawn[:, 0].std(0) / 20)
    assert off.max() < 5


def test_sixteen_bits_and_autocast():
    model = adapted(dtype=torch.bfloat16)
    use_lora(model, rows=ROWS)
    wide = copy.deepcopy(model).float()
    assert model(IDS).logits.dtype == torch.bfloat16
    torch.testing.assert_close(model(IDS).logits.float(), wide(IDS).logits, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = wide(IDS).logits
    torch.testing.assert_close(found.float(), wide(IDS).logits, rtol=0.1, atol=0.1)


def test_the_base_is_multiplied_once():
    linear = nn.Sequential(nn.Linear(256, 256, bias=False))
    names = [f"a{i}" for i in range(6)]
    for name in names:
        apply_lora(linear, 8, target_modules=["0"], name=name, verbose=False)
    use_lora(linear, rows=names)
    x = torch.randn(6, 4, 256)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        linear(x)
    base, branch = 2 * 24 * 256 * 256, 2 * 24 * 8 * (256 + 256)
    assert counter.get_total_flops() <= base + 1.25 * branch


REFUSED = {
    "no list": (TypeError, "rows must be a list", {"rows": "fr"}),
    "a number": (TypeError, "rows must be a list", {"rows": [1]}),
    "none": (ValueError, "rows is empty", {"rows": []}),
    "an unknown one": (ValueError, "no adapter named 'de'", {"rows": ["de", None]}),
    "names too": (ValueError, "either rows or names", {"names": "fr", "rows": ["fr"]}),
    "weights too": (ValueError, "either rows or names", {"weights": 2.0, "rows": ["fr"]}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_changed(case):
    error, message, given = REFUSED[case]
    model = adapted()
    expected = model(IDS).logits
    with pytest.raises(error, match=message):
        use_lora(model, **given)
    assert torch.equal(model(IDS).logits, expected)


def test_another_number_of_rows_merging_and_removing_are_refused():
    model = adapted()
    use_lora(model, rows=ROWS)
    with pytest.raises(ValueError, match="each of 5 rows, x has shape"):
        model(IDS[:3])
    for act in (merge_lora, remove_lora):
        with pytest.raises(ValueError, match="while rows have adapters"):
            act(model)
    use_lora(model, "fr")
    merge_lora(model)


def test_experts_and_what_is_trained_whole_are_refused():
    with pytest.raises(ValueError, match="on the experts"):
        use_lora(with_experts("mixtral"), rows=["default", None])
    model = family("llama")
    wanted = {"target_modules": ["q_proj"], "verbose": False}
    apply_lora(model, 2, modules_to_save=["lm_head"], **wanted)
    with pytest.raises(ValueError, match="trains .*lm_head.* whole"):
        use_lora(model, rows=["default", None])
    assert model(TOKENS).logits.isfinite().all()
