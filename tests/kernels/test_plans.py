"""Plans: what they depend on, that they keep no tensor, how many there are."""

from __future__ import annotations

import gc
import threading
import weakref

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import Case, make, seed_of

from lora_kernels.kernels import plans, tuning
from lora_kernels.kernels.launching import recording
from lora_kernels.linear.backward import backward
from lora_kernels.linear.forward import forward
from lora_kernels.linear.reference import Needs
from lora_kernels.proof.cases import products_in

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def _none_at_first():
    plans.clear()
    yield
    plans.clear()


def transposed(t):
    return t.t().contiguous().t()


def shifted(t):
    """A copy whose address 16 does not divide."""
    room = torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape)
    return room.copy_(t)


def call(t, scale=0.7, seed=None, dropout_p=0.0, needs=(True, False, True, True, True), **given):
    """Forward and backward; ``given`` takes the place of tensors."""
    t = t._replace(**{name: change(getattr(t, name)) for name, change in given.items()})
    capability = (9, 0)
    y, xa, bits = forward(*t[:5], scale, seed, dropout_p, capability)
    grads = backward(t.dy, *t[:4], xa, scale, bits, dropout_p, Needs(*needs), capability)
    return [one for one in (y, xa, bits, *grads) if one is not None]


CHANGES = {
    "rows": {name: lambda x: x[:33].clone() for name in ("x", "dy")},
    "strides of x": {"x": transposed},
    "strides of weight": {"weight": transposed},
    "strides of A": {"lora_a": transposed},
    "strides of B": {"lora_b": transposed},
    "strides of bias": {"bias": lambda bias: torch.stack((bias, bias), -1)[:, 0]},
    "dtype of A": {"lora_a": lambda a: a.float()},
    "dtype of B": {"lora_b": lambda b: b.float()},
    "address of x": {"x": shifted},
    "address of weight": {"weight": shifted},
    "no bias": {"bias": lambda _: None, "needs": (True, False, True, True, False)},
    "scale": {"scale": 0.9},
    "dropout": {"seed": 5, "dropout_p": 0.3},
    "more dropout": {"seed": 5, "dropout_p": 0.6},
}
# Only one of the two plans depends on these.
OF_FORWARD = {"strides of bias", "address of x"}


@pytest.mark.parametrize("change", CHANGES)
def test_what_differs_has_a_plan_of_its_own(change):
    t = make(Case(40, 24, 48, 8), torch.bfloat16, "cpu")
    changed = dict(CHANGES[change])
    if "seed" in changed:
        changed["seed"] = seed_of(changed["seed"], "cpu")
    expected = call(t, **changed)
    plans.clear()
    if change == "more dropout":
        call(t, **changed | {"dropout_p": 0.3})
    plain = call(t)
    before = plans.count()
    again = call(t)
    assert plans.count() == before
    ours = call(t, **changed)
    assert plans.count() == before + (1 if change in OF_FORWARD else 2)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("index", range(5))
def test_what_is_needed_has_a_plan_of_its_own(index):
    t = make(Case(40, 24, 48, 8), torch.bfloat16, "cpu")
    needs = [True] * 5
    call(t, needs=needs)
    needs[index] = False
    before = plans.count()
    assert len(call(t, needs=needs)) == 6  # y, xa and four gradients
    assert plans.count() == before + 1


def test_a_forced_strategy_misses_what_was_planned_without_it(monkeypatch):
    t = make(Case(40, 24, 48, 8), torch.bfloat16, "cpu")
    call(t)
    for forced in ({"forward": "fused"}, {"dx": "fused"}, {"dx": "beta1"}):
        before = plans.count()
        with tuning.use_strategy(**forced):
            call(t)
        assert plans.count() == before + 2
    before = plans.count()
    monkeypatch.setattr(tuning, "ROWS", (*tuning.ROWS,))
    call(t)
    assert plans.count() == before + 2


def test_float32_products_are_planned_as_torch_was_told():
    t = make(Case(40, 24, 48, 8), torch.float32, "cpu")
    for tf32, count in ((False, 2), (True, 4), (False, 4)):
        with products_in(tf32):
            call(t)
        assert plans.count() == count


def test_another_gpu_has_plans_of_its_own():
    t = make(Case(40, 24, 48, 8), torch.bfloat16, "cpu")
    for capability in ((8, 0), (9, 0), (8, 9)):
        forward(*t[:5], 0.7, None, 0.0, capability)
    assert plans.count() == 3


def test_a_weight_that_moves_is_read_where_it_is():
    t = make(Case(40, 24, 48, 8), torch.bfloat16, "cpu")
    weight = torch.nn.Parameter(t.weight, requires_grad=False)
    for strategy in ("fused", "hopper", "one_kernel"):
        with tuning.use_strategy(forward=strategy):
            call(t._replace(weight=weight))
            before = plans.count()
            weight.data = torch.randn(24, 48).bfloat16()
            moved = call(t._replace(weight=weight))
            assert plans.count() == before
            plans.clear()
            for one, other in zip(moved, call(t._replace(weight=weight)), strict=True):
                assert torch.equal(one, other)


@pytest.mark.parametrize("strategy", tuning.STRATEGIES["dx"])
def test_a_plan_keeps_no_tensor(strategy):
    t = make(Case(40, 24, 48, 8), torch.bfloat16, "cpu")
    with tuning.use_strategy(forward=strategy, dx=strategy):
        found = call(t)
    seen = [weakref.ref(one) for one in (*t, *found)]
    del t, found
    gc.collect()
    assert plans.count() == 2 and not any(one() is not None for one in seen)


def test_what_is_recorded_is_planned_for_the_gpu_recorded_for():
    t = make(Case(300, 24, 48, 8), torch.bfloat16, "cpu")
    with tuning.use_strategy(forward="hopper"):
        call(t)
        absent = t._replace(**{n: one.to("meta") for n, one in t._asdict().items()})
        grids = []
        for sms in (1, 2):
            with recording(sms) as launches:
                y, *_ = forward(*absent[:5], 0.7, None, 0.0, (9, 0))
            assert y.is_meta
            grids.append(len(launches))
        assert plans.count() == 2 and all(grids)


def test_there_are_never_too_many(monkeypatch):
    monkeypatch.setattr(plans, "MOST", 5)
    t = make(Case(40, 24, 48, 8), torch.bfloat16, "cpu")
    with tuning.use_strategy(forward="aten"):
        for rows in range(1, 20):
            y, *_ = forward(t.x[:rows], *t[1:5], 0.7, None, 0.0, (9, 0))
            assert y.shape == (rows, 24) and plans.count() <= 5


def test_threads_find_and_forget_at_once(monkeypatch):
    monkeypatch.setattr(plans, "MOST", 2)
    t = make(Case(40, 24, 48, 8), torch.float32, "cpu")
    wrong, expected = [], t.x @ t.weight.t() + 0.7 * (t.x @ t.lora_a.t()) @ t.lora_b.t() + t.bias

    def work(first):
        for turn in range(300):
            rows = 1 + (first + turn) % 7
            with tuning.use_strategy(forward="aten"):  # the interpreter is not for threads
                y, *_ = forward(t.x[:rows], *t[1:5], 0.7, None, 0.0, (9, 0))
            if y.shape[0] != rows or not torch.allclose(y, expected[:rows], atol=1e-4, rtol=1e-4):
                wrong.append(rows)

    threads = [threading.Thread(target=work, args=(first,)) for first in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and plans.count() <= 2 + len(threads)
