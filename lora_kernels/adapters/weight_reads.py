"""What the source of a module's forward does with its children's weights.

The code is walked, not run: from a function through the methods of the same object, its properties,
and the helpers that get a module of it.
"""

from __future__ import annotations

import ast
import inspect
import tokenize
from collections.abc import Callable, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from .code_scope import Scope, last_name
from .code_values import (
    ANY,
    COMPARISONS,
    ITSELF,
    NOTHING,
    Path,
    Test,
    Value,
    computed,
    constant,
    every,
    setting,
    some,
)

# What may be asked of a weight without using its values, and of whom it may be an argument.
_QUESTIONS = frozenset(
    ("device", "dim", "dtype", "element_size", "get_device", "is_cpu", "is_cuda", "is_meta")
    + ("is_floating_point", "layout", "ndim", "ndimension", "nelement", "numel")
    + ("requires_grad", "shape", "size", "stride")
)
_ASKING = ("callable", "hasattr", "id", "isinstance", "len", "type")
_LIKE = ("to", "type_as", "empty_like", "full_like", "ones_like", "rand_like", "zeros_like")
# These give what a container holds, and these its elements in some order.
_CHILDREN = ("children", "values")
_SAME = ("iter", "list", "reversed", "sorted", "tuple")


class Read(NamedTuple):
    """A weight whose values are used.

    Attributes:
        path: of the module that has it.
        where: the function that does, as ``Mixer.forward``.
        tests: what stands before it in the code, and whether it has to be true or false there.
    """

    path: Path
    where: str
    tests: tuple[tuple[Test, bool], ...]


class Reads(NamedTuple):
    """What a walk has found: weights that are used, and methods of modules below that are called
    by another name than their module's own, ``(path, method)``."""

    weights: list[Read]
    calls: set[tuple[Path, str]]


class SourceReader:
    """Functions' syntax trees; each is parsed once."""

    def __init__(self) -> None:
        self._trees: dict[FunctionType, ast.FunctionDef | None] = {}

    def tree(self, function: FunctionType) -> ast.FunctionDef | None:
        """The function as it stands in its file, or None where that cannot be read."""
        if function not in self._trees:
            self._trees[function] = _parsed(function)
        return self._trees[function]

    def reads(self, kind: type, method: str) -> Reads:
        """What ``method`` of a module of class ``kind`` does with the weights below it.

        Arguments are taken at their defaults where these are constants, caches alone excepted:
        their readers are called without as well as with one.
        """
        found = Reads([], set())
        resolved = _method(kind.__mro__, method)
        if resolved is not None:
            walk = _Walk(self, found, kind, resolved, (), ())
            walk.run([ITSELF], {}, lambda name: "cache" in name or "past" in name)
        return found


def _method(kinds: Sequence[type], name: str) -> tuple[type, FunctionType] | None:
    """The function that ``name`` is in the first of the classes that has it, and the class."""
    for kind in kinds:
        if name in vars(kind):
            found = vars(kind)[name]
            found = found.fget if isinstance(found, property) else found
            found = inspect.unwrap(found) if callable(found) else found
            return (kind, found) if isinstance(found, FunctionType) else None
    return None


