"""Chat templates that only put contents side by side: rendered once a shape, not once a sample.

A template is a program, and what it writes may hang on what is said: it may strip a content, or
look for a thought in it. Where its code shows that it does nothing of the kind, one rendering with
marks in the place of the contents is that of every conversation with the same roles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from jinja2 import Environment, TemplateSyntaxError, nodes

# What such a template may be made of; anything else could do more than it seems.
_KNOWN = (
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Name, nodes.Const,
    nodes.Getitem, nodes.Getattr, nodes.Add, nodes.Concat, nodes.Compare, nodes.Operand, nodes.Not,
    nodes.And, nodes.Or, nodes.Assign,
)  # fmt: skip
_OF_LOOPS = ("first", "last", "index", "index0", "length")


@functools.lru_cache(maxsize=16)
def only_concatenates(template: str) -> bool:
    """Whether all that a template does with ``content`` is to write it, whole, among other text.

    True is certain for turns that have a role and a content and nothing else; False may mean no
    more than that the template has a word in it that is not known here.
    """
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        return False
    turns = {
        loop.target.name for loop in tree.find_all(nodes.For) if isinstance(loop.target, nodes.Name)
    }
    written = _holding_contents(tree)
    if written & (turns | {"messages", "loop"}):
        return False
    return all(_harmless(node, above, turns, written) for node, above in _walk(tree, ()))


def _holding_contents(tree: nodes.Node) -> set[str]:
    """The names that contents are given to, at once or by way of others."""
    names: set[str] = set()
    while True:
        more = {
            step.target.name
            for step in tree.find_all(nodes.Assign)
            if isinstance(step.target, nodes.Name)
            for part in (step.node, *step.node.find_all(nodes.Node))
            if _key(part) == "content" or (isinstance(part, nodes.Name) and part.name in names)
        }
        if more <= names:
            return names
        names |= more


def _walk(
    node: nodes.Node, above: tuple[nodes.Node, ...]
) -> Iterator[tuple[nodes.Node, tuple[nodes.Node, ...]]]:
    """Every node with those it lies in, the nearest first."""
    yield node, above
    for child in node.iter_child_nodes():
        yield from _walk(child, (node, *above))


def _harmless(
    node: nodes.Node, above: tuple[nodes.Node, ...], turns: set[str], written: set[str]
) -> bool:
    if not isinstance(node, _KNOWN):
        return False
    parent = above[0] if above else None
    if isinstance(node, nodes.For):
        target, source = node.target, node.iter
        return (
            isinstance(target, nodes.Name)
            and target.name not in ("messages", "loop")
            and isinstance(source, nodes.Name)
            and source.name == "messages"
        )
    if isinstance(node, nodes.Name):
        if node.name == "messages":
            return (isinstance(parent, nodes.For) and parent.iter is node) or (
                isinstance(parent, nodes.Getitem) and isinstance(_key(parent), int)
            )
        if node.name in turns:
            loops = isinstance(parent, nodes.For) and parent.target is node
            return loops or isinstance(_key(parent), str)
        if node.name in written and node.ctx == "load":
            return _is_written(node, above)
        return node.name != "loop" or _key(parent) in _OF_LOOPS
    if isinstance(node, (nodes.Getitem, nodes.Getattr)):
        key = _key(node)
        if isinstance(key, int):  # of messages, as other names are not indexed
            return isinstance(_key(parent), str)
        if key != "content":
            return isinstance(key, str)
        return _is_written(node, above)
    if isinstance(node, nodes.Assign):
        return isinstance(node.target, nodes.Name)
    return True


def _is_written(node: nodes.Node, above: tuple[nodes.Node, ...]) -> bool:
    """Whether a content is joined to other text at most, then written or given a name."""
    outer = next(a for a in above if not isinstance(a, (nodes.Add, nodes.Concat)))
    return isinstance(outer, (nodes.Output, nodes.Assign))


def _key(node: nodes.Node | None) -> object:
    """What a node asks its left side for, where that is written out."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None
