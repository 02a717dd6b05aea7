"""`apply_lora` on transformers models: what PEFT computes with the same A and B."""

from __future__ import annotations

import pytest
import torch
from tiny_families import (
    FAMILIES,
    assert_rounding_apart,
    both,
    error,
    factors,
    family,
    results,
    truth_of,
)
from tiny_peft import TOKENS

from lora_kernels import accelerate_peft, apply_lora, disable_lora, merge_lora
from lora_kernels.proof.closeness import MULTIPLE

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_and_gradients_equal_pefts(name):
    ours, theirs = both(name)
    assert list(factors(ours)) == list(factors(theirs)) and len(factors(ours)) == FAMILIES[name][3]
    expected = results(theirs)
    assert_rounding_apart(results(ours), expected)
    # And PEFT's model itself on these kernels.
    assert len(accelerate_peft(theirs).taken) == FAMILIES[name][3]
    assert_rounding_apart(results(theirs), expected)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_in_bfloat16(name, wide):
    ours, theirs = both(name, torch.bfloat16, wide=wide)
    truth, expected = truth_of(theirs), results(theirs)
    got = results(ours)
    assert {k: v.dtype for k, v in got.items()} == {k: v.dtype for k, v in expected.items()}
    if wide:  # PEFT multiplies in the factors' dtype, we in x's: that one's rounding is the budget
        for key, parameter in theirs.named_parameters():
            parameter.data = parameter.data.bfloat16() if ".lora_" in key else parameter.data
        expected = results(theirs)
    factors_in = {v.dtype for k, v in got.items() if k.endswith((" A", " B"))}
    assert factors_in == {torch.float32 if wide else torch.bfloat16}
    assert error(got, truth) <= MULTIPLE * error(expected, truth) < 0.2


@pytest.mark.parametrize("name", FAMILIES)
def test_disabled_it_is_the_base_and_merged_it_is_the_same(name):
    ours, _ = both(name)
    with torch.no_grad():
        base, adapted = family(name).eval()(TOKENS).logits, ours.eval()(TOKENS).logits
        with disable_lora(ours):
            assert torch.equal(ours(TOKENS).logits, base)
        assert (adapted - base).abs().max() > 1e-2
        merge_lora(ours)
        torch.testing.assert_close(ours(TOKENS).logits, adapted, rtol=0, atol=1e-5)
    assert ours.state_dict().keys() == family(name).state_dict().keys()


def test_generation_gives_pefts_tokens():
    ours, theirs = (model.eval() for model in both("llama"))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    expected = theirs.generate(input_ids=TOKENS, **options)
    assert torch.equal(ours.generate(input_ids=TOKENS, **options), expected)
    assert not torch.equal(family("llama").eval().generate(TOKENS, **options), expected)


def test_fused_experts_are_no_linears_and_said_to_be_none():
    model = family("qwen2_moe")
    if any(n.endswith("experts.0.gate_proj") for n, _ in model.named_modules()):
        pytest.skip("transformers before version 5 has an nn.Linear for each expert")
    with pytest.raises(ValueError, match="experts.gate_up_proj' is a parameter by itself"):
        apply_lora(model, target_modules=["gate_up_proj"])
    names = apply_lora(model, target_modules="all-linear", verbose=False)
    assert not any(".experts." in name for name in names)
    assert sum("self_attn" in name for name in names) == 8
