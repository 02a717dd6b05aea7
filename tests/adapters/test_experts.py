"""LoRA on the fused experts of transformers 5: put in, computed, taken out, and as PEFT has it."""

from __future__ import annotations

import copy
import pickle
import warnings

import pytest
import torch
from tiny_experts import (
    FAMILIES,
    PARAMETERS,
    both,
    fill,
    mixture,
    our_factors,
    our_results,
    peft_results,
    with_experts,
)
from tiny_families import assert_rounding_apart
from tiny_peft import TOKENS
from torch.utils.flop_counter import FlopCounterMode

from lora_kernels import (
    LoRAConfig,
    apply_lora,
    disable_lora,
    lora_adapters,
    lora_layers,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
    use_lora,
)
from lora_kernels.adapters import experts, merging

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # PEFT
EVERY = pytest.mark.parametrize("family", FAMILIES)


def logits(model):
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("parameters", [PARAMETERS, ["gate_up_proj"], ["down_proj"]], ids="+".join)
@EVERY
def test_outputs_and_gradients_are_pefts(family, parameters):
    ours, theirs = both(family, parameters=parameters)
    assert_rounding_apart(our_results(ours), peft_results(theirs))


@EVERY
def test_a_fresh_adapter_changes_nothing_and_the_base_is_the_models_own(family):
    model = mixture(family)
    before, weights = logits(model), copy.deepcopy(model.state_dict())
    names = apply_lora(model, 3, target_parameters=PARAMETERS, verbose=False)
    assert names and all(name.endswith(tuple(PARAMETERS)) for name in names)
    torch.testing.assert_close(logits(model), before)
    for key, value in weights.items():
        assert torch.equal(model.state_dict()[key], value), key
    fill(model)
    assert not torch.allclose(logits(model), before, atol=1e-3)
    with disable_lora(model):
        assert torch.equal(logits(model), before)
    assert remove_lora(model)
    assert torch.equal(logits(model), before)
    assert list(model.state_dict()) == list(weights)
    assert not any("LoRA" in type(module).__name__ for module in model.modules())


@EVERY
def test_merging(family):
    model = with_experts(family)
    expected, weights = logits(model), copy.deepcopy(model.state_dict())
    with merged_lora(model):
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key
    assert merge_lora(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    assert not any("LoRA" in type(module).__name__ for module in model.modules())


@EVERY
def test_copies_and_pickles_compute_the_same_and_are_their_own(family):
    model = with_experts(family)
    expected = logits(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(copied), expected)
        assert torch.equal(logits(copied.float()), expected)
        fill(copied, seed=6)
        assert not torch.equal(logits(copied), expected)
        assert torch.equal(logits(model), expected)
        merge_lora(copied)
        assert torch.equal(logits(model), expected)


def test_experts_without_a_token_have_gradients_of_exactly_zero():
    model = with_experts("qwen3_moe")
    some = torch.tensor([2, 0])
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda *args: (*args[2][:2], some.expand(12, 2)))
    our_results(model)
    for key, pair in our_factors(model).items():
        for factor in pair:
            hit = [expert for expert in range(4) if factor.grad[expert].count_nonzero()]
            assert hit == [0, 2], key


