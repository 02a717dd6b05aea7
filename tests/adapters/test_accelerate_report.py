"""What `accelerate_peft` takes, what it leaves, and what it says."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from tiny_peft import base, logits
from torch import nn

from lora_kernels import PeftReport, accelerate_peft, apply_lora

peft = pytest.importorskip("peft")

from tiny_peft_model import fill_lora, pair  # noqa: E402

from lora_kernels.adapters.peft_layer import FastLinear  # noqa: E402

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def test_the_report_says_what_and_why():
    model = nn.ModuleDict(
        {
            "plain": nn.Linear(8, 8),
            "dora": nn.Linear(8, 8),
            "sub": type("Sub", (nn.Linear,), {})(8, 8),
            "embed": nn.Embedding(8, 8),
            "hooked": nn.Linear(8, 8),
            "other": nn.Linear(8, 8),
        }
    )
    targets = ["plain", "sub", "embed", "hooked"]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets))
    model.add_adapter("default2", peft.LoraConfig(r=2, target_modules=["dora"], use_dora=True))
    model.base_model.set_adapter(["default", "default2"])
    hooked = model.base_model.model["hooked"]
    hooked.forward = hooked.forward
    state = {key: value.clone() for key, value in model.state_dict().items()}
    report = accelerate_peft(model)
    at = "base_model.model."
    assert isinstance(report, PeftReport)
    assert report.taken == (at + "plain", at + "dora")
    assert list(report.handing_over) == [at + "dora"]
    assert report.handing_over[at + "dora"] == (
        "adapter 'default2' is not plain LoRA (DoraLinearVariant)"
    )
    assert list(report.left) == [at + "sub", at + "embed", at + "hooked"]
    assert "base is a Sub" in report.left[at + "sub"]
    assert "lora.layer.Embedding, not exactly" in report.left[at + "embed"]
    assert "forward was replaced" in report.left[at + "hooked"]
    for name in report.taken:
        assert type(model.get_submodule(name)) is FastLinear
    for name in report.left:
        assert type(model.get_submodule(name)) is not FastLinear
    text = str(report)
    assert text.startswith("accelerate_peft: 2 of 5 adapter layers taken\n")
    assert "path: reference: x is on cpu" in text and repr(report) == text
    for name, reason in (report.handing_over | report.left).items():
        assert f"{reason}: {name}" in text
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_long_report_is_shortened():
    report = PeftReport(tuple("abcde"), {}, dict.fromkeys("vwxyz", "why"), "the path")
    assert "taken: a, b, c and 2 more\n" in str(report)
    assert str(report).endswith("why: v, w, x and 2 more")


def test_the_report_of_what_is_merged_now():
    _, ours = pair()
    accelerate_peft(ours, undo=True)
    ours.merge_adapter()
    report = accelerate_peft(ours)
    assert len(report.taken) == len(report.handing_over) == 6 and not report.path
    reason = "an adapter is merged into its weight"
    assert f"PEFT serves their calls for now: 6\n    {reason}: base_model." in str(report)


def test_refusals():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got dict"):
        accelerate_peft({})
    with pytest.raises(ValueError, match="no PEFT adapter layer; call peft.get_peft_model first"):
        accelerate_peft(base("llama"))
    own = base("llama")
    apply_lora(own, target_modules=["q_proj"], verbose=False)
    with pytest.raises(ValueError, match="which needs no acceleration"):
        accelerate_peft(own)


def test_other_tuners_are_left():
    model = peft.get_peft_model(
        base("llama"), peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[])
    )
    expected = logits(model)
    report = accelerate_peft(model)
    assert not report.taken and len(report.left) == 2 and not report.path
    assert all("tuners.ia3.layer.Linear" in reason for reason in report.left.values())
    assert str(report).startswith("accelerate_peft: 0 of 2 adapter layers taken\n  left to PEFT: 2")
    assert torch.equal(logits(model), expected)


def test_transposed_weights_of_gpt2_are_left():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64)).eval()
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    model = fill_lora(peft.get_peft_model(model, peft.LoraConfig(r=2, **settings)))
    expected = logits(model)
    report = accelerate_peft(model)
    assert list(report.left.values()) == ["its weight is transposed (fan_in_fan_out)"]
    assert torch.equal(logits(model), expected)


def test_the_package_needs_no_peft(tmp_path):
    package = tmp_path / "peft" / "tuners" / "lora"
    package.mkdir(parents=True)
    for directory in (package, package.parent, package.parent.parent):
        (directory / "__init__.py").write_text("")
    (package / "layer.py").write_text("class Linear: pass")  # as before 0.17, say
    (package.parent / "tuners_utils.py").write_text("class BaseTunerLayer: pass")
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import torch, lora_kernels\n"
        "assert 'peft' not in sys.modules\n"
        "for hide in (False, True):\n"
        "    if hide: sys.modules['peft'] = None\n"
        "    try: lora_kernels.accelerate_peft(torch.nn.Linear(2, 2))\n"
        "    except ImportError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("accelerate_peft needs peft 0.17 or newer (") for line in lines)
    assert all(line.endswith("pip install --upgrade peft") for line in lines)
