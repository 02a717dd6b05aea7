"""The walls between rooms, as ARCHITECTURE.md draws them, and where a file's tests lie."""

from __future__ import annotations

import ast
import functools
from graphlib import CycleError, TopologicalSorter

import pytest
from places import ROOT

# From top to bottom. A room imports of itself and of what lies below; neighbours know nothing of
# each other. A file that lies in no room is a room by itself, `__init__` the package's own face.
PACKAGES = ("benchmarks", "minimind", "lora_kernels")
FLOORS = {
    "lora_kernels": (
        {"__main__"},
        {"__init__"},
        {"proof"},
        {"adapters"},
        {"linear"},
        {"kernels", "config", "dispatch"},
    ),
    "minimind": (
        {"__main__"},
        {"cli"},
        {"__init__"},
        {"commands"},
        {"training"},
        {"model"},
        {"data", "settings"},
    ),
}
# Tests of no one file: of the README, of all files, and of the suites as they are run.
OF_NO_FILE = {"test_readme", "test_suites", "test_walls"}


def sources():
    """The text of every file of the packages, by module; a package is ``….__init__``."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@functools.cache
def syntax(text):
    """The nodes of a text; most texts are the same in every test."""
    return tuple(ast.walk(ast.parse(text)))


def imports(module, text, modules):
    """``(module, name)`` for each name that the text imports of the packages."""
    folder = module.split(".")[:-1]
    for node in syntax(text):
        if isinstance(node, ast.Import):
            found = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = folder[: len(folder) - node.level + 1] if node.level else []
            home = ".".join([*inside, *filter(None, [node.module])])
            found = [(home, alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            named = [argument.value for argument in node.args if isinstance(argument, ast.Constant)]
            found = [(".".join(folder) + n if n.startswith(".") else n, "") for n in named]
        else:
            continue
        for home, name in found:
            if home.split(".")[0] not in PACKAGES:
                continue
            for whole, rest in ((f"{home}.{name}", ""), (home, name)):
                if whole in modules or f"{whole}.__init__" in modules:
                    yield (whole if whole in modules else f"{whole}.__init__"), rest
                    break
            else:
                yield home, name


def room(module):
    return module.split(".")[1]


def floor(module):
    floors = FLOORS.get(module.split(".")[0], ())
    return next((i for i, rooms in enumerate(floors) if room(module) in rooms), None)


def offered(text):
    """The names in ``__all__``, which makes a module a door for other packages; else None."""
    for node in syntax(text):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def faults(texts):
    """What stands against the walls, a sentence each."""
    found, graph = [], {}
    for module, text in texts.items():
        graph[module] = set()
        package = module.split(".")[0]
        if package in FLOORS and floor(module) is None:
            found.append(f"{module}: {room(module)} has no place among the floors of {package}")
        for home, name in imports(module, text, texts):
            graph[module].add(home)
            other = home.split(".")[0]
            if home not in texts:
                found.append(f"{module} imports {home}, which is not there")
            elif package == other:
                if package in FLOORS and room(module) != room(home):
                    ours, theirs = floor(module), floor(home)
                    if ours is not None and theirs is not None and ours >= theirs:
                        found.append(f"{module} imports {home}, which does not lie below it")
            elif PACKAGES.index(package) > PACKAGES.index(other):
                found.append(f"{module} imports {home} of a package above its own")
            else:
                names = offered(texts[home])
                if names is None:
                    found.append(f"{module} imports {home}, which is inside of another package")
                elif name and not name.startswith("__") and name not in names:
                    found.append(f"{module} imports {name}, which is not in __all__ of {home}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' → '.join(error.args[1])}")
    return found


def test_the_walls_hold():
    assert faults(sources()) == []


@pytest.mark.parametrize(
    ("module", "line", "fault"),
    [
        ("lora_kernels.kernels.gemm", "from ..linear import module", "does not lie below"),
        ("lora_kernels.kernels.thin", "from ..config import LoRAConfig", "does not lie below"),
        ("lora_kernels.linear.ops", "from .. import use_backend", "does not lie below"),
        ("lora_kernels.adapters.files", "def f():\n    from ..proof import Case", "not lie below"),
        ("lora_kernels.linear.ops", "import lora_kernels.adapters.files", "does not lie below"),
        ("lora_kernels.config", "import_module('.proof.check')", "does not lie below"),
        ("minimind.model.moe", "from ..training.loop import Trainer", "does not lie below"),
        ("minimind.data.sft", "from ..settings import Settings", "does not lie below"),
        ("lora_kernels.adapters.targets", "from .surgery import apply_lora", "a circle"),
        ("benchmarks.machine", "from .measure import spread", "a circle"),
        ("minimind.cli", "from lora_kernels.adapters.files import write_atomically", "inside"),
        ("minimind.cli", "from lora_kernels.adapters import files", "inside of another"),
        ("minimind.cli", "import lora_kernels.linear.module", "inside of another"),
        ("minimind.cli", "from lora_kernels import check_rank", "not in __all__"),
        ("benchmarks.tune", "from minimind.model.config import LMConfig", "inside of another"),
        ("lora_kernels.config", "from minimind import LMConfig", "a package above"),
        ("minimind.settings", "from benchmarks import machine", "a package above"),
        ("minimind.cli", "from lora_kernels import lora_layers", ""),
        ("minimind.cli", "from lora_kernels.proof import distance", ""),
        ("minimind.cli", "from .nowhere import thing", "is not there"),
        ("minimind.shed", "", "no place among the floors"),
    ],
)
def test_a_planted_import_is_noticed(module, line, fault):
    texts = sources()
    texts[module] = f"{texts.get(module, '')}\n{line}\n"
    found = faults(texts)
    assert bool(found) == bool(fault) and fault in "".join(found)


def test_a_test_is_found_from_the_file_it_tests():
    """``room/file.py`` is tested by ``tests/room/test_file.py`` or ``test_file_<aspect>.py``."""
    lost = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        folder = path.relative_to(ROOT / "tests").parent
        package = "" if folder.parts and folder.parts[0] in PACKAGES else "lora_kernels"
        files = (ROOT / package / folder).glob("*.py")
        names = [f"test_{file.stem.strip('_')}" for file in files]
        tested = any(path.stem == name or path.stem.startswith(f"{name}_") for name in names)
        if not tested and path.stem not in OF_NO_FILE:
            lost.append(str(path.relative_to(ROOT)))
    assert lost == []
