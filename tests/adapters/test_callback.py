"""transformers' Trainer with the adapter beside its checkpoints, and resumed from one."""

from __future__ import annotations

import pytest
import torch
from tiny_peft import base, logits

from lora_kernels import (
    LoRACallback,
    apply_lora,
    load_lora,
    lora_state_dict,
    mark_only_lora_as_trainable,
)


def adapted():
    model = base("qwen2")
    apply_lora(model, 4, alpha=8, target_modules=["q_proj"], verbose=False)
    mark_only_lora_as_trainable(model)
    return model


def trainer(model, directory, steps, callback):
    from transformers import Trainer, TrainingArguments

    row = torch.arange(8)
    data = [{"input_ids": row + i, "labels": row + i} for i in range(16)]
    arguments = TrainingArguments(
        str(directory),
        max_steps=steps,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        logging_strategy="no",
    )
    return Trainer(model, arguments, train_dataset=data, callbacks=[callback])


@pytest.mark.parametrize("name", ["lora.safetensors", "adapter"])
def test_the_adapter_lies_beside_each_checkpoint_and_in_the_end(tmp_path, name):
    model = adapted()
    callback = LoRACallback() if name == "lora.safetensors" else LoRACallback(name)
    trainer(model, tmp_path, 4, callback).train()
    inner = () if name == "lora.safetensors" else (name,)
    for step, directory in ((2, "checkpoint-2"), (4, "checkpoint-4"), (4, "")):
        fresh = base("qwen2")
        load_lora(fresh, tmp_path.joinpath(directory, *inner))
        assert fresh.model.layers[0].self_attn.q_proj.scale == 2
        assert torch.equal(logits(fresh), logits(model)) == (step == 4)


def test_training_goes_on_from_a_checkpoint_as_if_it_had_not_stopped(tmp_path):
    through, stopped, resumed = adapted(), adapted(), adapted()
    trainer(through, tmp_path / "a", 4, LoRACallback()).train()
    trainer(stopped, tmp_path / "b", 2, LoRACallback()).train()
    checkpoint = tmp_path / "b" / "checkpoint-2"
    trainer(resumed, tmp_path / "b", 4, LoRACallback()).train(resume_from_checkpoint=checkpoint)
    expected, halfway = lora_state_dict(through), lora_state_dict(stopped)
    for key, tensor in lora_state_dict(resumed).items():
        assert torch.equal(tensor, expected[key]) and not torch.equal(tensor, halfway[key])


def test_a_model_without_lora_is_refused_before_it_trains(tmp_path):
    model = base("qwen2")
    with pytest.raises(ValueError, match="no LoRALinear"):
        trainer(model, tmp_path, 2, LoRACallback()).train()