@EVERY
def test_flops_are_the_bases_and_the_branchs_own(family):
    def flops(model):
        x = torch.randn(2, 6, 32, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            model(inputs_embeds=x).logits.sum().backward()
        return counter.get_total_flops()

    base = mixture(family).requires_grad_(False)
    base.set_experts_implementation("eager")
    frozen = flops(base)
    model = with_experts(family)
    branch = 0
    for a, b in our_factors(model).values():
        branch += 3 * 2 * 12 * 2 * a.shape[1] * (a.shape[2] + b.shape[1])
    assert flops(model) <= 1.02 * frozen + branch


def test_what_is_asked_for_is_what_is_adapted():
    model = with_experts(
        "qwen3_moe", target_modules=["q_proj"], parameters=["mlp.experts.down_proj"]
    )
    names = list(lora_layers(model))
    assert len(names) == 4
    assert sum(name.endswith("q_proj") for name in names) == 2
    assert "rank=3" in repr(model.model.layers[0].mlp.experts)
    assert sum(p.requires_grad for p in model.parameters()) == 8 == len(lora_parameters(model))
    ranks = {"layers.1.mlp.experts.down_proj": 5}
    config = LoRAConfig(target_parameters=PARAMETERS, target_modules=[], rank_pattern=ranks)
    other = mixture("qwen3_moe")
    apply_lora(other, config=config, verbose=False)
    shapes = {key: a.shape[1] for key, (a, _) in our_factors(other).items()}
    assert sorted(shapes.values()) == [5, 16, 16, 16]
    assert shapes["model.layers.1.mlp.experts.down_proj"] == 5


def test_excluded_experts_are_left():
    model = mixture("qwen3_moe")
    wanted = {"target_parameters": PARAMETERS, "verbose": False}
    names = apply_lora(model, exclude_modules=["layers.0.mlp.experts.down_proj"], **wanted)
    assert len(names) == 3
    other = mixture("qwen3_moe")
    assert len(apply_lora(other, exclude_modules=r".*\.layers\.0\..*", **wanted)) == 2
    with pytest.raises(ValueError, match="leaves none of the parameters"):
        apply_lora(mixture("qwen3_moe"), exclude_modules=PARAMETERS, **wanted)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_several_adapters(dropout):
    """Each by itself, and both together, whose branches add up."""
    model = with_experts("mixtral")
    only_first = logits(model)
    more = {"target_parameters": ["down_proj"], "dropout": dropout, "verbose": False}
    apply_lora(model, 2, name="other", **more)
    assert torch.equal(logits(model), only_first)
    use_lora(model, "other")
    fill(model, seed=7)
    mark_only_lora_as_trainable(model, "other")
    only_other = logits(model)
    use_lora(model, ["default", "other"], weights=[1.0, 0.5])
    assert lora_adapters(model) == {"default": 1.0, "other": 0.5}
    together = logits(model)
    assert not torch.allclose(together, only_first, atol=1e-3)
    assert not torch.allclose(together, only_other, atol=1e-3)
    merged = copy.deepcopy(model)
    merge_lora(merged)
    torch.testing.assert_close(logits(merged), together, rtol=1e-4, atol=1e-4)
    remove_lora(model, "other")
    use_lora(model, "default")
    assert torch.equal(logits(model), only_first)
    with use_lora(model, None):
        torch.testing.assert_close(logits(model), logits(mixture("mixtral")))


def test_dropout_is_of_training_alone():
    model = with_experts("qwen3_moe", dropout=0.5)
    assert torch.equal(logits(model), logits(with_experts("qwen3_moe")))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    y = model(TOKENS).logits
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lora_parameters(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bits_with_wide_factors(dtype):
    model = with_experts("qwen3_moe", dtype)
    assert all(p.dtype == torch.float32 for p in lora_parameters(model))
    found = our_results(model)
    truth = our_results(copy.deepcopy(model).float())
    assert found["logits"].dtype == dtype
    for key, value in truth.items():
        error = (found[key].float() - value).norm() / value.norm()
        assert error < 0.15, (key, error)


def test_autocast():
    model = with_experts("gpt_oss")
    expected = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        found = logits(model)
    torch.testing.assert_close(found.float(), expected, rtol=0.1, atol=0.1)


def test_checkpointing_gives_the_same_gradients():
    model = with_experts("qwen3_moe", dropout=0.3).train()
    torch.manual_seed(0)
    plain = our_results(model)
    grads = {key: value.clone() for key, value in plain.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers 5 renames the call
        model.gradient_checkpointing_enable({"use_reentrant": False})
    torch.manual_seed(0)
    for key, value in our_results(model).items():
        torch.testing.assert_close(value, grads[key], msg=lambda m, k=key: f"{k}: {m}")


# dynamo itself makes an instance of the Function, which torch deprecates.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole():
    model = with_experts("qwen3_moe")
    experts = model.model.layers[0].mlp.experts
    x, chosen = torch.randn(6, 32, requires_grad=True), torch.randint(4, (6, 2))
    weights = torch.rand(6, 2)
    expected = experts(x, chosen, weights)
    expected.sum().backward()
    grads = [x.grad, *(p.grad.clone() for p in lora_parameters(model) if p.grad is not None)]
    x.grad = None
    model.zero_grad()
    y = torch.compile(experts, backend="aot_eager", fullgraph=True)(x, chosen, weights)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    again = [x.grad, *(p.grad for p in lora_parameters(model) if p.grad is not None)]
    assert len(again) == 5
    for a, b in zip(again, grads, strict=True):
        torch.testing.assert_close(a, b)


class Strange(torch.nn.Module):
    """Experts that say nothing of how they are kept."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.Module()
        self.experts.gate_up_proj = torch.nn.Parameter(torch.ones(2, 6, 4))
        self.proj = torch.nn.Linear(4, 4)


REFUSED = {
    "no such": (ValueError, "did you mean", lambda: mixture("mixtral"), ["gate_up_pro"]),
    "nothing": (ValueError, "no such experts", lambda: torch.nn.Linear(3, 3), ["down"]),
    "a linear's": (TypeError, "target_modules", lambda: mixture("mixtral"), ["q_proj.weight"]),
    "no flags": (TypeError, "transformers 5", Strange, ["gate_up_proj"]),
    "text": (TypeError, "put it into a list", Strange, "gate_up_proj"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_and_nothing_changed(case):
    error, message, make, targets = REFUSED[case]
    model = make()
    before = list(model.state_dict())
    with pytest.raises(error, match=message):
        apply_lora(model, target_parameters=targets, verbose=False)
    assert list(model.state_dict()) == before and not lora_layers(model)


def spoil(name):
    model = mixture("qwen3_moe")
    experts = model.model.layers[1].mlp.experts
    if name == "a flag that is new":
        experts.has_rotation = True
    else:
        experts.forward = lambda *args: args[0]
    return model


@pytest.mark.parametrize(
    ("name", "message"),
    [("a flag that is new", "has_rotation"), ("a forward of its own", "been replaced")],
)
def test_experts_that_compute_something_else_are_refused(name, message):
    model = spoil(name)
    with pytest.raises(TypeError, match=f"layers.1.mlp.experts.*{message}"):
        apply_lora(model, target_parameters=PARAMETERS, verbose=False)
    assert not lora_layers(model)


def test_a_second_application_and_modules_trained_whole_are_refused():
    model = with_experts("qwen3_moe")
    with pytest.raises(ValueError, match="carries LoRA already"):
        apply_lora(model, target_parameters=PARAMETERS, verbose=False)
    with pytest.raises(ValueError, match="trained whole"):
        apply_lora(
            mixture("qwen3_moe"),
            target_parameters=PARAMETERS,
            modules_to_save=["experts"],
            verbose=False,
        )


@pytest.mark.parametrize("act", ["apply", "merge", "remove"])
def test_what_is_stopped_midway_leaves_the_model_as_it_was_or_computing_the_same(act, monkeypatch):
    """Memory that runs out at any of the steps; the classes of the modules come back as well."""

    def classes(model):
        return [type(module) for module in model.modules()]

    for stop in range(20):
        model = mixture("qwen3_moe") if act == "apply" else with_experts("qwen3_moe")
        expected, before = logits(model), classes(model)
        calls = iter(range(100))

        def stopped(*args, real=experts.put, stop=stop, calls=calls):
            if next(calls) == stop:
                raise MemoryError
            real(*args)

        with monkeypatch.context() as patch:
            for module in (experts, merging):
                patch.setattr(module, "put", stopped)
            try:
                if act == "apply":
                    apply_lora(model, 3, target_parameters=PARAMETERS, verbose=False)
                elif act == "merge":
                    merge_lora(model)
                else:
                    remove_lora(model)
            except MemoryError:
                torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
                if act != "merge":  # which may have merged some of the layers
                    assert classes(model) == before
                continue
        assert stop == 4  # as many steps as parameters
        break
    else:
        raise AssertionError("it never ended")
