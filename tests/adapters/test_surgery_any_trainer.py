"""Models with LoRA under other people's training loops: what PEFT's model does there."""

from __future__ import annotations

import os

import pytest
import torch
from tiny_families import both, factors
from tiny_peft import TOKENS, recompute_activations

from lora_kernels import lora_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # PEFT asks
    # dynamo itself makes an instance of the Function, which torch deprecates.
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
]

SAMPLES = [{"input_ids": TOKENS[i % 2], "labels": TOKENS[i % 2]} for i in range(16)]


@pytest.fixture(autouse=True)
def _fresh_state():
    """accelerate keeps its settings for the process and in the environment; dynamo its code."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    state = pytest.importorskip("accelerate").state
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()
    torch._dynamo.reset()


def trainer(model, directory, **settings):
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        str(directory),
        **{
            "use_cpu": True,
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "dataloader_pin_memory": False,
            **settings,
        },
    )
    return transformers.Trainer(model, arguments, train_dataset=SAMPLES)


def train(model, directory, resume=None, **settings):
    """The loss of each step."""
    run = trainer(model, directory, **settings)
    run.train(resume_from_checkpoint=resume)
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def checkpointing(use_reentrant):
    transformers = pytest.importorskip("transformers")
    name = "activation_checkpointing"
    if not hasattr(transformers.TrainingArguments, name):  # before version 5
        name = "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": use_reentrant}}


# name: the Trainer's settings, how far apart the losses may be
SETTINGS = {
    "float32": ({}, 1e-5),
    "bfloat16": ({"bf16": True}, 1e-2),
    "checkpointing": (checkpointing(False), 1e-5),
    "checkpointing in bfloat16": ({"bf16": True, **checkpointing(False)}, 1e-2),
    "reentrant checkpointing": (checkpointing(True), 1e-5),
    "compiled": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-5),
}
CASES = [pytest.param(c, marks=pytest.mark.slow) if c == "compiled" else c for c in SETTINGS]


@pytest.mark.parametrize("case", CASES)
def test_transformers_trainer_trains_as_it_trains_peft(tmp_path, case):
    settings, tolerance = SETTINGS[case]
    ours, theirs = both("llama")
    frozen = {n: p.clone() for n, p in ours.named_parameters() if not p.requires_grad}
    start = {name: (a.clone(), b.clone()) for name, (a, b) in factors(ours).items()}
    for model in (ours, theirs):
        if "reentrant" in case:
            model.enable_input_require_grads()
    expected = train(theirs, tmp_path / "theirs", **settings)
    losses = train(ours, tmp_path / "ours", **settings)
    assert len(losses) == 4 and losses[-1] < losses[0] - 0.05
    assert losses == pytest.approx(expected, rel=tolerance)
    moved = torch.stack([(a - start[n][0]).norm() for n, (a, _) in factors(ours).items()])
    assert (moved > 0).all()
    apart = sum((a - factors(theirs)[n][0]).norm() for n, (a, _) in factors(ours).items())
    assert apart < (0.3 if "bf16" in settings else 0.01) * moved.sum()
    assert all(torch.equal(dict(ours.named_parameters())[n], p) for n, p in frozen.items())


def test_a_resumed_trainer_ends_where_it_would_have(tmp_path):
    (whole, _), (first, _), (second, _) = both("qwen2"), both("qwen2"), both("qwen2")
    expected = train(whole, tmp_path / "whole")
    train(first, tmp_path / "parts", save_strategy="steps", save_steps=2)
    losses = train(second, tmp_path / "parts", resume=str(tmp_path / "parts" / "checkpoint-2"))
    assert losses == pytest.approx(expected, rel=1e-6)
    for a, b in zip(lora_parameters(second), lora_parameters(whole), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_replays_dropout(use_reentrant):
    gradients = []
    for checkpointed in (False, True):
        model = both("llama", dropout=0.3)[0].train()
        if checkpointed:
            recompute_activations(model, use_reentrant)
            if use_reentrant:
                model.enable_input_require_grads()
        torch.manual_seed(4)
        model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        gradients.append([p.grad for p in lora_parameters(model)])
    for plain, again in zip(*gradients, strict=True):
        assert plain.abs().max() > 0
        torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_as_it_trains_peft(precision):
    accelerate = pytest.importorskip("accelerate")
    losses = []
    for model in both("mistral"):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = accelerate.Accelerator(
            cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
        )
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=2e-2)
        batches = torch.utils.data.DataLoader(SAMPLES, batch_size=2)
        model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
        of_model = []
        for batch in batches:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            of_model.append(loss.item())
        losses.append(of_model)
    ours, theirs = losses
    assert ours[-1] < ours[0] - 0.05
    assert ours == pytest.approx(theirs, rel=1e-5 if precision == "no" else 1e-2)


@pytest.mark.slow
def test_a_compiled_model_trains_as_pefts():
    losses = []
    for model in both("qwen2"):
        run = torch.compile(model, backend="aot_eager", fullgraph=True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
        of_model = []
        for _ in range(3):
            loss = run(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            of_model.append(loss.item())
        losses.append(of_model)
    ours, theirs = losses
    assert ours[-1] < ours[0] - 0.05
    assert ours == pytest.approx(theirs, rel=1e-5)
