"""Whether a class's forward is that of a gated feed-forward, ``down(act(gate(x)) * up(x))``.

It is told by its source, whatever its children are called: each name in it is taken for what was
assigned to it, until what is returned says all of it.
"""

from __future__ import annotations

import ast
import functools
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from .weight_reads import SourceReader

# What an expression is: ("x",), ("self",), ("attribute", of, name), ("named", of, name expression),
# ("global", object), ("call", function, argument), ("product", one, other), ("constant", value).
Term = tuple[Any, ...]
_SELF, _X = ("self",), ("x",)


class Form(NamedTuple):
    """The terms by which a module of the class has its three linears and the activation."""

    gate: Term
    up: Term
    down: Term
    activation: Term


@functools.cache
def form_of(function: Any) -> Form | None:
    """The form of a forward, or None where it is any other, decorated, or has no source."""
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    tree = SourceReader().tree(function)
    if tree is None or tree.decorator_list or tree.name != function.__name__:
        return None
    given = tree.args
    plain = not (given.posonlyargs or given.kwonlyargs or given.vararg or given.kwarg)
    if not plain or len(given.args) != 2 or given.defaults:
        return None
    itself, x = (argument.arg for argument in given.args)
    try:
        returned = _Reader(function, {itself: _SELF, x: _X}).body(tree.body)
    except _Other:
        return None
    return _matched(returned)


def _matched(term: Term) -> Form | None:
    match term:
        case ("call", down, ("product", first, second)):
            for one, other in ((first, second), (second, first)):
                match one, other:
                    case (
                        ("call", activation, ("call", gate, ("x",))),
                        ("call", up, ("x",)),
                    ) if all(map(_is_child, (gate, up, down))):
                        return Form(gate, up, down, activation)
    return None


def _is_child(term: Term) -> bool:
    return term[0] in ("attribute", "named") and term[1] == _SELF


class _Other(Exception):
    """The code does something else than the form has."""


class _Reader:
    """Reads straight code, with what its names stand for so far."""

    def __init__(self, function: FunctionType, names: dict[str, Term]) -> None:
        self.function, self.names = function, names

    def body(self, statements: list[ast.stmt]) -> Term:
        """What is returned."""
        for node in statements:
            match node:
                case ast.Expr(value=ast.Constant()):
                    pass  # its docstring
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    self.names[name] = self.term(value)
                case ast.Assign(targets=[ast.Tuple(elts=targets)], value=value):
                    self.unpack(targets, value)
                case ast.Return(value=ast.expr() as value) if node is statements[-1]:
                    return self.term(value)
                case _:
                    raise _Other
        raise _Other

    def unpack(self, targets: list[ast.expr], value: ast.expr) -> None:
        """``a, b = one, other``, also of ``(… for name in (…))``."""
        match value:
            case ast.Tuple(elts=values):
                terms = [self.term(each) for each in values]
            case ast.GeneratorExp(
                elt=element,
                generators=[
                    ast.comprehension(
                        target=ast.Name(id=name), iter=ast.Tuple(elts=values), ifs=[], is_async=0
                    )
                ],
            ):
                terms = [self.term(element, {name: self.term(each)}) for each in values]
            case _:
                raise _Other
        if len(terms) != len(targets):
            raise _Other
        for target, term in zip(targets, terms, strict=True):
            if not isinstance(target, ast.Name):
                raise _Other
            self.names[target.id] = term

    def term(self, node: ast.expr, inner: dict[str, Term] | None = None) -> Term:
        """What an expression is; ``inner`` are names of a comprehension."""
        names = {**self.names, **(inner or {})}
        match node:
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.Name(id=name) if name in self.function.__code__.co_freevars:
                raise _Other  # of a factory's, which each of its classes may have another of
            case ast.Name(id=name) if name in self.function.__globals__:
                return "global", self.function.__globals__[name]
            case ast.Constant(value=value):
                return "constant", value
            case ast.Attribute(value=value, attr=name):
                of = self.term(value, inner)
                if of[0] == "global":
                    return "global", getattr(of[1], name, None)
                return "attribute", of, name
            case ast.Call(func=ast.Name(id="getattr"), args=[value, name], keywords=[]):
                if "getattr" not in names:
                    return "named", self.term(value, inner), self.term(name, inner)
            case ast.Call(func=function, args=[argument], keywords=[]):
                if not isinstance(argument, ast.Starred):
                    return "call", self.term(function, inner), self.term(argument, inner)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return "product", self.term(left, inner), self.term(right, inner)
        raise _Other


def valued(term: Term, module: nn.Module) -> Any:
    """What a term that holds neither x nor a call is on this module, None where it is nothing."""
    try:
        return _valued(term, module)
    except Exception:  # of a property, which may not be ready
        return None


def _valued(term: Term, module: nn.Module) -> Any:
    match term:
        case ("self",):
            return module
        case ("constant" | "global", value):
            return value
        case ("attribute", of, name):
            return getattr(_valued(of, module), name, None)
        case ("named", of, name):
            called = _valued(name, module)
            return getattr(_valued(of, module), called, None) if isinstance(called, str) else None
    return None


def child_name(term: Term, module: nn.Module) -> str | None:
    """The name of the child that a term of a `Form` stands for."""
    name = term[2] if term[0] == "attribute" else valued(term[2], module)
    return name if isinstance(name, str) and name in module._modules else None
