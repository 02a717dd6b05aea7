"""Losses and gradients that are no numbers: named, or passed over and counted."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from tiny_minimind import one_thread  # noqa: F401 - acts by itself

from minimind.data.sft import SFTDataset
from minimind.data.tokenizer import load_tokenizer
from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM
from minimind.settings import TrainingConfig
from minimind.training import loop
from minimind.training.bad_steps import refuse_other_moments, samples_in_words
from minimind.training.loop import Progress, Trainer, TrainingError
from minimind.training.report import Report

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def dataset():
    """Seven samples, each of another length."""
    counts = (1, 30, 4, 2, 17, 9, 5)
    answers = [{"role": "assistant", "content": " ".join(["tea"] * n)} for n in counts]
    questions = [{"role": "user", "content": "q"} for _ in counts]
    return SFTDataset(list(zip(questions, answers, strict=True)), load_tokenizer())


def build():
    torch.manual_seed(1)
    return MiniMindLM(LMConfig(dim=32, n_layers=1, n_heads=4, n_kv_heads=2))


def train(model, dataset, dtype=torch.float32, **settings):
    config = TrainingConfig(**{"epochs": 1, "batch_size": 2, **settings})
    return Trainer(model, list(model.parameters()), dataset, config, CPU, dtype)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Spoilt(torch.nn.Module):
    """The model, with a loss that is no number wherever a row has one of these lengths."""

    def __init__(self, model, lengths):
        super().__init__()
        self.model, self.lengths = model, lengths

    def forward(self, x, labels, loss_mask):
        output = self.model(x, labels=labels, loss_mask=loss_mask)
        supervised = loss_mask[:, 1:].sum(1).tolist()
        if self.lengths & set(supervised):
            output.loss = output.loss * math.nan
        return output


def spoilt(dataset, *numbers, **settings):
    lengths = {int(dataset[n][2][1:].sum()) for n in numbers}
    model = Spoilt(build(), lengths)
    return model, train(model, dataset, **settings)


def steps_with(trainer, numbers):
    """Steps from 1 whose samples have one of ``numbers``, and their samples."""
    k = trainer.config.accumulation_steps
    batches = list(trainer.batches)
    windows = [sum(batches[at : at + k], []) for at in range(0, len(batches), k)]
    return {n: w for n, w in enumerate(windows, 1) if set(numbers) & set(w)}


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("epoch", [0, 1])
def test_step_and_sample_are_named(dataset, accumulation, epoch):
    _, trainer = spoilt(dataset, 4, accumulation_steps=accumulation, epochs=2)
    trainer.batches.set_epoch(epoch)
    ((step, samples),) = steps_with(trainer, [4]).items()
    trainer.step = epoch * trainer.steps_per_epoch  # as if the epochs before had been good
    step += trainer.step
    with pytest.raises(TrainingError) as caught:
        trainer.run()
    said = str(caught.value)
    assert f"at step {step};" in said and f"the weights are those of step {step - 1}" in said
    if len(samples) > 1:
        assert f"the step read {len(samples)} samples, 4 without a finite loss" in said
    else:
        assert "the step read samples 4 (" in said


def test_bad_steps_are_passed_over_and_counted(dataset):
    model, trainer = spoilt(dataset, 4, skip_bad_steps=True, lr=1e-2, epochs=2)
    before, seen = snapshot(model), []
    trainer.batches.set_epoch(0)
    first = steps_with(trainer, [4])

    def after(progress):
        now = snapshot(model)
        same = all(torch.equal(now[name], before[name]) for name in now)
        seen.append((progress.step, progress.skipped, same))
        before.update(now)

    trainer.run(after)
    assert trainer.skipped == 2 == sum(skipped for _, skipped, _ in seen)
    assert all(skipped is same for _, skipped, same in seen)
    assert [n for n, skipped, _ in seen if skipped][0] == next(iter(first))
    assert all(t.isfinite().all() for t in snapshot(model).values())
    state = copy.deepcopy(trainer.state_dict())
    _, other = spoilt(dataset, 4, skip_bad_steps=True, lr=1e-2, epochs=2)
    other.load_state_dict(state)
    assert other.skipped == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_too_many_in_a_row_end_the_run(dataset, dtype, monkeypatch):
    """Also float16's, which its scaler would skip for ever."""
    monkeypatch.setattr(loop, "MOST_SKIPPED", 3)
    model = build()
    if dtype == torch.float32:
        with torch.no_grad():
            model.norm.weight[3] = math.nan
    else:
        model.norm.weight.register_hook(lambda grad: grad * math.inf)
    trainer = train(model, dataset, dtype, epochs=3, skip_bad_steps=dtype == torch.float32)
    with pytest.raises(TrainingError, match="3 steps in a row were skipped, up to step 3"):
        trainer.run()


def test_the_scaler_of_float16_is_reported(dataset):
    model = build()
    trainer = train(model, dataset, dtype=torch.float16)
    hook, seen = iter([True]), []
    model.norm.weight.register_hook(lambda g: g * math.inf if next(hook, False) else g)
    trainer.run(seen.append)
    skipped = list(itertools.accumulate(p.skipped for p in seen))
    assert seen[0].skipped and not seen[1].skipped
    assert [p.scale for p in seen] == [2.0 ** (16 - n) for n in skipped]  # halved at each
    assert trainer.skipped == skipped[-1]


def progress(step, loss, **more):
    return Progress(step, 4, 1, loss, 0.0, 1e-3, 10, 0.5, **more)


def test_records_leave_out_what_is_no_number_and_say_how_many(tmp_path):
    (tmp_path / "out").mkdir()
    with Report(tmp_path / "out", 0, 4, 2) as report:
        report.step(progress(1, 3.0))
        report.step(progress(2, math.nan, skipped=True))
        report.step(progress(3, math.nan, skipped=True, scale=8.0))
        report.step(progress(4, math.inf, skipped=True, scale=4.0))
    first, second = report.rows
    assert (first["loss"], first["skipped_steps"]) == (3.0, 1) and "loss_scale" not in first
    assert (second["loss"], second["skipped_steps"], second["loss_scale"]) == (None, 2, 4.0)
    assert "NaN" not in (tmp_path / "out" / "metrics.jsonl").read_text()


def test_many_samples_are_counted():
    assert samples_in_words(None, range(20), [], torch.device("cpu")).endswith(
        "14, 15 and 4 more (counted from 0)"
    )


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["state"][0].update(exp_avg=torch.zeros(3)),
        lambda s: s["state"][0].update(exp_avg_sq=None),
        lambda s: s["state"][0].update(step=torch.zeros(2)),
        lambda s: s["param_groups"][0].update(betas=(0.5, 0.5)),
        lambda s: s["param_groups"][0].update(params=[0]),
        lambda s: s["param_groups"].append({}),
        lambda s: s["state"].update({99: s["state"][0]}),
        lambda s: s.pop("state"),
    ],
)
def test_moments_of_other_parameters_are_refused(change):
    parameters = [torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(4))]
    optimizer = torch.optim.AdamW(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    refuse_other_moments(state, optimizer, parameters)
    change(state)
    with pytest.raises((ValueError, LookupError)):
        refuse_other_moments(state, optimizer, parameters)