class _Walk(Scope):
    """Of one function, on behalf of a module of class ``kind``."""

    def __init__(
        self,
        reader: SourceReader,
        found: Reads,
        kind: type,
        resolved: tuple[type | None, FunctionType],
        tests: tuple[tuple[Test, bool], ...],
        callers: tuple[FunctionType, ...],
    ) -> None:
        super().__init__(tests)
        self.reader, self.found, self.kind = reader, found, kind
        self.definer, self.function = resolved
        self.callers = (*callers, self.function)

    def run(
        self,
        arguments: Sequence[Value],
        keywords: dict[str | None, Value],
        open_ended: Callable[[str], bool] = lambda name: False,
    ) -> None:
        """Walk it as called with these; by the name None go keywords that are not written out."""
        tree = self.reader.tree(self.function)
        if tree is None:
            return
        given = tree.args
        named = [*given.posonlyargs, *given.args]
        defaults: list[Any] = [None] * (len(named) - len(given.defaults)) + given.defaults
        pairs = [*zip(named, defaults, strict=True)]
        pairs += zip(given.kwonlyargs, given.kw_defaults, strict=True)
        for argument, default in pairs:
            fixed = isinstance(default, ast.Constant) and None not in keywords
            if fixed and not open_ended(argument.arg):
                self.names[argument.arg] = Value(known=constant(default.value))
        self.names |= {a.arg: value for a, value in zip(named, arguments, strict=False)}
        self.names |= {name: value for name, value in keywords.items() if name is not None}
        self.block(tree.body)

    def use(self, node: ast.expr) -> Value:
        """As `value`, where a weight's values are used."""
        value = self.value(node)
        self.used(value.weights)
        return value

    def value(self, node: ast.expr) -> Value:
        if isinstance(node, ast.Name):
            return self.names.get(node.id, NOTHING)
        if isinstance(node, ast.Constant):
            return Value(known=constant(node.value))
        method = getattr(self, f"on_{type(node).__name__.lower()}", None)
        if method is not None:
            return method(node)
        self.inside(node)
        return NOTHING

    def on_attribute(self, node: ast.Attribute) -> Value:
        return self.attribute(self.value(node.value), node.attr)

    def attribute(self, base: Value, name: str) -> Value:
        if name == "data":
            return Value(weights=base.weights)
        if base.weights and name not in _QUESTIONS:
            return self.used(base.weights)
        if () in base.modules and isinstance(inspect.getattr_static(self.kind, name, 0), property):
            self.call(_method(self.kind.__mro__, name), [ITSELF], {})
        if name == "weight":
            return Value(weights=base.modules)
        paths = frozenset((*path, name) for path in base.modules)
        return Value(paths, known=setting(next(iter(paths))) if len(paths) == 1 else None)

    def used(self, weights: frozenset[Path]) -> Value:
        where = self.function.__qualname__.rpartition("<locals>.")[2]
        self.found.weights.extend(Read(path, where, self.tests) for path in sorted(weights))
        return NOTHING

    def on_subscript(self, node: ast.Subscript) -> Value:
        base = self.use(node.value)
        if isinstance(node.slice, ast.Slice):
            return Value(base.modules)
        self.use(node.slice)
        key = str(node.slice.value) if isinstance(node.slice, ast.Constant) else ANY
        return Value(frozenset((*path, key) for path in base.modules))

    def on_ifexp(self, node: ast.IfExp) -> Value:
        test = self.use(node.test).known
        yes = self.guarded(node.body, test, True)
        return yes.either(self.guarded(node.orelse, test, False))._replace(known=None)

    def guarded(self, node: ast.expr, test: Test | None, wanted: bool) -> Value:
        """`value` where ``test`` has to be so; what is used outside of it counts as used here."""
        before = self.tests
        if test is not None:
            self.tests = (*before, (test, wanted))
        value = self.value(node)
        self.tests = before
        return value

    def on_boolop(self, node: ast.BoolOp) -> Value:
        before, found, tests = self.tests, NOTHING, []
        both = isinstance(node.op, ast.And)
        for operand in node.values:
            value = self.value(operand)
            found = found.either(value)
            tests.append(value.known)
            if value.known is not None:
                self.tests = (*self.tests, (value.known, both))
        self.tests = before
        return found._replace(known=every(tests) if both else some(tests))

    def on_unaryop(self, node: ast.UnaryOp) -> Value:
        test = self.use(node.operand).known
        if test is None or not isinstance(node.op, ast.Not):
            return NOTHING
        return Value(known=computed(lambda value: not value, test))

    def on_compare(self, node: ast.Compare) -> Value:
        sides = [node.left, *node.comparators]
        asks = all(isinstance(op, (ast.Is, ast.IsNot)) for op in node.ops)
        values = [self.value(side) if asks else self.use(side) for side in sides]
        compare = COMPARISONS.get(type(node.ops[0]))
        tests = [value.known for value in values]
        if len(tests) != 2 or compare is None or None in tests:
            return NOTHING
        return Value(known=computed(compare, *tests))  # type: ignore[arg-type]

    def on_namedexpr(self, node: ast.NamedExpr) -> Value:
        self.bind(node.target, node.value)
        return self.names[node.target.id]

    def on_lambda(self, node: ast.Lambda) -> Value:
        self.nested(node)
        return NOTHING

    def on_listcomp(self, node: Any) -> Value:
        outside = dict(self.names)
        for generator in node.generators:
            self.bind_elements(generator.target, generator.iter)
            for test in generator.ifs:
                self.use(test)
        parts = [node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt]
        for part in parts:
            self.use(part)
        self.names = outside
        return NOTHING

    on_setcomp = on_generatorexp = on_dictcomp = on_listcomp

    def on_call(self, node: ast.Call) -> Value:
        name = last_name(node.func)
        plain = isinstance(node.func, ast.Name)
        if plain and name == "getattr" and len(node.args) > 1:
            wanted = node.args[1]
            known = isinstance(wanted, ast.Constant) and isinstance(wanted.value, str)
            base = self.value(node.args[0])
            return self.attribute(base, wanted.value) if known else NOTHING  # type: ignore
        if (plain and name in _ASKING) or name in _LIKE:
            if isinstance(node.func, ast.Attribute):
                self.use(node.func.value)
            for argument in (*node.args, *(k.value for k in node.keywords)):
                self.value(argument)
            return NOTHING
        base = self.value(node.func.value) if isinstance(node.func, ast.Attribute) else NOTHING
        if plain and name in _SAME and node.args:
            return self.value(node.args[0])
        if base.modules and name in _CHILDREN:
            return Value(base.modules)
        if base.weights and name not in _QUESTIONS:
            self.used(base.weights)
        arguments = [self.use(argument) for argument in node.args]
        keywords = {k.arg: self.use(k.value) for k in node.keywords}
        target, receiver = self.callee(node.func, base)
        if target is not None:
            if any(isinstance(argument, ast.Starred) for argument in node.args):
                arguments, keywords = [], {None: NOTHING}
            self.call(target, [*receiver, *arguments], keywords)
        return NOTHING

    def callee(
        self, node: ast.expr, base: Value
    ) -> tuple[tuple[type | None, FunctionType] | None, list[Value]]:
        """The function that is called, where it is one that can be looked into, and its self."""
        if isinstance(node, ast.Attribute):
            of_super = isinstance(node.value, ast.Call) and last_name(node.value.func) == "super"
            if of_super and self.definer is not None:
                order = self.kind.__mro__
                return _method(order[order.index(self.definer) + 1 :], node.attr), [ITSELF]
            if () in base.modules:
                static = isinstance(inspect.getattr_static(self.kind, node.attr, 0), staticmethod)
                return _method(self.kind.__mro__, node.attr), [] if static else [ITSELF]
            self.found.calls.update((path, node.attr) for path in base.modules)
            if base.modules:
                return None, []
        found = self.resolved(node)
        return ((None, found) if isinstance(found, FunctionType) else None), []

    def resolved(self, node: ast.expr) -> Any:
        """What a name is at the top of the file, or as a part of a module that is imported."""
        if isinstance(node, ast.Name):
            if node.id in self.function.__code__.co_freevars:
                return None
            return self.function.__globals__.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.resolved(node.value)
            return getattr(owner, node.attr, None) if isinstance(owner, ModuleType) else None
        return None

    def call(
        self,
        target: tuple[type | None, FunctionType] | None,
        arguments: list[Value],
        keywords: dict[str | None, Value],
    ) -> None:
        """Walk what is called, if it gets a module: nothing else can read a weight."""
        given = (*arguments, *keywords.values())
        if target is None or target[1] in self.callers or not any(v.modules for v in given):
            return
        _Walk(self.reader, self.found, self.kind, target, self.tests, self.callers).run(
            arguments, keywords
        )


def _parsed(function: FunctionType) -> ast.FunctionDef | None:
    try:
        text = inspect.getsource(function)
        # What is indented, as methods are, is no program by itself.
        (node,) = ast.parse(f"if True:\n{text}" if text[0].isspace() else text).body
    except (OSError, SyntaxError, ValueError, IndexError, RecursionError, tokenize.TokenError):
        return None
    node = node.body[0] if isinstance(node, ast.If) else node
    return node if isinstance(node, ast.FunctionDef) else None
