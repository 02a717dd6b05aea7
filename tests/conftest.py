"""Shared fixtures."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest

# Of pytest-xdist's processes: with more than a thread each they would wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

import torch

# Without a GPU the kernels run in Triton's interpreter, which it chooses when it decorates them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny_cli

# Whoever starts the tests in the background may have them ignore what some of them send.
for _number, _handler in (
    ("SIGINT", signal.default_int_handler),
    ("SIGHUP", signal.SIG_DFL),
    ("SIGTERM", signal.SIG_DFL),
):
    _number = getattr(signal, _number, None)
    if _number is not None and signal.getsignal(_number) is signal.SIG_IGN:
        signal.signal(_number, _handler)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """As many processes as processors, by pytest-xdist where it is installed; ``-n 0`` says no.

    Not on a GPU, whose memory the large tests need for themselves; not for a single test, nor for
    what has to be seen or typed while it runs.
    """
    option = config.option
    if not config.pluginmanager.hasplugin("xdist") or "PYTEST_XDIST_WORKER" in os.environ:
        return
    if torch.cuda.is_available() or option.numprocesses is not None or option.tx:
        return
    talks = option.capture == "no" or any(
        config.getoption(name, False)
        for name in ("usepdb", "trace", "collectonly", "showfixtures", "cacheshow")
    )
    if not talks and not any("::" in argument for argument in config.args):
        option.numprocesses = "auto"
        option.dist = "worksteal" if option.dist == "no" else option.dist


def pytest_collection_modifyitems(items):
    absent = {}
    if torch.cuda.is_available():
        absent["interpreted"] = "the kernels run on the GPU here"
    else:
        absent["gpu"] = "needs a CUDA GPU"
    if importlib.util.find_spec("triton") is None:
        absent["interpreted"] = "triton is not installed"
    for item in items:
        for marker in absent.keys() & item.keywords:
            item.add_marker(pytest.mark.skip(reason=absent[marker]))


@pytest.fixture(autouse=True)
def _no_cache_of_the_users(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """Fresh memory comes back full of NaN or set bits, so that what nobody wrote cannot hide."""
    for name in ("empty", "empty_like", "empty_strided"):
        real = getattr(torch, name)

        def poison(*args, _real=real, **kwargs):
            tensor = _real(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(255) if tensor.dtype == torch.uint8 else tensor

        monkeypatch.setattr(torch, name, poison)
    new = torch.Tensor.new_empty

    def poison_new(*args, **kwargs):
        tensor = new(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch.Tensor, "new_empty", poison_new)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a tiny base model and a little data; the command runs in it."""
    monkeypatch.chdir(tmp_path)
    tiny_cli.make_base(tmp_path / "base")
    tiny_cli.write(
        "data.jsonl", [tiny_cli.talk(f"What is {i} plus 1?", f"It is {i + 1}.") for i in range(30)]
    )
    return tmp_path
