"""What one thread asks for is nothing to another, in compiled code too."""

from __future__ import annotations

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from lora_kernels import LoRALinear, dispatch, explain, lora_linear, use_backend
from lora_kernels.kernels import tuning
from lora_kernels.per_thread import PerThread

THREADS = 8


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """As on a machine without a GPU that does not run Triton's interpreter."""
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)


def in_threads(work):
    """What ``work(number)`` gives in each of eight threads that begin together."""
    barrier = threading.Barrier(THREADS)

    def begin(number):
        barrier.wait(30)
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begin, range(THREADS), timeout=120))


def test_each_thread_has_its_own_and_gets_back_what_it_had():
    asked, everyone_in = PerThread("test", "none"), threading.Barrier(THREADS)

    def work(number):
        seen = [asked.get()]
        with asked.set(f"outer {number}"):
            everyone_in.wait(30)
            seen.append(asked.get())
            with pytest.raises(KeyError), asked.set(f"inner {number}"):
                everyone_in.wait(30)
                seen.append(asked.get())
                raise KeyError
            seen.append(asked.get())
        return [*seen, asked.get()]

    with asked.set("of the first"):
        assert in_threads(work) == [
            ["none", f"outer {n}", f"inner {n}", f"outer {n}", "none"] for n in range(THREADS)
        ]
        assert asked.get() == "of the first"
    assert asked.get() == "none"


def test_two_values_do_not_meet():
    one, other = PerThread("one", 0), PerThread("other", 0)
    with one.set(1):
        assert (one.get(), other.get()) == (1, 0)


def test_a_backend_that_cannot_serve_is_one_threads_trouble():
    """Blocks of threads that end in another order than they began leave nothing behind."""
    layer, x = LoRALinear(4, 4), torch.randn(2, 4)
    second_in, first_out = threading.Event(), threading.Event()
    said = []

    def second():
        with use_backend("reference"):
            second_in.set()
            first_out.wait(30)
            said.append(explain(layer))
        said.append(explain(layer))

    with use_backend("triton"):
        thread = threading.Thread(target=second)
        thread.start()
        second_in.wait(30)
        assert explain(layer).startswith("none: use_backend('triton')")
    first_out.set()
    thread.join(30)
    layer(x)
    plain = "reference: x is on cpu, the kernels run on cuda"
    assert said == ["reference: asked for by use_backend", plain]
    assert explain(layer) == plain


def test_forwards_beside_a_thread_that_asks_for_triton():
    layer, x, turns = LoRALinear(4, 4), torch.randn(2, 4), threading.Barrier(THREADS)
    with torch.no_grad():
        expected = layer(x)

    def work(number):
        for _ in range(10):
            if number % 2:
                with use_backend("triton"):
                    turns.wait(30)
                    with pytest.raises(RuntimeError, match="use_backend"):
                        layer(x)
                    turns.wait(30)
            else:
                turns.wait(30)
                assert torch.equal(layer(x), expected)
                turns.wait(30)
        return dispatch.is_named()

    assert in_threads(work) == [False] * THREADS


def test_strategies_beside_each_other():
    shape = tuning.Shape(8192, 4096, 4096, 16)
    names, turns = ("fused", "beta1", "aten", None), threading.Barrier(THREADS)

    def choose():
        return tuning.strategy(
            "forward", (9, 0), torch.bfloat16, shape, dropped=False, tma=True, sms=132
        )

    free = choose()

    def work(number):
        name = names[number % 4]
        with tuning.use_strategy(forward=name):
            turns.wait(30)
            seen = {choose() for _ in range(20)}
            keys = {tuning.asked()[:2]}
            turns.wait(30)
        return seen == {name or free} and keys == {(name, None)} and choose() == free

    assert all(in_threads(work))


def test_a_compiled_graph_is_of_its_thread():
    asked = PerThread("compiled", "none")

    def branch(x):
        if asked.get() == "plus":
            return x + 1
        return x * 3 if asked.get() == "times" else x

    torch._dynamo.reset()
    compiled = torch.compile(branch, fullgraph=True, backend="eager")
    x, seen = torch.full((2,), 5.0), []

    def other():
        seen.append(compiled(x)[0].item())
        with asked.set("times"):
            seen.append(compiled(x)[0].item())

    with asked.set("plus"):
        assert compiled(x)[0].item() == 6
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)
        assert compiled(x)[0].item() == 6
    assert compiled(x)[0].item() == 5 and seen == [5, 15]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_layer_asks_in_the_thread_that_calls_it():
    torch._dynamo.reset()
    operands = [torch.randn(shape) for shape in ((2, 4), (3, 4), (2, 4), (3, 2))]
    compiled = torch.compile(lora_linear, fullgraph=True, backend="eager")
    expected = lora_linear(*operands)
    torch.testing.assert_close(compiled(*operands), expected)
    done = []

    def other():
        done.append(compiled(*operands))

    with use_backend("triton"):
        with pytest.raises(Exception, match="use_backend"):
            compiled(*operands)
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(60)
    torch.testing.assert_close(done[0], expected)
    torch.testing.assert_close(compiled(*operands), expected)


def test_no_reference_is_lost():
    """torch 2.11 counts none of its own, and an object that was put there often would be freed."""
    asked, value = PerThread("counted", None), object()
    before = sys.getrefcount(value)
    for _ in range(100):
        with asked.set(value):
            assert asked.get() is value
    assert sys.getrefcount(value) == before
