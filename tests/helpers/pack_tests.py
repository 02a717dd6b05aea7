"""A pack that also has what the kernels' tests launch, which take minutes of compiling on a GPU.

``python tests/helpers/pack_tests.py --target sm_90 OUT`` runs tests in Triton's interpreter, where
no GPU is needed, writes down what they launch, and compiles that with what ``pack`` itself takes.
Tests that only run on a GPU are not among them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

ROOT = Path(__file__).parents[2]
TESTS = ("tests/kernels", "tests/linear")


class Pointer(NamedTuple):
    """What Triton looks at in a tensor: its dtype, and whether 16 divides its address."""

    dtype: torch.dtype
    aligned: bool

    def tensor(self) -> torch.Tensor:
        """One like it, on meta."""
        return torch.empty(2, dtype=self.dtype, device="meta")[0 if self.aligned else 1 :]


class Described(NamedTuple):
    """A tensor descriptor."""

    base: Pointer
    fields: tuple[Any, ...]  # shape, strides, block shape


class Recorded(NamedTuple):
    """One launch, as a case that `packing.pack` takes."""

    module: str
    kernel: str
    arguments: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, Any], ...]
    tf32 = False  # it is among the arguments

    def operands(self, device: torch.device) -> dict[str, Any]:
        """The arguments, built anew."""
        return {name: _built(value) for name, value in self.arguments}

    def run(self, arguments: dict[str, Any]) -> None:
        """Record the launch on them."""
        from lora_kernels.kernels.launching import Launch, record

        kernel = getattr(importlib.import_module(self.module), self.kernel)
        record(Launch(kernel, arguments, dict(self.options)))


def _written(value: Any) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, torch.Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16 == 0)
    if isinstance(value, TensorDescriptor):
        fields = value.shape, value.strides, value.block_shape
        return Described(_written(value.base), tuple(map(tuple, fields)))
    return value


def _built(value: Any) -> Any:
    from triton.tools.tensor_descriptor import TensorDescriptor

    if isinstance(value, Pointer):
        return value.tensor()
    if isinstance(value, Described):
        return TensorDescriptor(value.base.tensor(), *map(list, value.fields))
    return value


# The rest is a plugin of pytest: -p pack_tests --record-launches FOLDER --record-sms NUMBER.


def pytest_addoption(parser: Any) -> None:
    """Where to write, and for a GPU of how many multiprocessors."""
    parser.addoption("--record-launches", metavar="FOLDER")
    parser.addoption("--record-sms", type=int, default=132)


def pytest_configure(config: Any) -> None:
    """Note each launch of the interpreter from here on."""
    from triton.runtime.interpreter import InterpretedFunction

    config.launches_recorded = found = set()
    run = InterpretedFunction.run

    def noted(self: Any, *args: Any, grid: Any, warmup: bool, **named: Any) -> Any:
        given = dict(zip(self.arg_names, args, strict=False)) | named
        arguments = [(name, _written(given[name])) for name in self.arg_names if name in given]
        options = sorted((name, given[name]) for name in given if name not in self.arg_names)
        recorded = Recorded(self.fn.__module__, self.__name__, tuple(arguments), tuple(options))
        if recorded.module.startswith("lora_kernels."):
            found.add(recorded)
        return run(self, *args, grid=grid, warmup=warmup, **named)

    InterpretedFunction.run = noted


def pytest_collection_finish(session: Any) -> None:
    """Let launchers plan for the GPU: how a sum is split goes by its multiprocessors."""
    sms = session.config.getoption("record_sms")
    for name, module in list(sys.modules.items()):
        if name.startswith("lora_kernels.") and hasattr(module, "num_sms"):
            module.num_sms = lambda x: sms


def pytest_sessionfinish(session: Any) -> None:
    """Write what this process has noted."""
    folder = session.config.getoption("record_launches")
    Path(folder, f"{os.getpid()}.pickle").write_bytes(
        pickle.dumps(sorted(session.config.launches_recorded, key=repr))
    )


def recorded(sms: int, tests: list[str]) -> list[Recorded]:
    """What tests launch where the interpreter runs them; those that fail are counted in."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "pack_tests", *tests]
        command += ["-m", "interpreted", "--record-launches", folder, "--record-sms", str(sms)]
        paths = [str(ROOT), str(ROOT / "tests" / "helpers")]
        environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run(command, cwd=ROOT, env=environment, stdout=sys.stderr)
        found: dict[Recorded, None] = {}
        for path in sorted(Path(folder).glob("*.pickle")):
            found |= dict.fromkeys(pickle.loads(path.read_bytes()))
    return list(found)


def main(arguments: list[str] | None = None) -> int:
    """Record, compile, pack; 1 if something did not compile."""
    from lora_kernels.proof import packing
    from lora_kernels.proof.commands import TARGETS

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--jobs", type=int)
    parser.add_argument("out", type=Path)
    parser.add_argument("tests", nargs="*", default=TESTS, help="files or folders of tests")
    options = parser.parse_args(arguments)
    capability, sms = TARGETS[options.target]
    launches = recorded(sms, list(options.tests))
    cases = [*packing.pack_cases(capability), *launches]
    made = packing.pack(options.out, capability, sms, cases=cases, jobs=options.jobs)
    for failure in made.failed[:20]:
        print(f"FAIL {failure}")
    print(f"{len(launches)} launches of tests; {made.kernels} kernels, {made.size / 1e6:.1f} MB")
    return 1 if made.failed or not launches else 0


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    import pack_tests  # its classes by the name under which the worker processes find them

    sys.exit(pack_tests.main())
