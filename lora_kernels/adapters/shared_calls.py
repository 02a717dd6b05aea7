"""What a class's source says of its children that are called with one and the same name."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap


@functools.cache
def called_together(cls: type) -> tuple[tuple[str, ...], ...]:
    """Attributes of ``self`` that one method calls with the same variable, nothing having been
    assigned to it in between; in the order of the calls. Empty where there is no source."""
    found: list[tuple[str, ...]] = []
    for kind in cls.__mro__:
        for name, member in vars(kind).items():
            if inspect.isfunction(member) and getattr(cls, name, None) is member:
                found += [group for group in _of_function(member) if group not in found]
    return tuple(found)


def _of_function(function: object) -> list[tuple[str, ...]]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return []
    reader = _Calls()
    reader.visit(tree)
    return [tuple(dict.fromkeys(names)) for names in reader.groups if len(set(names)) > 1]


class _Calls(ast.NodeVisitor):
    """Collects ``self.<child>(<name>)`` by the name, from one assignment of it to the next."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._open: dict[str, list[str]] = {}

    def _assigned(self, name: str) -> None:
        self._open.pop(name, None)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        called = node.func
        if not isinstance(called, ast.Attribute):
            return
        if isinstance(called.value, ast.Name) and called.value.id == "self":
            if len(node.args) == 1 and isinstance(node.args[0], ast.Name) and not node.keywords:
                name = node.args[0].id
                if name not in self._open:
                    self._open[name] = []
                    self.groups.append(self._open[name])
                self._open[name].append(called.attr)
        elif isinstance(called.value, ast.Name) and called.attr.endswith("_"):
            self._assigned(called.value.id)  # ``x.add_(1)``

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # which happens first
        for target in node.targets:
            self.visit(target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        self._written(node.target)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Store):
            self._written(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            self._assigned(node.id)

    def _written(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._assigned(target.id)
