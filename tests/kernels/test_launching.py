"""A kernel prepared once: what is launched directly, and when Triton's own way is taken."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from triton import knobs

from lora_kernels.kernels import launching
from lora_kernels.kernels.launching import Box, Layout, Prepared, num_sms, recording

STREAM = 7


class Launcher:
    """Stands for what a compiled kernel is run by; notes what it is given."""

    def __init__(self, log):
        self.log = log

    def __call__(self, gridX, gridY, gridZ, stream, function, *args):
        self.log.append(("direct", (gridX, gridY, gridZ), stream, function, *args))


class Renamed(Launcher):
    def __call__(self, gridX, gridY, gridZ, function, stream, *args):
        raise AssertionError("launched by a convention that nobody knows")


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, run):
        self.run = run


class Kernel:
    """Stands for a JITFunction with two tensors and two numbers."""

    __name__ = "kernel"
    arg_names = ("x_ptr", "bias_ptr", "M", "BLOCK")

    def __init__(self, launcher=Launcher):
        self.log, self.pre_run_hooks = [], []
        self.compiled = Compiled(launcher(self.log))

    def __getitem__(self, grid):
        def launch(*arguments, **options):
            self.log.append(("ordinary", grid, arguments, options))
            return self.compiled

        return launch

    def ways(self):
        return [way for way, *_ in self.log]


@pytest.fixture(autouse=True)
def _a_driver(monkeypatch):
    driver = SimpleNamespace(
        get_current_device=lambda: 0, get_current_stream=lambda device: STREAM + device
    )
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=driver))
    monkeypatch.setattr(launching, "CompiledKernel", Compiled)


def prepared(kernel, **options):
    return Prepared(kernel, 12, 4, 3, {"M": 5, "BLOCK": 16}, **options)


def test_the_second_launch_runs_the_compiled_kernel():
    kernel, x, y = Kernel(), torch.empty(8), torch.empty(8)
    launch = prepared(kernel)
    launch(x, None)
    launch(y, None)
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    first, second = kernel.log
    assert first == ("ordinary", (12,), (x, None, 5, 16), options)
    fixed = (12, 1, 1), STREAM, "function", "metadata"
    assert second == ("direct", *fixed, None, None, None, y.data_ptr(), None, 5, 16)


def test_addresses_off_16_bytes_go_triton_s_way_and_leave_the_other_kernel_alone():
    kernel, whole = Kernel(), torch.empty(8)
    launch = prepared(kernel)
    launch(whole[1:], whole)
    launch(whole, whole)  # nothing was kept of the first
    launch(whole, whole)
    launch(whole, whole[1:])
    launch(whole[1:], whole)
    launch(whole, whole)
    assert kernel.ways() == ["ordinary", "ordinary", "direct", "ordinary", "ordinary", "direct"]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_hooks_of_launches_are_called_by_triton(hook):
    kernel, x = Kernel(), torch.empty(8)
    launch, chain = prepared(kernel), getattr(knobs.runtime, hook)
    launch(x, x)

    def watch(metadata):
        raise AssertionError("nothing is launched here")

    chain.add(watch)
    try:
        launch(x, x)
    finally:
        chain.remove(watch)
    launch(x, x)
    assert kernel.ways() == ["ordinary", "ordinary", "direct"]


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("value", [None, print], ids=str)
def test_hooks_need_not_be_chains(hook, value, monkeypatch):
    kernel, x = Kernel(), torch.empty(8)
    launch = prepared(kernel)
    monkeypatch.setattr(knobs.runtime, hook, value)
    launch(x, x)
    launch(x, x)
    assert kernel.ways() == ["ordinary", "ordinary" if value else "direct"]


@pytest.mark.parametrize("disturb", ["debug", "add_stages_inspection_hook", "pre_run_hooks"])
def test_whoever_changes_what_triton_compiles_gets_it(disturb, monkeypatch):
    kernel, x = Kernel(), torch.empty(8)
    launch = prepared(kernel)
    with monkeypatch.context() as changed:
        owner = kernel if disturb == "pre_run_hooks" else knobs.runtime
        changed.setattr(owner, disturb, [print])
        launch(x, x)
        launch(x, x)
    launch(x, x)  # what was compiled while disturbed is not kept
    launch(x, x)
    assert kernel.ways() == ["ordinary", "ordinary", "ordinary", "direct"]


def test_a_launcher_of_another_convention_is_left_to_triton():
    kernel, x = Kernel(Renamed), torch.empty(8)
    launch = prepared(kernel)
    launch(x, x)
    launch(x, x)
    assert kernel.ways() == ["ordinary", "ordinary"]


def test_what_is_no_compiled_kernel_is_not_kept(monkeypatch):
    kernel, x = Kernel(), torch.empty(8)
    kernel.compiled = None  # as from the interpreter
    launch = prepared(kernel)
    launch(x, x)
    launch(x, x)
    assert kernel.ways() == ["ordinary", "ordinary"]


def test_a_box_describes_each_tensor_anew():
    kernel, box = Kernel(), Box((4, 64), 64, (4, 32))
    tensors = [torch.empty(4, 64, dtype=torch.float16) for _ in range(3)]
    launch = prepared(kernel, boxes=(box,))
    for tensor in tensors:
        launch(tensor, None)
    described = [kernel.log[0][2][0], *(log[8] for log in kernel.log[1:])]
    for descriptor, tensor in zip(described, tensors, strict=True):
        assert descriptor == box.over(tensor) and descriptor.base is tensor
    assert launch._direct.templates[0].base is None  # or it would keep the first tensor alive


@pytest.mark.parametrize("wrong", [{"M": 1}, {"M": 1, "N": 2, "BLOCK": 3}, {"M": 1, "SIZE": 2}])
def test_arguments_that_the_kernel_does_not_have_are_refused(wrong):
    with pytest.raises(TypeError, match="kernel: missing, or not of its parameters"):
        Prepared(Kernel(), 12, 4, 3, wrong)


def test_recorded_launches_do_not_run():
    kernel, x = Kernel(), torch.empty(8)
    launch = prepared(kernel)
    launch(x, x)
    with recording() as launches:
        launch(x, None)
    launch(x, x)
    assert kernel.ways() == ["ordinary", "direct"]
    (one,) = launches
    assert one.kernel is kernel and one.options["num_stages"] == 3
    assert one.arguments == {"x_ptr": x, "bias_ptr": None, "M": 5, "BLOCK": 16}


def test_a_recording_is_of_its_own_thread():
    kernel, x = Kernel(), torch.empty(8)
    launch = prepared(kernel)
    inside, done = threading.Event(), threading.Event()

    def record():
        with recording(99) as launches:
            inside.set()
            done.wait(10)
            launch(x, x)
        counts.append((len(launches), num_sms(x)))

    counts: list[tuple[int, int]] = []
    thread = threading.Thread(target=record)
    thread.start()
    assert inside.wait(10)
    launch(x, x)
    assert num_sms(x) == 4
    done.set()
    thread.join(10)
    assert kernel.ways() == ["ordinary"] and counts == [(1, 4)]


def test_recordings_nest():
    x = torch.empty(8)
    with recording(5), recording(6):
        assert num_sms(x) == num_sms(Layout.of(x)) == 6
    with recording(5):
        with recording(6):
            pass
        assert num_sms(x) == 5
