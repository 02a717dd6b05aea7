"""Which layers of a model are computed together, as its graph and its layers tell."""

from __future__ import annotations

import torch

IDS = torch.arange(24).view(2, 12) % 30


def groups(model):
    """The names of those that stay together, as a set of sets."""
    names = {id(module): name for name, module in model.named_modules()}
    found = {
        id(m._lora_siblings): m._lora_siblings
        for m in model.modules()
        if hasattr(m, "_lora_siblings")
    }
    return {frozenset(names[id(layer)] for layer in each.layers()) for each in found.values()}


def nodes(tensor):
    """How many calls of a group or a whole feed-forward a graph holds."""
    seen, waiting, count = set(), [tensor.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        count += node.name() in ("_GroupBackward", "_FeedForwardBackward")
        waiting += [following for following, _ in node.next_functions]
    return count
