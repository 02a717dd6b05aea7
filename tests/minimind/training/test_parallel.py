"""Several processes train as one does: the loop, its resume points, evaluation, who does what."""

from __future__ import annotations

import pytest
import torch
from tiny_minimind import one_thread  # noqa: F401 - acts by itself
from tiny_processes import results

from lora_kernels import apply_lora, lora_parameters, lora_state_dict, mark_only_lora_as_trainable
from minimind.data.sft import SFTDataset
from minimind.data.tokenizer import load_tokenizer
from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM
from minimind.settings import TrainingConfig
from minimind.training.loop import Trainer, TrainingError, evaluate
from minimind.training.parallel import ALONE, Processes, join

CPU = torch.device("cpu")
EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64; sums are only taken in another order
# Seven samples in batches of three: rows 2 and 1, and at the end one row for all.
UNEVEN = {"batch_size": 3, "accumulation_steps": 2, "epochs": 2, "lr": 1e-2, "grad_clip": 0.5}


def make_dataset():
    """Seven samples with 2 to 32 supervised tokens, so that a mean of means is a wrong mean."""
    answers = [
        {"role": "assistant", "content": " ".join(["tea"] * n)} for n in (1, 30, 4, 2, 17, 9, 5)
    ]
    questions = [{"role": "user", "content": "q" * i} for i in range(len(answers))]
    return SFTDataset(list(zip(questions, answers, strict=True)), load_tokenizer())


def build(lora=True, dropout=0.0, width=torch.float64, **changes):
    torch.manual_seed(1)
    sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 6400}
    model = MiniMindLM(LMConfig(**sizes, **changes)).to(width)
    if lora:
        apply_lora(model, rank=5, dropout=dropout, target_modules="all-linear", verbose=False)
        mark_only_lora_as_trainable(model)
    with torch.no_grad():  # larger than initial values, so that every part has a gradient to show
        for name, parameter in model.named_parameters():
            if ".lora.B." in name:
                parameter.normal_(std=0.1)
            elif parameter.ndim > 1:
                parameter.mul_(5)
    return model


def make_trainer(processes, dtype=torch.float32, lora=True, settings=UNEVEN, **model):
    model = build(lora, **model)
    processes.seed(5)
    spread = processes.spread(model, CPU)
    parameters = lora_parameters(model) if lora else list(model.parameters())
    trainer = Trainer(
        spread, parameters, make_dataset(), TrainingConfig(**settings), CPU, dtype, processes
    )
    return model, trainer


def outcome(model, trainer, progress, lora=True):
    """All that must be the same whoever has trained."""
    state = trainer.processes.whole(lora_state_dict(model) if lora else model.state_dict())
    losses = [
        evaluate(model, trainer.dataset, CPU, batch_size=size, processes=trainer.processes)
        for size in (1, 3, 32)
    ]
    return [(p.step, p.epoch, p.lr, p.tokens, p.loss, p.aux_loss) for p in progress], losses, state


def run_one(processes, lora=True, scale=None, **options):
    model, trainer = make_trainer(processes, lora=lora, **options)
    if scale is not None:
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    progress = []
    trainer.run(progress.append)
    return *outcome(model, trainer, progress, lora), trainer.scaler.get_scale(), trainer.draws


def run_all(strategy, scenarios):
    with join(strategy) as processes:
        return [run_one(processes, **options) for options in scenarios]


# --- the curve ------------------------------------------------------------------------------------

SCENARIOS = [
    {},
    {"lora": False, "use_moe": True},
    {"era": "2026-03"},
    {"settings": {**UNEVEN, "batch_size": 7, "accumulation_steps": 1, "grad_clip": 0.0}},
]


