"""MiniMindLM under transformers' Trainer: accumulated batches make the step of their union."""

from __future__ import annotations

import pytest
import torch
from tiny_minimind import (
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)

from lora_kernels import apply_lora, mark_only_lora_as_trainable

LENGTHS = (5, 11, 8, 15)


class Samples(torch.utils.data.Dataset):
    """Four samples of equal shape, of which more or less is learnt."""

    def __len__(self):
        return len(LENGTHS)

    def __getitem__(self, index):
        tokens = ids(1, 16, seed=index)[0]
        labels = tokens.clone()
        labels[LENGTHS[index] :] = -100
        return {"input_ids": tokens, "labels": labels}


def step(directory, size, accumulate, lora):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = tiny()
    if lora:
        apply_lora(model, 4, target_modules="all-linear", verbose=False)
        mark_only_lora_as_trainable(model)
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    arguments = transformers.TrainingArguments(
        str(directory),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        max_steps=1,
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        max_grad_norm=0,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    batch = torch.utils.data.default_collate(list(Samples()))
    expected = model(**batch).loss.item()
    trainer = transformers.Trainer(model, arguments, train_dataset=Samples())
    loss = trainer.train().training_loss
    assert loss == pytest.approx(expected, rel=1e-5)
    return torch.cat([p.detach().flatten() for p in model.parameters()]) - before


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("lora", [False, True])
def test_accumulated_batches_make_the_step_of_one(tmp_path, lora):
    whole, parts = (step(tmp_path, *sizes, lora) for sizes in ((4, 1), (1, 4)))
    assert whole.norm() > 0
    assert (whole - parts).norm() < 1e-5 * whole.norm()


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_the_count_of_the_whole_batch_takes_the_place_of_its_own(masked, as_tensor):
    model, tokens = tiny(), ids(2, 8)
    labels = tokens.clone()
    labels[0, 5:] = -100
    mask = {"loss_mask": (labels != -100).long()} if masked else {}
    own = int((labels[:, 1:] != -100).sum())
    count = torch.tensor(30) if as_tensor else 30
    mean = model(input_ids=tokens, labels=labels, **mask).loss
    share = model(input_ids=tokens, labels=labels, num_items_in_batch=count, **mask).loss
    torch.testing.assert_close(share, mean * own / 30)


def test_a_batch_with_nothing_to_learn_is_worth_nothing():
    model, tokens = tiny(), ids(2, 8)
    out = model(input_ids=tokens, labels=torch.full_like(tokens, -100), num_items_in_batch=0)
    assert out.loss == 0 and out.loss.requires_grad
