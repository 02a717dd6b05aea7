"""Statements of a function, walked with what its names stand for so far."""

from __future__ import annotations

import ast
from collections.abc import Sequence

from .code_values import NOTHING, Names, Test, Value

_PAIRS = ("items", "named_children")


class Scope:
    """Walks a body for every way that the tests in it may go.

    Attributes:
        names: what each stands for.
        tests: what has to hold where the walk is, and whether it has to be true or false.
    """

    def __init__(self, tests: tuple[tuple[Test, bool], ...]) -> None:
        self.names: Names = {}
        self.tests = tests

    def value(self, node: ast.expr) -> Value:
        """What an expression may be."""
        raise NotImplementedError

    def use(self, node: ast.expr) -> Value:
        """The same where a weight's values are used."""
        raise NotImplementedError

    def block(self, body: Sequence[ast.stmt]) -> bool:
        """Walk statements; whether they never come to their end."""
        before = self.tests
        ends = [self.statement(statement) for statement in body]
        self.tests = before
        return True in ends

    def statement(self, node: ast.stmt) -> bool:
        """Walk one; whether what follows it is never reached."""
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets if node.value is not None else ():
                self.bind(target, node.value)  # type: ignore[arg-type]
        elif isinstance(node, ast.If):
            return self.branch(node)
        elif isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
            self.forget(node)
            if isinstance(node, ast.While):
                self.use(node.test)
            else:
                self.bind_elements(node.target, node.iter)
            self.block(node.body)
            self.block(node.orelse)
        elif isinstance(node, ast.FunctionDef):
            self.nested(node)
        else:
            self.inside(node)
        return isinstance(node, (ast.Return, ast.Raise, ast.Continue, ast.Break))

    def inside(self, node: ast.AST) -> None:
        """Walk the parts of a node, where nothing more is known of it."""
        for _, part in ast.iter_fields(node):
            if isinstance(part, list) and part and isinstance(part[0], ast.stmt):
                self.block(part)
                continue
            for child in part if isinstance(part, list) else [part]:
                if isinstance(child, ast.expr):
                    self.use(child)
                elif isinstance(child, ast.AST):
                    self.inside(child)

    def nested(self, node: ast.FunctionDef | ast.Lambda) -> None:
        """Walk a function within the function, whose arguments may be anything."""
        outside = dict(self.names)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            self.names.pop(argument.arg, None)
        if isinstance(node, ast.Lambda):
            self.use(node.body)
        else:
            self.block(node.body)
        self.names = outside

    def branch(self, node: ast.If) -> bool:
        """Both ways of an ``if``; whether what follows it is never reached."""
        test = self.use(node.test).known
        before, around = dict(self.names), self.tests
        ends, ways = [], []
        for body, wanted in ((node.body, True), (node.orelse, False)):
            self.names = dict(before)
            self.tests = around if test is None else (*around, (test, wanted))
            ends.append(self.block(body))
            ways.append(self.names)
        kept = [way for way, ended in zip(ways, ends, strict=True) if not ended] or ways
        self.names = kept[0] if len(kept) == 1 else _joined(*kept)
        # What follows is reached by the other branch alone; `block` takes this back at its end.
        self.tests = around
        if test is not None and ends[0] != ends[1]:
            self.tests = (*around, (test, ends[1]))
        return all(ends)

    def forget(self, node: ast.AST) -> None:
        """What is assigned in a loop has no one value in it."""
        for child in ast.walk(node):
            if isinstance(child, ast.Name) and isinstance(child.ctx, ast.Store):
                old = self.names.get(child.id, NOTHING)
                self.names[child.id] = old._replace(known=None)

    def bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = self.value(value)
        elif isinstance(target, (ast.Tuple, ast.List)):
            if isinstance(value, (ast.Tuple, ast.List)) and len(value.elts) == len(target.elts):
                for one, its in zip(target.elts, value.elts, strict=True):
                    self.bind(one, its)
            else:
                self.bind_elements(ast.Tuple(target.elts, ast.Store()), value)
        else:
            self.use(value)
            self.use(target)

    def bind_elements(self, target: ast.expr, value: ast.expr) -> None:
        """The names of ``target`` to what iterating over ``value`` gives."""
        called = value.func if isinstance(value, ast.Call) else None
        name = last_name(called)
        if isinstance(value, ast.Call) and isinstance(target, ast.Tuple):
            if name == "zip" and len(value.args) == len(target.elts):
                for one, its in zip(target.elts, value.args, strict=True):
                    self.bind_elements(one, its)
                return
            if name == "enumerate" and len(target.elts) == 2 and value.args:
                self.bind_elements(target.elts[1], value.args[0])
                return
            if name in _PAIRS and isinstance(called, ast.Attribute) and len(target.elts) == 2:
                self.assign(target.elts[1], self.value(called.value).children())
                return
        self.assign(target, self.elements(value))

    def elements(self, value: ast.expr) -> Value:
        if isinstance(value, (ast.Tuple, ast.List)):
            found = NOTHING
            for element in value.elts:
                found = found.either(self.value(element))
            return found
        return self.value(value).children()

    def assign(self, target: ast.expr, value: Value) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name):
                self.names[node.id] = value


def _joined(one: Names, other: Names) -> Names:
    return {
        name: one.get(name, NOTHING).either(other.get(name, NOTHING))
        for name in one.keys() | other.keys()
    }


def last_name(node: ast.expr | None) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return node.attr if isinstance(node, ast.Attribute) else ""
