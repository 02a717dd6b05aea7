"""What a class's source says of its children that are called with one and the same name.

Only what is sure to happen together counts: calls of one block of a method, without an assignment
to the name in between. Calls in the branches of an ``if`` are blocks of their own.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import weakref
from typing import NamedTuple


class Together(NamedTuple):
    """Children that one method calls with one variable.

    Attributes:
        children: in the order of the calls: an attribute of ``self``; ``"name.*"`` for all modules
            of a list; or ``"=path"`` for the child whose name ``self.path`` holds.
        apart: whether what they give is returned apart, so that each may get a backward of its own.
    """

    children: tuple[str, ...]
    apart: bool


_KNOWN: weakref.WeakKeyDictionary[type, tuple[Together, ...]] = weakref.WeakKeyDictionary()


def called_together(cls: type) -> tuple[Together, ...]:
    """What the methods of a class call together; empty where there is no source."""
    if cls not in _KNOWN:
        found: list[Together] = []
        for kind in cls.__mro__:
            for name, member in vars(kind).items():
                if inspect.isfunction(member) and getattr(cls, name, None) is member:
                    found += [group for group in _of_function(member) if group not in found]
        _KNOWN[cls] = tuple(found)
    return _KNOWN[cls]


def _of_function(function: object) -> list[Together]:
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))  # type: ignore[arg-type]
    except (OSError, TypeError, SyntaxError):
        return []
    body = tree.body[0]
    if not isinstance(body, (ast.FunctionDef, ast.AsyncFunctionDef)):
        return []
    reader = _Calls()
    for statement in body.body:
        reader.visit(statement)
    found = []
    for group in reader.groups:
        children = tuple(dict.fromkeys(group))
        if len(children) > 1 or children[0].endswith(".*"):
            found.append(Together(children, _is_apart(body, set(children))))
    return found


class _Calls(ast.NodeVisitor):
    """Collects ``self.<child>(<name>)`` by the name, from one assignment of it to the next."""

    def __init__(self) -> None:
        self.groups: list[list[str]] = []
        self._open: dict[str, list[str]] = {}
        self._written: set[str] = set()

    def _add(self, name: str, children: list[str]) -> None:
        if name not in self._open:
            self._open[name] = []
            self.groups.append(self._open[name])
        self._open[name] += children

    def _assigned(self, name: str) -> None:
        self._open.pop(name, None)
        self._written.add(name)

    def _block(self, *parts: list[ast.stmt] | ast.expr) -> None:
        """What may happen or not: apart from what is around it."""
        around, written = self._open, self._written
        returns = False
        self._written = set()
        for part in parts:
            self._open = {}
            for node in part if isinstance(part, list) else [part]:
                self.visit(node)
                returns |= any(isinstance(n, (ast.Return, ast.Break)) for n in ast.walk(node))
        inside = self._written
        self._open = {} if returns else {n: g for n, g in around.items() if n not in inside}
        self._written = written | inside

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self._block(node.body, node.orelse)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self._block(node.body, node.orelse)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        self.visit(node.values[0])
        self._block(*node.values[1:])

    def visit_While(self, node: ast.While) -> None:
        self._block(node.test, node.body, node.orelse)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.visit(node.target)
        self._block(node.body, node.orelse)

    def visit_Try(self, node: ast.Try) -> None:
        handlers = [handler.body for handler in node.handlers]
        self._block(node.body, *handlers, node.orelse, node.finalbody)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._block(node.body)

    def visit_Lambda(self, node: ast.Lambda) -> None:
        self._block(node.body)

    def visit_ListComp(self, node: ast.ListComp) -> None:
        self._comprehension(node)

    def visit_GeneratorExp(self, node: ast.GeneratorExp) -> None:
        self._comprehension(node)

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp) -> None:
        """``child(x) for child in (self.a, self.b)``, in a list of modules, or by their names."""
        match node.generators:
            case [ast.comprehension(target=ast.Name(id=each), iter=among, ifs=[], is_async=0)]:
                for call in ast.walk(node.elt):
                    match call:
                        case ast.Call(func=called, args=[ast.Name(id=x)], keywords=[]) if x != each:
                            self._add_all(x, _children(called, each, among))
            case _:
                self._block(node.elt)

    def _add_all(self, name: str, children: list[str]) -> None:
        if children:
            self._add(name, children)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        match node:
            case ast.Call(func=called, args=[ast.Name(id=name)], keywords=[]):
                if (child := _attribute(called)) and "." not in child:
                    self._add(name, [child])
        match node.func:
            case ast.Attribute(value=ast.Name(id=name), attr=method) if method.endswith("_"):
                self._assigned(name)  # ``x.add_(1)``

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)  # which happens first
        for target in node.targets:
            self.visit(target)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.generic_visit(node)
        self._write(node.target)

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        if isinstance(node.ctx, ast.Store):
            self._write(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, (ast.Store, ast.Del)):
            self._assigned(node.id)

    def _write(self, target: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self._assigned(target.id)


def _attribute(node: ast.expr) -> str:
    """``a.b`` of ``self.a.b``, empty for anything else."""
    match node:
        case ast.Attribute(value=ast.Name(id="self"), attr=name):
            return name
        case ast.Attribute(value=value, attr=name) if of := _attribute(value):
            return f"{of}.{name}"
    return ""


def _children(called: ast.expr, each: str, among: ast.expr) -> list[str]:
    """The children that a call in a comprehension over ``among`` goes to."""
    match called, among:
        case ast.Name(id=name), ast.Attribute() if name == each and (of := _attribute(among)):
            return [f"{of}.*"] if "." not in of else []
        case ast.Name(id=name), ast.Tuple(elts=parts) | ast.List(elts=parts) if name == each:
            found = [_attribute(part) for part in parts]
            return found if all(found) and not any("." in child for child in found) else []
        case (
            ast.Call(func=ast.Name(id="getattr"), args=[ast.Name(id="self"), ast.Name(id=name)]),
            ast.Tuple(elts=parts) | ast.List(elts=parts),
        ) if name == each:
            found = [_attribute(part) for part in parts]
            return [f"={path}" for path in found] if all(found) else []
    return []


def _is_apart(body: ast.FunctionDef | ast.AsyncFunctionDef, children: set[str]) -> bool:
    """Whether the function returns things that come of some of the children and not of others."""
    come_of: dict[str, set[str]] = {}

    def of(node: ast.AST) -> set[str]:
        found: set[str] = set()
        for part in ast.walk(node):
            match part:
                case ast.Name(id=name):
                    found |= come_of.get(name, set())
                case ast.Call(func=called) if (child := _attribute(called)) in children:
                    found.add(child)
                case ast.ListComp() | ast.GeneratorExp():
                    match part.generators[0]:
                        case ast.comprehension(target=ast.Name(id=each), iter=among):
                            for call in ast.walk(part.elt):
                                if isinstance(call, ast.Call):
                                    found |= set(_children(call.func, each, among)) & children
        return found

    assigned = [node for node in ast.walk(body) if isinstance(node, (ast.Assign, ast.AugAssign))]
    for _ in range(3):  # what comes later may come of what comes later still, in a loop
        for node in assigned:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                match target, node.value:
                    case ast.Tuple(elts=names), ast.Tuple(elts=values) if len(names) == len(values):
                        pairs = list(zip(names, values, strict=True))
                    case _:
                        pairs = [(target, node.value)]
                for name, value in pairs:
                    for part in ast.walk(name):
                        if isinstance(part, ast.Name):
                            come_of.setdefault(part.id, set()).update(of(value))
    for found_node in ast.walk(body):
        match found_node:
            case ast.Yield() | ast.YieldFrom():
                return True
            case ast.Return(value=ast.expr() as value):
                match value:
                    case ast.Tuple(elts=parts) | ast.List(elts=parts):
                        pass
                    case ast.Dict(values=parts):
                        pass
                    case ast.Call(args=args, keywords=keywords) if not _attribute(value.func):
                        parts = [*args, *(keyword.value for keyword in keywords)]
                        if len(parts) < 2 or not isinstance(value.func, ast.Name):
                            parts = [value]
                    case _:
                        parts = [value]
                sources = [found for part in parts if (found := of(part))]
                if any(found != sources[0] for found in sources):
                    return True
                listed = isinstance(value, (ast.ListComp, ast.GeneratorExp))
                if listed and sources:
                    return True
    return False
