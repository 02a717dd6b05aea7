from __future__ import annotations

import contextlib
import time

import pytest
import torch

from benchmarks import measure

CPU = torch.device("cpu")


class Recorder(measure.Call):
    """Notes what is done to it, and when."""

    def __init__(self, name, log, before=0.0, during=0.0):
        self.name, self.log, self.before, self.during = name, log, before, during

    def prepare(self):
        self.log.append((self.name, "prepare"))
        time.sleep(self.before)

    @contextlib.contextmanager
    def context(self):
        self.log.append((self.name, "enter"))
        yield
        self.log.append((self.name, "exit"))

    def run(self):
        self.log.append((self.name, "run"))
        time.sleep(self.during)


def test_spread_interpolates():
    assert measure.spread([4.0, 1.0, 2.0, 3.0, 5.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert measure.spread([7.0]) == (7.0, 7.0, 7.0)


def test_ratios_are_paired_by_round():
    # The machine is ten times as slow in the last round: the medians' ratio would say 2 or 20.
    ratio = measure.paired_ratio([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0])
    assert ratio == (2.0, 2.0, 2.0)
    assert measure.paired_ratio([3.0, 4.0, 50.0], [1.0, 2.0, 10.0]).median == 3.0
    with pytest.raises(ValueError, match="3 samples cannot be paired with 2"):
        measure.paired_ratio([1.0, 2.0, 3.0], [1.0, 2.0])


def test_every_round_has_every_call_once_in_changing_order():
    log = []
    calls = {name: Recorder(name, log) for name in "abcd"}
    samples = measure.interleave(calls, CPU, seconds=0.0, least_rounds=6, warmup_rounds=2)
    assert {name: len(taken) for name, taken in samples.items()} == dict.fromkeys("abcd", 6)
    order = [name for name, what in log if what == "run"]
    rounds = ["".join(order[i : i + 4]) for i in range(0, len(order), 4)]
    assert len(rounds) == 8 and all(sorted(r) == list("abcd") for r in rounds)
    assert len(set(rounds)) > 2
    assert [what for _, what in log[:4]] == ["prepare", "enter", "run", "exit"]


def test_only_the_work_is_timed():
    calls = {"slow to prepare": Recorder("x", [], 0.03, 0.0), "slow": Recorder("y", [], 0.0, 0.03)}
    samples = measure.interleave(calls, CPU, seconds=0.0, least_rounds=3, warmup_rounds=0)
    assert max(samples["slow to prepare"]) < 0.02
    assert min(samples["slow"]) >= 0.03


def test_time_bounds_the_rounds():
    calls = {"a": Recorder("a", [], 0.0, 0.01)}
    taken = measure.interleave(calls, CPU, seconds=0.1, least_rounds=1, warmup_rounds=0)["a"]
    assert 2 <= len(taken) <= 11
    many = measure.interleave({"a": Recorder("a", [])}, CPU, seconds=5.0)["a"]
    assert len(many) == measure.MOST_ROUNDS


class Device:
    """A GPU that works as long as a call says, behind a queue; and events on its clock."""

    def __init__(self, monkeypatch):
        self.host = self.free_at = 0.0
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.free_at = max(device.host, device.free_at)

            def elapsed_time(self, end):
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", self.synchronize)
        monkeypatch.setattr(measure, "synchronize", lambda _: self.synchronize())
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.host)

    def synchronize(self):
        self.host = max(self.host, self.free_at)

    def call(self, launching, working):
        class Launches(measure.Call):
            calls = 0

            def prepare(call):
                pass

            def run(call):
                call.calls += 1
                self.host += launching
                self.free_at = max(self.host, self.free_at) + working

        return Launches()


def test_on_a_gpu_each_pays_for_its_own_launches_and_hides_nobody_elses(monkeypatch):
    device = Device(monkeypatch)
    calls = {
        "launches slowly": device.call(3e-4, 1e-4),
        "works long": device.call(1e-4, 1e-3),
        "an epoch": device.call(1e-3, 0.5),
    }
    taken = measure.interleave(calls, torch.device("cuda"), 0.0, least_rounds=20, warmup_rounds=1)
    # The host's time where the GPU waits for it, the GPU's where it does not.
    assert taken["launches slowly"] == pytest.approx([3e-4] * 20)
    assert taken["works long"] == pytest.approx([1e-3] * 20)
    # From an empty queue, and once a round: a burst of what is long tells no more.
    assert taken["an epoch"] == pytest.approx([0.501] * 20)
    assert calls["works long"].calls == 21 * (1 + measure.BURST)
    assert calls["an epoch"].calls == 20 + 1 + measure.BURST


def test_ratio_of_other_rounds_is_that_of_the_medians():
    assert measure.ratio([2.0, 2.0, 20.0], [1.0, 1.0, 10.0]) == (2.0, 2.0, 2.0)
    assert measure.ratio([4.0, 6.0, 8.0], [2.0, 4.0]) == (2.0, 2.0, 2.0)


def test_peak_is_what_is_held_at_most():
    class Allocates(measure.Call):
        def prepare(self):
            pass

        def run(self):
            kept = torch.ones(2**18)  # 1 MiB
            for _ in range(3):
                kept = kept + torch.ones(2**20).sum()  # 4 MiB, one at a time
            return kept

    peak = measure.peak_bytes(Allocates(), CPU)
    assert 5 * 2**20 <= peak < 6 * 2**20


class Recorded:
    """Stands for a CUDA graph of ``calls`` calls: a replay works on the tensors it gave."""

    def __init__(self, work, calls, missed=False):
        self.work, self.calls, self.missed = work, calls, missed
        self.result = {name: tensor.clone() for name, tensor in work().items()}

    def replay(self):
        for _ in range(self.calls):
            made = self.work()
        for name, tensor in self.result.items():
            if not self.missed:
                tensor.copy_(made[name])


def graph_call(monkeypatch, graph):
    monkeypatch.setattr(torch.cuda, "manual_seed", torch.manual_seed)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    call = object.__new__(measure.GraphCall)
    call.graph, call.repeats = graph, graph.calls
    return call


class Working(measure.Call):
    def __init__(self, work):
        self.run = work


def drawn():
    return {"y": torch.randn(8), "bits": torch.randint(256, (8,), dtype=torch.uint8)}


def test_a_replay_is_held_against_as_many_calls_with_the_same_draws(monkeypatch):
    graph = Recorded(drawn, calls=3)
    call = graph_call(monkeypatch, graph)
    call._compare(Working(drawn), measure._detached(graph.result))
    call.repeats = 2  # other draws
    with pytest.raises(RuntimeError, match="a replay does not give"):
        call._compare(Working(drawn), measure._detached(graph.result))


@pytest.mark.parametrize("name", ["y", "bits"])
def test_work_that_missed_the_recording_is_seen(name, monkeypatch):
    def fixed():
        generator = torch.Generator().manual_seed(1)
        bits = torch.randint(1, 256, (8,), dtype=torch.uint8, generator=generator)
        return {name: {"y": torch.randn(8, generator=generator), "bits": bits}[name]}

    graph = Recorded(fixed, calls=1, missed=True)
    with pytest.raises(RuntimeError, match="a replay does not give"):
        graph_call(monkeypatch, graph)._compare(Working(fixed), measure._detached(graph.result))


def test_tensors_of_a_call_by_name_and_nested():
    y, dx = torch.ones(2, requires_grad=True), torch.ones(3)
    found = measure._detached((y, {"dx": dx, "more": (None, dx)}))
    assert [tuple(tensor.shape) for tensor in found] == [(2,), (3,), (3,)]
    assert not found[0].requires_grad and measure._detached({}) == []
