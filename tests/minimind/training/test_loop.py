"""The training loop: schedule, accumulation, clipping, resume points, evaluation."""

from __future__ import annotations

import copy
import io
import math

import pytest
import torch
import torch.nn.functional as F
from tiny_minimind import one_thread  # noqa: F401 - acts by itself
from torch import nn

from lora_kernels import apply_lora, lora_parameters
from minimind.data.sft import LengthGroupedBatches, SFTDataset
from minimind.data.tokenizer import load_tokenizer
from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM
from minimind.settings import TrainingConfig
from minimind.training.loop import Trainer, TrainingError, evaluate, learning_rate, steps_per_epoch

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums are only taken in another order


@pytest.fixture(scope="module")
def dataset():
    """Seven samples with 2 to 32 supervised tokens, so that a mean of means is a wrong mean."""
    counts = (1, 30, 4, 2, 17, 9, 5)
    answers = [{"role": "assistant", "content": " ".join(["tea"] * n)} for n in counts]
    questions = [{"role": "user", "content": "q" * i} for i in range(len(counts))]
    made = SFTDataset(list(zip(questions, answers, strict=True)), load_tokenizer())
    # The top bit is the mask.
    made.store.tokens[made.store.offsets[3]] |= (
        1 << 15
    )  # nothing predicts the first token, so it must not count
    return made


def build(dtype=torch.float64, **changes):
    torch.manual_seed(1)
    sizes = {"dim": 32, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6400}
    model = MiniMindLM(LMConfig(**sizes, **changes)).to(dtype)
    with torch.no_grad():  # larger than initial values, so that every part has a gradient to show
        for parameter in model.parameters():
            parameter.mul_(5 if parameter.ndim > 1 else 1)
    return model


def train(model, dataset, parameters=None, dtype=torch.float32, **settings):
    config = TrainingConfig(**{"epochs": 1, "batch_size": 2, "grad_clip": 0.0, **settings})
    parameters = list(model.parameters()) if parameters is None else parameters
    return Trainer(model, parameters, dataset, config, CPU, dtype)


def snapshot(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def on_every_step(trainer, function):
    """Call ``function()`` just before each optimizer step, when gradients are final."""
    trainer.optimizer.register_step_pre_hook(lambda *_: function())


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def windows(dataset, config, epoch=0):
    """The batches of sample indices of each optimizer step."""
    batches = LengthGroupedBatches(dataset.lengths, config.batch_size, config.seed)
    batches.set_epoch(epoch)
    order, k = list(batches), config.accumulation_steps
    return [order[i : i + k] for i in range(0, len(order), k)]


def reference(model, dataset, batches, aux_weight=1.0):
    """Gradients and both losses of ``batches`` as one step, from a copy of the model."""
    twin = copy.deepcopy(model).train()
    twin.zero_grad(set_to_none=True)
    items = (zip(*dataset.__getitems__(batch), strict=True) for batch in batches)
    batches = [[torch.stack(column) for column in columns] for columns in items]
    counts = [int(mask[:, 1:].sum()) for _, _, mask in batches]
    loss = aux_loss = 0.0
    for (x, y, mask), count in zip(batches, counts, strict=True):
        output = twin(x, labels=y, loss_mask=mask)
        loss += output.loss * (count / sum(counts))
        aux_loss += output.aux_loss / len(batches)
    (loss + aux_weight * aux_loss).backward()
    return grads(twin), loss.item(), aux_loss.item()


def assert_same(ours, theirs):
    assert ours
    torch.testing.assert_close(ours, theirs, **EXACT)  # of dictionaries, by their keys


# --- schedule -------------------------------------------------------------------------------------


def test_learning_rate_is_the_originals():
    printed = [f"{learning_rate(step, 5, 5e-4):.8f}" for step in range(1, 6)]
    assert printed == ["0.00050225", "0.00037725", "0.00022275", "0.00009775", "0.00005000"]


def test_warm_up():
    plain = [learning_rate(step, 10, 1.0) for step in range(1, 11)]
    warm = [learning_rate(step, 10, 1.0, warmup_steps=4) for step in range(1, 11)]
    factors = [0.25, 0.5, 0.75] + [1.0] * 7
    assert warm == pytest.approx([f * rate for f, rate in zip(factors, plain, strict=True)], 1e-15)
    assert learning_rate(1, 10, 1.0, warmup_steps=1) == plain[0]


def test_the_optimizer_gets_the_schedule(dataset):
    trainer = train(build(), dataset, epochs=2, lr=3e-4, warmup_steps=3)
    used, reported = [], []
    on_every_step(trainer, lambda: used.append(trainer.optimizer.param_groups[0]["lr"]))
    trainer.run(lambda progress: reported.append(progress.lr))
    assert used == reported == [learning_rate(s, 8, 3e-4, 3) for s in range(1, 9)]


# --- accumulation ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch_size", "k", "steps"), [(2, 1, 4), (2, 2, 2), (2, 3, 2), (1, 7, 1), (3, 2, 2), (2, 9, 1)]
)
def test_each_step_has_the_gradient_of_one_big_batch(dataset, batch_size, k, steps):
    model = build()
    trainer = train(
        model, dataset, epochs=2, batch_size=batch_size, accumulation_steps=k, lr=1e-2, seed=3
    )
    config = trainer.config
    expected = [(e, w) for e in range(2) for w in windows(dataset, config, e)]
    assert trainer.steps_per_epoch == steps_per_epoch(dataset, config) == steps
    assert trainer.total_steps == len(expected) == 2 * steps
    seen, losses = [], []

    def check():
        gradient, loss, _ = reference(model, dataset, [sum(expected[len(seen)][1], [])])
        assert_same(grads(model), gradient)
        losses.append(loss)
        seen.append(expected[len(seen)])

    on_every_step(trainer, check)
    progress = []
    trainer.run(progress.append)
    assert seen == expected  # the shorter window at an epoch's end is stepped like any other
    assert [p.step for p in progress] == list(range(1, 2 * steps + 1)) and trainer.step == 2 * steps
    assert [p.epoch for p in progress] == [e + 1 for e, _ in expected]
    assert {p.total_steps for p in progress} == {2 * steps}
    # Reported in float32 whatever the model's dtype.
    assert [p.loss for p in progress] == pytest.approx(losses, rel=1e-6)
    assert all(p.seconds > 0 for p in progress)
    # Padding counts: those tokens are computed too.
    assert [p.tokens for p in progress] == [
        sum(len(batch) * max(dataset.lengths[i] for i in batch) for batch in window)
        for _, window in expected
    ]


