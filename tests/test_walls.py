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
        {"group", "experts"},
        {"linear"},
        {"kernels", "config", "dispatch"},
        {"per_thread"},
    ),
    "minimind": (
        {"__main__"},
        {"cli"},
        {"__init__"},
        {"commands"},
        {"training"},
        {"model"},
        {"data", "settings"},
        {"files"},
    ),
}
# Where other packages come in: these and no others have `__all__`.
DOORS = {
    "lora_kernels.__init__",
    "lora_kernels.adapters.__init__",
    "lora_kernels.dispatch",
    "lora_kernels.kernels.__init__",
    "lora_kernels.proof.__init__",
    "minimind.__init__",
    "minimind.data.__init__",
    "minimind.training.__init__",
}
IMPORTERS = ("import_module", "__import__")
# These import by a name that is not written out: a neighbour's, or one of their own `_HOMES`.
BY_NAME = {"lora_kernels.linear.ops", "lora_kernels.group.ops"} | {
    door for door in DOORS if door.endswith("__init__")
}
# Tests of no one file: of the README, of all files, and of the suites as they are run.
OF_NO_FILE = {"test_readme.py", "test_supply.py", "benchmarks/test_suites.py", "test_walls.py"}


def sources():
    """The text of every file of the packages, by module; a package is ``….__init__``."""
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
    }


@functools.cache
def syntax(text):
    """The tree of a text; most texts are the same in every test."""
    return ast.parse(text)


