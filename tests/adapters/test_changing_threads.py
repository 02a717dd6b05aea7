"""Threads that change one model at the same time."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny_model import IDS, Model, assert_untouched, snapshot, trained

from lora_kernels import (
    apply_lora,
    disable_lora,
    lora_adapters,
    merge_lora,
    merged_lora,
    remove_lora,
    use_lora,
)
from lora_kernels.adapters import changing, merging
from lora_kernels.linear.module import LoRALinear

THREADS = 8


@pytest.fixture(autouse=True)
def _often_switched():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def in_threads(work):
    """What ``work(number)`` gives in each of eight threads that begin together."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait(30)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS), timeout=60))


def made():
    """A model that trains modules whole beside its factors."""
    return trained(Model(), target_modules=["q", "gate"], modules_to_save=["k"])


@pytest.mark.parametrize("block", [merged_lora, disable_lora])
def test_the_last_thread_out_brings_the_very_bits_back(block):
    model = made()
    before, adapted = snapshot(model), model(IDS)
    with block(model):
        expected = model(IDS)
    everyone_in = threading.Barrier(THREADS)

    def work(number):
        wrong = 0
        for turn in range(20):
            with block(model):
                if turn % 5 == 0:
                    everyone_in.wait(30)
                wrong += not torch.equal(model(IDS), expected)
        return wrong

    assert in_threads(work) == [0] * THREADS
    assert_untouched(model, before)
    assert torch.equal(model(IDS), adapted)
    assert all(m._lora_blocks == 0 for m in model.modules() if isinstance(m, LoRALinear))


@pytest.mark.parametrize("block", [merged_lora, disable_lora])
def test_it_lasts_until_the_last_thread_is_out(block):
    model = made()
    before, adapted = snapshot(model), model(IDS)
    first_in, second_in, first_out = (threading.Event() for _ in range(3))
    with block(model):
        expected = model(IDS)

    def first():
        with block(model):
            first_in.set()
            second_in.wait(30)
        first_out.set()

    thread = threading.Thread(target=first)
    thread.start()
    first_in.wait(30)
    with block(model):
        second_in.set()
        first_out.wait(30)
        assert torch.equal(model(IDS), expected)
    thread.join(30)
    assert_untouched(model, before)
    assert torch.equal(model(IDS), adapted)


def test_no_thread_gets_between_the_question_and_the_mark(monkeypatch):
    """Another thread that comes while one has asked, and not yet marked, has to wait for it."""
    model = made()
    before = snapshot(model)
    asked, go_on = threading.Event(), threading.Event()
    real = merging._mergeable

    def slow(*args, **kwargs):
        found = real(*args, **kwargs)
        if threading.current_thread().name == "slow":
            asked.set()
            go_on.wait(30)
        return found

    monkeypatch.setattr(merging, "_mergeable", slow)
    done = []

    def enter(number):
        with merged_lora(model):
            done.append(number)

    threads = [threading.Thread(target=enter, args=(0,), name="slow")]
    threads[0].start()
    asked.wait(30)
    assert not changing.LOCK.acquire(blocking=False)
    threads.append(threading.Thread(target=enter, args=(1,)))
    threads[1].start()
    threads[1].join(0.05)
    assert done == []
    go_on.set()
    for thread in threads:
        thread.join(30)
    assert sorted(done) == [0, 1]
    assert_untouched(model, before)


def test_eight_threads_put_adapters_in_and_take_them_out():
    model = made()
    before, adapted = snapshot(model), model(IDS)

    def work(number):
        name = f"a{number}"
        for _ in range(5):
            apply_lora(model, 2, name=name, target_modules=["gate"], verbose=False)
            assert remove_lora(model, name) == ["gate"]

    in_threads(work)
    assert_untouched(model, before)
    assert list(lora_adapters(model)) == ["default"]
    assert torch.equal(model(IDS), adapted)


def test_of_eight_that_merge_for_good_one_does():
    model = made()
    expected = made_like(model)
    merge_lora(expected)

    def work(number):
        try:
            return bool(merge_lora(model))
        except ValueError as error:
            assert "no LoRALinear" in str(error)
            return False

    assert sorted(in_threads(work)) == [False] * (THREADS - 1) + [True]
    assert_untouched(model, (snapshot(model)[0], snapshot(expected)[1]))


def made_like(model):
    copy = made()
    copy.load_state_dict(model.state_dict())
    return copy


def test_of_eight_that_apply_one_does():
    model = Model()

    def work(number):
        try:
            return len(apply_lora(model, 2, target_modules=["q"], verbose=False))
        except ValueError as error:
            assert "already" in str(error)
            return 0

    assert sorted(in_threads(work)) == [0] * (THREADS - 1) + [2]


def test_eight_that_choose_leave_one_choice_in_all_layers():
    model = made()
    for number in range(THREADS):
        apply_lora(model, 2, name=f"a{number}", target_modules=["q", "gate"], verbose=False)

    def work(number):
        for _ in range(20):
            use_lora(model, f"a{number}")

    in_threads(work)
    used = {tuple(m.adapters_in_use) for m in model.modules() if isinstance(m, LoRALinear)}
    assert len({names for names in used if names}) == 1