def test_aux_loss_is_optimised(dataset):
    model, gate = build(use_moe=True), "layers.0.feed_forward.gate.weight"
    trainer, expected = train(model, dataset, accumulation_steps=2, lr=1e-2), []

    def check():
        window = windows(dataset, trainer.config)[len(expected)]
        gradient, _, aux_loss = reference(model, dataset, window)
        without, _, _ = reference(model, dataset, window, aux_weight=0.0)
        assert_same(grads(model), gradient)
        assert (gradient[gate] - without[gate]).abs().max() > 1e-3
        expected.append(aux_loss)

    on_every_step(trainer, check)
    reported = []
    trainer.run(lambda progress: reported.append(progress.aux_loss))
    assert len(expected) == 2 and reported == pytest.approx(expected, rel=1e-6)
    assert min(expected) > 0.05


# --- clipping and which parameters learn ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_clipping_bounds_the_norm(dataset, dtype):
    # In float16 the norm to bound is that of the gradient, not of the 65,536-fold one.
    model, clip, norms = build(torch.float32), 1e-3, []
    trainer = train(model, dataset, grad_clip=clip, dtype=dtype)
    on_every_step(
        trainer, lambda: norms.append(float(nn.utils.get_total_norm(grads(model).values())))
    )
    trainer.run()
    assert norms and all(0.99 * clip < norm <= clip * (1 + 1e-6) for norm in norms)


@pytest.mark.parametrize("clip", [1e9, 0.0, 1e-3])
def test_clipping_keeps_the_direction_and_a_small_gradient(dataset, clip):
    model, seen = build(), []
    trainer = train(model, dataset, batch_size=7, grad_clip=clip)
    expected, _, _ = reference(model, dataset, [list(range(7))])
    norm = math.sqrt(sum(g.square().sum() for g in expected.values()))
    factor = clip / (norm + 1e-6) if clip == 1e-3 else 1.0  # 0 is off
    on_every_step(trainer, lambda: seen.append(grads(model)))
    trainer.run()
    assert norm > 0.1 and len(seen) == 1
    assert_same(seen[0], {name: g * factor for name, g in expected.items()})


def test_only_the_given_parameters_change(dataset):
    model = build()
    before = snapshot(model)
    chosen = {"norm.weight", "layers.0.attention.wq.weight"}
    train(model, dataset, [p for n, p in model.named_parameters() if n in chosen]).run()
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == chosen


# --- resume points --------------------------------------------------------------------------------


class Stop(Exception):
    """Stands for whatever ends a process."""


def lora_trainer(dataset):
    model = build(torch.float32)
    torch.manual_seed(2)
    apply_lora(model, rank=4, dropout=0.2, verbose=False)
    return train(
        model, dataset, lora_parameters(model), epochs=3, accumulation_steps=2, lr=1e-2, grad_clip=1
    )


def taken_up(dataset, interrupted):
    """A new trainer at the point where ``interrupted`` stands, by way of a file."""
    file = io.BytesIO()
    torch.save((interrupted.state_dict(), interrupted.model.state_dict()), file)
    trainer = lora_trainer(dataset)  # draws random numbers, as a new process does
    file.seek(0)
    state, weights = torch.load(file, weights_only=True)
    trainer.model.load_state_dict(weights)
    trainer.load_state_dict(state)
    return trainer


