"""The devices of `minimind`: which is taken, which is refused, and what Apple's cannot do."""

from __future__ import annotations

import pytest
import torch
from tiny_minimind import (
    ids,
    one_thread,  # noqa: F401 - acts by itself
    tiny,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_kernels import apply_lora, lora_parameters, mark_only_lora_as_trainable, merged_lora
from minimind.settings import TrainingConfig
from minimind.training.loop import Trainer, best_dtype, evaluate
from minimind.training.parallel import ALONE, Processes
from minimind.training.prepare import choose_device


@pytest.fixture
def machine(monkeypatch):
    """A machine with so many CUDA GPUs and with or without Apple's."""

    def build(cuda, mps):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)

    return build


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "taken"),
    [
        (0, False, "auto", "cpu"),
        (0, True, "auto", "mps"),
        (2, False, "auto", "cuda"),
        (2, True, "auto", "cuda"),
        (2, False, "cuda:1", "cuda:1"),
        (0, True, "mps", "mps"),
        (0, True, "cpu", "cpu"),
    ],
)
def test_taken(machine, cuda, mps, name, taken):
    machine(cuda, mps)
    assert choose_device(name) == torch.device(taken)


@pytest.mark.parametrize(
    ("cuda", "mps", "name", "said"),
    [
        (0, False, "mps", r"sees no Apple GPU \(MPS\), only cpu; use --device cpu"),
        (1, False, "mps", "only cuda and cpu"),
        (0, True, "cuda", "sees no CUDA GPU, only mps and cpu"),
        (2, False, "cuda:2", "there are 2 cuda devices, no 'cuda:2'"),
        (0, True, "mps:1", "there are 1 mps devices"),
        (0, True, "xpu", "device must be auto, cpu, cuda or mps, got 'xpu'"),
        (0, True, "gpu", "device must be auto, cpu, cuda or mps, got 'gpu'"),
    ],
)
def test_refused(machine, cuda, mps, name, said):
    machine(cuda, mps)
    with pytest.raises(ValueError, match=said):
        choose_device(name)


def test_apples_gpu_takes_float32_and_one_process():
    assert best_dtype(torch.device("mps")) == torch.float32
    assert ALONE.place(torch.device("mps")) == torch.device("mps")
    with pytest.raises(ValueError, match="2 processes cannot share Apple's GPU"):
        Processes(rank=0, size=2).place(torch.device("mps"))


class Samples(list):
    """Tokenised samples as `SFTDataset` holds them."""

    pad_token_id = 0

    def __init__(self):
        super().__init__((t, t, torch.ones_like(t)) for t in (ids(8, seed=i) for i in range(4)))
        self.lengths = [8] * len(self)

    def __getitems__(self, indices):
        return [self[i] for i in indices]

    def fingerprint(self):
        return "these"


def trainer(**changes):
    model = tiny(dropout=0.1, **changes)
    apply_lora(model, 4, dropout=0.1, verbose=False)
    mark_only_lora_as_trainable(model)
    config = TrainingConfig(epochs=1, batch_size=2)
    return Trainer(model, lora_parameters(model), Samples(), config, torch.device("cpu"))


class NoFloat64(TorchDispatchMode):
    """MPS has no float64: any operation that makes some there would fail."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            assert not (isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64), (
                function
            )
        return out


@pytest.mark.parametrize("use_moe", [False, True])
def test_nothing_is_computed_in_float64(use_moe):
    loop = trainer(use_moe=use_moe)
    with NoFloat64():
        loop.run()
        evaluate(loop.model, loop.dataset, loop.device)
        with merged_lora(loop.model):
            loop.model(input_ids=ids(1, 4))
        loop.model.generate(
            ids(1, 4), attention_mask=torch.ones(1, 4).long(), max_new_tokens=3, pad_token_id=0
        )
    assert loop.step == 2


def test_a_resume_point_holds_the_generator_of_apples_gpu(monkeypatch):
    drawn = []
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.tensor([7, 8]))
    monkeypatch.setattr(torch.mps, "set_rng_state", drawn.append)
    loop = trainer()
    loop.device = torch.device("mps")
    state = loop.state_dict()
    fresh = trainer()
    fresh.load_state_dict(state)
    assert not drawn  # on a CPU it is nobody's
    fresh.device = torch.device("mps")
    fresh.load_state_dict(state)
    assert [t.tolist() for t in drawn] == [[7, 8]]


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs Apple's GPU (MPS)")
def test_a_run_on_apples_gpu():
    loop = trainer()
    loop.model.to("mps")
    loop.device = torch.device("mps")
    loop.run()
    assert loop.step == 2
