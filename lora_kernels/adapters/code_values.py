"""What an expression in a module's code may stand for: modules, weights, the value of a setting."""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import nn

# A module below the one in question, by attributes; ANY is each child of a container.
Path = tuple[str, ...]
ANY = "*"
# What a test in the code gives on the module in question, or UNKNOWN.
Test = Callable[[nn.Module], Any]
UNKNOWN = object()


class Value(NamedTuple):
    """What an expression may be: one of these modules, one of their weights, and what a test of it
    gives, if that is known."""

    modules: frozenset[Path] = frozenset()
    weights: frozenset[Path] = frozenset()
    known: Test | None = None

    def children(self) -> Value:
        """What one gets by iterating over it."""
        return Value(frozenset((*path, ANY) for path in self.modules))

    def either(self, other: Value) -> Value:
        """What is this or that."""
        known = self.known if self.known is other.known else None
        return Value(self.modules | other.modules, self.weights | other.weights, known)


NOTHING, ITSELF = Value(), Value(frozenset({()}))
Names = dict[str, Value]

COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
}


def constant(value: Any) -> Test:
    return lambda module: value


def setting(path: Path) -> Test:
    """A setting of the module, or of its configuration: plain data that code does not compute."""

    def look(module: nn.Module) -> Any:
        owner: Any = module
        for name in path:
            if isinstance(owner, nn.Module):
                owner = vars(owner).get(name, owner._modules.get(name, UNKNOWN))
            else:
                owner = getattr(owner, name, UNKNOWN)
        plain = owner is None or isinstance(owner, (bool, int, float, str))
        return owner if plain and path[-1] != "training" else UNKNOWN

    return look


def computed(function: Callable[..., Any], *tests: Test) -> Test:
    def look(module: nn.Module) -> Any:
        values = [test(module) for test in tests]
        try:
            return UNKNOWN if UNKNOWN in values else function(*values)
        except TypeError:
            return UNKNOWN

    return look


def every(tests: Sequence[Test | None]) -> Test:
    def look(module: nn.Module) -> Any:
        values = [UNKNOWN if test is None else test(module) for test in tests]
        if any(value is not UNKNOWN and not value for value in values):
            return False
        return UNKNOWN if UNKNOWN in values else True

    return look


def some(tests: Sequence[Test | None]) -> Test:
    def look(module: nn.Module) -> Any:
        values = [UNKNOWN if test is None else test(module) for test in tests]
        if any(value is not UNKNOWN and value for value in values):
            return True
        return UNKNOWN if UNKNOWN in values else False

    return look