@pytest.mark.parametrize(
    ("strategy", "size", "scenarios"),
    [("ddp", 2, SCENARIOS), ("fsdp", 2, SCENARIOS), ("ddp", 3, SCENARIOS), ("fsdp", 3, [{}])],
)
def test_the_curve_is_that_of_one_process(strategy, size, scenarios):
    several = results(run_all, strategy, scenarios, size=size)
    for number, options in enumerate(scenarios):
        steps, losses, state, _, draws = run_one(ALONE, **options)
        assert len(steps) in (2, 4) and not draws
        for theirs, their_losses, _, _, their_draws in (mine[number] for mine in several):
            assert [row[:4] for row in theirs] == [row[:4] for row in steps]
            for column in (4, 5):  # reported in float32 whatever the model's dtype
                expected = [row[column] for row in steps]
                assert [row[column] for row in theirs] == pytest.approx(expected, rel=1e-6)
            assert their_losses == pytest.approx(losses, rel=1e-12) and not their_draws
        torch.testing.assert_close(several[0][number][2], state, **EXACT)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_float16_skips_the_same_updates_everywhere(strategy):
    # The first scales overflow: the update is skipped, which all must agree on.
    options = {"dtype": torch.float16, "width": torch.float32, "scale": 2.0**20}
    steps, _, _, scale, _ = run_one(ALONE, **options)
    assert scale < 2.0**20
    for ((theirs, _, _, their_scale, _),) in results(run_all, strategy, [options]):
        assert their_scale == scale
        expected = pytest.approx([row[4] for row in steps], rel=1e-2)
        assert [row[4] for row in theirs] == expected


def kept_for_backward(strategy):
    """Shapes of the bfloat16 matrices that a forward of the blocks keeps."""
    with join(strategy) as processes:
        model, trainer = make_trainer(processes, width=torch.float32)
        kept = set()

        def pack(tensor):
            if tensor.ndim == 2 and tensor.dtype == torch.bfloat16:
                kept.add(tuple(tensor.shape))
            return tensor

        x = torch.arange(20)[None]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu"):
            trainer.model.train()(x, labels=x).loss.backward()
        return kept


def test_fsdp_does_not_keep_copies_of_the_gathered_weights():
    # Autocast's, which together would be the model that was too large.
    of_blocks = {tuple(p.shape) for p in build(lora=False).blocks.parameters() if p.ndim == 2}
    assert of_blocks <= results(kept_for_backward, "ddp")[0]
    assert not of_blocks & results(kept_for_backward, "fsdp")[0]


# --- resume points --------------------------------------------------------------------------------


def unbroken_and_resumed(strategy, dropout, path, stop=3):
    """A whole run, one that stops and saves, and one that takes that up, all on these processes."""
    with join(strategy) as processes:
        whole = unbroken(processes, dropout)
        progress = []
        broken_off(processes, dropout, path, stop, progress)
        return whole, taken_up(processes, dropout, path, progress)


def unbroken(processes, dropout=0.0):
    model, trainer = make_trainer(processes, dropout=dropout)
    progress = []
    trainer.run(progress.append)
    return outcome(model, trainer, progress)


class Stop(Exception):
    """Stands for whatever ends a process."""


def broken_off(processes, dropout, path, stop, progress):
    model, trainer = make_trainer(processes, dropout=dropout)

    def after_step(p):
        progress.append(p)
        if p.step == stop:
            state = (trainer.state_dict(), lora_state_dict(model))
            if processes.first:
                torch.save(state, path)
            raise Stop

    with pytest.raises(Stop):
        trainer.run(after_step)
    processes.sum(0.0)  # until the first has written


def taken_up(processes, dropout, path, progress):
    state, weights = torch.load(path, weights_only=True)
    model = build(dropout=dropout)
    model.load_state_dict(weights, strict=False)
    spread = processes.spread(model, CPU)
    trainer = Trainer(
        spread, lora_parameters(model), make_dataset(), TrainingConfig(**UNEVEN), CPU,
        processes=processes,
    )  # fmt: skip
    trainer.load_state_dict(state)
    trainer.run(progress.append)
    return outcome(model, trainer, progress)


def take_up(strategy, path):
    with join(strategy) as processes:
        return taken_up(processes, 0.0, path, [])