def homes(text):
    """Where a face that imports when asked says its names are."""
    for node in syntax(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_HOMES":
            return ast.literal_eval(node.value)
    return {}


def offered(text):
    """The names in ``__all__``, which makes a module a door for other packages; else None."""
    for node in syntax(text).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return ast.literal_eval(node.value)
    return None


def imports(module, text):
    """``(module, name)`` of all that the text imports; no name for a module as a whole.

    Where a module is imported by a name that is not written out, that is ``("", its expression)``.
    """
    folder = module.split(".")[:-1]
    for home in homes(text).values():
        yield ".".join([*folder, home]), "*"
    for node in ast.walk(syntax(text)):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = folder[: len(folder) - node.level + 1] if node.level else []
            home = ".".join([*inside, *filter(None, [node.module])])
            yield from ((home, alias.name) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IMPORTERS:
            if node.args and isinstance(node.args[0], ast.Constant):
                name = node.args[0].value
                yield (".".join(folder) + name if name.startswith(".") else name), "*"
            else:
                yield "", ast.unparse(node)


def target(home, name, modules):
    """The module that an import is of, and the name it takes from it, empty for all of it."""
    for whole, rest in ((f"{home}.{name}", ""), (home, name)):
        for module in (whole, f"{whole}.__init__"):
            if module in modules:
                return module, rest
    return home, name


def room(module):
    return module.split(".")[1]


def floor(module):
    floors = FLOORS.get(module.split(".")[0], ())
    return next((i for i, rooms in enumerate(floors) if room(module) in rooms), None)


def faults(texts, helpers=frozenset()):
    """What stands against the walls, a sentence each; ``helpers`` are modules of the tests."""
    found, graph = [], {}
    for module, text in texts.items():
        graph[module] = set()
        package = module.split(".")[0]
        if package in FLOORS and floor(module) is None:
            found.append(f"{module}: {room(module)} has no place among the floors of {package}")
        if (offered(text) is not None) != (module in DOORS):
            found.append(f"{module}: the doors, and no others, have __all__")
        for home, name in imports(module, text):
            top = home.split(".")[0]
            if not home and module not in BY_NAME:
                found.append(f"{module} imports by a name that is not written out: {name}")
            elif top in helpers:
                found.append(f"{module} imports {home} of the tests")
            elif top in PACKAGES:
                whole, rest = target(home, name, texts)
                graph[module].add(whole)
                found += judged(module, whole, rest, texts)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"a circle: {' → '.join(error.args[1])}")
    return found


def judged(module, home, name, texts):
    """What is wrong with ``module`` importing ``name`` of the module ``home``."""
    ours, theirs = PACKAGES.index(module.split(".")[0]), PACKAGES.index(home.split(".")[0])
    if home not in texts:
        return [f"{module} imports {home}, which is not there"]
    if ours > theirs:
        return [f"{module} imports {home} of a package above its own"]
    if ours < theirs:
        if home not in DOORS:
            return [f"{module} imports {home}, which is inside of another package"]
        if name not in (*(offered(texts[home]) or ()), "__version__"):
            return [f"{module} should import names in __all__ of {home}, not {name or 'it all'}"]
        return []
    if floor(module) is None or floor(home) is None or room(module) == room(home):
        return []
    below = floor(module) < floor(home)
    return [] if below else [f"{module} imports {home}, which does not lie below it"]


def test_the_walls_hold():
    helpers = {path.stem for path in (ROOT / "tests" / "helpers").glob("*.py")} | {"tests"}
    assert len(helpers) > 5
    assert faults(sources(), helpers) == []


PLANTED = [
    ("lora_kernels.kernels.gemm", "from ..linear import module", "does not lie below"),
    ("lora_kernels.kernels.thin", "from ..config import LoRAConfig", "does not lie below"),
    ("lora_kernels.linear.ops", "from .. import use_backend", "does not lie below"),
    ("lora_kernels.adapters.files", "def f():\n    from ..proof import Case", "not lie below"),
    ("lora_kernels.linear.ops", "import lora_kernels.adapters.files", "does not lie below"),
    ("lora_kernels.config", "importlib.import_module('.proof.check')", "does not lie below"),
    ("lora_kernels.config", "importlib.import_module(name)", "not written out"),
    ("lora_kernels.config", "__import__('lora_kernels.proof')", "does not lie below"),
    ("lora_kernels.adapters.__init__", "_HOMES = {'x': 'nowhere'}", "is not there"),
    ("minimind.model.moe", "from ..training.loop import Trainer", "does not lie below"),
    ("minimind.data.sft", "from ..settings import Settings", "does not lie below"),
    ("lora_kernels.adapters.targets", "from .surgery import apply_lora", "a circle"),
    ("benchmarks.machine", "from .measure import spread", "a circle"),
    ("minimind.cli", "from lora_kernels.adapters.files import write_atomically", "inside of"),
    ("minimind.cli", "from lora_kernels.adapters import files", "inside of another"),
    ("minimind.cli", "import lora_kernels.linear.module", "inside of another"),
    ("minimind.cli", "import lora_kernels", "not it all"),
    ("minimind.cli", "from lora_kernels import kernels", "not it all"),
    ("minimind.cli", "from lora_kernels import check_rank", "not check_rank"),
    ("benchmarks.tune", "from minimind.model.config import LMConfig", "inside of another"),
    ("minimind.cli", "from lora_kernels import lora_layers", ""),
    ("minimind.cli", "from lora_kernels.proof import distance", ""),
    ("minimind.cli", "from lora_kernels import __version__", ""),
    ("lora_kernels.config", "from minimind import LMConfig", "a package above"),
    ("minimind.settings", "from benchmarks import machine", "a package above"),
    ("lora_kernels.config", "import oracle", "of the tests"),
    ("minimind.cli", "from .nowhere import thing", "is not there"),
    ("lora_kernels.config", "__all__ = ['LoRAConfig']", "have __all__"),
    ("minimind.shed", "", "no place among the floors"),
]


@pytest.mark.parametrize(("module", "line", "fault"), PLANTED)
def test_a_planted_import_is_noticed(module, line, fault):
    texts = sources()
    texts[module] = f"{texts.get(module, '')}\n{line}\n"
    found = faults(texts, {"oracle"})
    assert bool(found) == bool(fault) and fault in "".join(found)


def test_a_test_is_found_from_the_file_it_tests():
    """``room/file.py`` is tested by ``tests/room/test_file.py`` or ``test_file_<aspect>.py``."""
    tests = ROOT / "tests"
    lost = []
    for path in sorted(tests.rglob("test_*.py")):
        folder = path.relative_to(tests).parent
        package = "" if folder.parts and folder.parts[0] in PACKAGES else "lora_kernels"
        files = (ROOT / package / folder).glob("*.py")
        names = [f"test_{file.stem.strip('_')}" for file in files]
        tested = any(path.stem == name or path.stem.startswith(f"{name}_") for name in names)
        if not tested and path.relative_to(tests).as_posix() not in OF_NO_FILE:
            lost.append(str(path))
    assert lost == []