def unbroken(dataset, seed=5):
    trainer, progress = lora_trainer(dataset), []
    torch.manual_seed(seed)
    trainer.run(progress.append)
    return trainer, [(p.step, p.epoch, p.loss, p.lr, p.tokens) for p in progress]


def assert_bit_for_bit(ours, theirs):
    assert ours.step == theirs.step == ours.total_steps
    weights = snapshot(theirs.model)
    assert [n for n, p in snapshot(ours.model).items() if not torch.equal(p, weights[n])] == []
    moments = [t.optimizer.state_dict()["state"] for t in (ours, theirs)]
    assert moments[0].keys() == moments[1].keys() and moments[0]
    for index, values in moments[1].items():
        assert all(torch.equal(moments[0][index][name], t) for name, t in values.items()), index


@pytest.mark.parametrize("stop", range(1, 7))
def test_a_resumed_run_equals_an_unbroken_one(dataset, stop):
    whole, expected = unbroken(dataset)
    assert whole.steps_per_epoch == 2 and whole.total_steps == 6  # odd steps are in mid-epoch
    assert unbroken(dataset, seed=6)[1] != expected  # dropout is at work
    first, progress = lora_trainer(dataset), []

    def after_step(p):
        progress.append(p)
        if p.step == stop:
            raise Stop

    torch.manual_seed(5)
    with pytest.raises(Stop):
        first.run(after_step)
    second = taken_up(dataset, first)
    second.run(progress.append)
    assert [(p.step, p.epoch, p.loss, p.lr, p.tokens) for p in progress] == expected
    assert_bit_for_bit(second, whole)


@pytest.mark.parametrize("batch", [0, 1])
def test_a_run_interrupted_within_a_step(dataset, batch):
    # Ctrl-C mostly comes while a step computes, and a resume point is saved then.
    whole, _ = unbroken(dataset)
    first, calls = lora_trainer(dataset), []

    def interrupt(module, args, output):
        calls.append(module)
        if len(calls) == 4 + batch + 1:  # windows are of 2 batches: the third step, batch 0 or 1
            raise KeyboardInterrupt

    first.model.register_forward_hook(interrupt)
    torch.manual_seed(5)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert first.step == 2
    second = taken_up(dataset, first)
    second.run()
    assert_bit_for_bit(second, whole)


def test_another_number_of_steps_is_refused(dataset):
    state = train(build(), dataset, epochs=2).state_dict()
    other = train(build(), dataset, epochs=3)
    with pytest.raises(TrainingError, match="of a run of 8 steps, this one has 12; resume with"):
        other.load_state_dict(state)
    assert other.step == 0


# --- what must not go unnoticed -------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run(dataset, value):
    model = build(torch.float32)
    with torch.no_grad():
        model.norm.weight[3] = value
    before = snapshot(model)
    trainer = train(model, dataset, lr=3e-4)
    pattern = r"norm nan at step 1; lower lr \(now 0\.0003\), clip harder, or use float32"
    with pytest.raises(TrainingError, match=pattern):
        trainer.run()
    assert trainer.step == 0
    for name, parameter in model.named_parameters():  # nothing spoilt was stepped
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name
    with pytest.raises(TrainingError, match="not finite; its weights may be damaged"):
        evaluate(model, dataset, CPU)


@pytest.mark.parametrize(
    ("dtype", "scales"), [(torch.float16, True), (torch.bfloat16, False), (torch.float32, False)]
)
def test_only_float16_scales_the_loss(dataset, dtype, scales):
    model = build(torch.float32)
    before = snapshot(model)
    trainer = train(model, dataset, dtype=dtype, grad_clip=1.0)
    assert trainer.scaler.is_enabled() is scales
    seen = set()
    model.layers[0].attention.wq.register_forward_hook(lambda m, a, y: seen.add(y.dtype))
    losses = []
    trainer.run(lambda progress: losses.append(progress.loss))
    assert seen == {dtype} and all(5 < loss < 50 for loss in losses)
    assert not torch.equal(model.norm.weight, before["norm.weight"])
    assert {p.dtype for p in model.parameters()} == {torch.float32}


# --- evaluation and settings ---------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_evaluate_is_the_mean_over_tokens(dataset, training):
    model = build(dropout=0.5).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, _, mask in (dataset[i] for i in range(len(dataset))):
            losses = F.cross_entropy(model(ids[None]).logits[0, :-1], ids[1:], reduction="none")
            total += float((losses * mask[1:]).sum())
            count += int(mask[1:].sum())
    model.train(training)
    for batch_size in (1, 3, 32):
        loss = evaluate(model, dataset, CPU, batch_size=batch_size)
        assert loss == pytest.approx(total / count, rel=1e-12)
        assert model.training is training and model.layers[0].training is training
    assert all(p.grad is None for p in model.parameters())


def test_evaluate_restores_the_mode_after_an_error(dataset):
    model = build().train()
    handle = model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        evaluate(model, dataset, CPU)
    handle.remove()
    assert model.training