def assert_same_outcome(ours, theirs, rel, **tolerance):
    steps = [row[:4] for row in theirs[0]][-len(ours[0]) :]
    assert ours[0] and [row[:4] for row in ours[0]] == steps
    losses = [row[4] for row in theirs[0]][-len(ours[0]) :]
    assert [row[4] for row in ours[0]] == pytest.approx(losses, rel=rel, abs=0)
    torch.testing.assert_close(ours[2], theirs[2], **tolerance)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_resumed_run_equals_an_unbroken_one(strategy, tmp_path):
    path = tmp_path / "resume.pt"
    (whole, resumed), _ = results(unbroken_and_resumed, strategy, 0.2, path)
    assert_same_outcome(resumed, whole, rel=0, rtol=0, atol=0)
    with pytest.raises(TrainingError, match="of 2 processes with dropout.*1 would.*resume with 2"):
        taken_up(ALONE, 0.2, path, [])


def test_without_dropout_any_number_of_processes_goes_on(tmp_path):
    of_two, of_one = tmp_path / "two.pt", tmp_path / "one.pt"
    (whole, resumed), _ = results(unbroken_and_resumed, "fsdp", 0.0, of_two)
    alone = unbroken(ALONE)
    broken_off(ALONE, 0.0, of_one, 3, [])
    assert_same_outcome(resumed, whole, rel=0, rtol=0, atol=0)
    assert_same_outcome(taken_up(ALONE, 0.0, of_two, []), alone, rel=1e-6, **EXACT)
    for strategy, path in (("ddp", of_one), ("fsdp", of_one), ("ddp", of_two)):
        assert_same_outcome(results(take_up, strategy, path)[0], alone, rel=1e-6, **EXACT)


# --- who does what --------------------------------------------------------------------------------


def test_every_row_counts_once_and_nobody_goes_without():
    for size in (1, 2, 3):
        for count in range(1, 8):
            batch = [torch.arange(count), -torch.arange(count)]
            taken = []
            for rank in range(size):
                (rows, negative), counted = Processes(rank, size).rows(batch)
                assert len(rows) >= 1 and rows.equal(-negative)
                taken += rows[:counted].tolist()
            assert sorted(taken) == list(range(count))


def fail_on(rank, message):
    with join() as processes:
        assert processes.any(processes.rank == 1) and not processes.any(False)
        assert processes.gather(processes.rank) == [0, 1] and processes.sum(1.0, 2.0) == (2.0, 4.0)
        try:
            with processes.together():
                if processes.rank == rank:
                    raise OSError(message)
        except (OSError, ValueError) as error:
            return type(error), str(error)


def test_an_error_of_one_is_an_error_of_all():
    assert results(fail_on, 1, "no such disk") == [
        (ValueError, "process 1 of 2: no such disk"),
        (OSError, "no such disk"),
    ]
    with pytest.raises(OSError, match="^no such disk$"), ALONE.together():
        raise OSError("no such disk")


def test_each_draws_for_itself():
    torch.manual_seed(3)
    states = [torch.get_rng_state()]
    for rank in range(3):
        Processes(rank, 3).seed(5)
        states.append(torch.get_rng_state())
    assert states[1].equal(states[0])  # the first goes on as a process alone does
    assert not any(states[i].equal(states[j]) for i, j in ((1, 2), (1, 3), (2, 3)))


def test_a_gpu_each(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    second = Processes(rank=3, size=4, local_rank=1)
    assert second.place(torch.device("cuda")) == torch.device("cuda", 1) and chosen
    assert second.place(CPU) == CPU
    assert ALONE.place(torch.device("cuda", 1)) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="cuda:1 is one GPU for 4 processes; use --device cuda"):
        second.place(torch.device("cuda", 1))
    with pytest.raises(ValueError, match="2 CUDA GPUs and more processes.*nproc-per-node 2"):
        Processes(rank=2, size=3, local_rank=2).place(torch.device("cuda"))
