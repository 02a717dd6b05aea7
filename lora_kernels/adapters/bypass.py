"""Linears whose weight a model reads past the module, where LoRA would never run.

Mamba's ``dt_proj`` is one: its mixer multiplies by ``self.dt_proj.weight``; so are the projections
that a block hands to a fused kernel. LoRA there would get no gradient and change no output, and
merging it would change the model. They are found in the source of the classes that a model is made
of, see `weight_reads`; of what has no source nothing is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from torch import nn

from .code_values import ANY, UNKNOWN, Path
from .weight_reads import Read, Reads, SourceReader
from .wording import listed

_WITHOUT_CODE = (nn.Linear, nn.ModuleDict, nn.ModuleList, nn.Sequential)


def bypassed_linears(model: nn.Module) -> dict[str, str]:
    """The function that reads the weight, as ``Mixer.forward``, of each such linear by its name."""
    modules = dict(model.named_modules())
    reader = SourceReader()
    known: dict[tuple[type, str], Reads] = {}
    found: dict[int, str] = {}
    waiting = [(module, "forward") for module in modules.values() if _has_insides(module)]
    seen = {(id(module), method) for module, method in waiting}
    for module, method in waiting:  # which grows meanwhile
        kind = type(module), method
        if kind not in known:
            known[kind] = reader.reads(*kind)
        for read in known[kind].weights:
            linears = [m for m in _below(module, read.path) if isinstance(m, nn.Linear)]
            if linears and _may_run(read, module):
                for linear in linears:
                    found.setdefault(id(linear), read.where)
        for path, called in known[kind].calls:
            for callee in filter(_has_insides, _below(module, path)):
                if (id(callee), called) not in seen:
                    seen.add((id(callee), called))
                    waiting.append((callee, called))
    return {name: found[id(module)] for name, module in modules.items() if id(module) in found}


def refuse_bypassed(model: nn.Module, names: Iterable[str]) -> None:
    """Raise TypeError where the weight of one of these modules is read past it."""
    bypassed = bypassed_linears(model)
    wrong = [name for name in names if name in bypassed]
    if wrong:
        same = [name for name in wrong if bypassed[name] == bypassed[wrong[0]]]
        raise TypeError(
            f"target {wrong[0]!r}: {bypassed[wrong[0]]} reads its weight past the module, so that "
            f"LoRA there would not run; leave out {listed(_endings(same))}, by target_modules or "
            "exclude_modules"
        )


def said_of_bypassed(left_out: Mapping[str, str]) -> list[str]:
    """A line for each function that reads some of these."""
    by_reader: dict[str, list[str]] = {}
    for name, where in left_out.items():
        by_reader.setdefault(where, []).append(name)
    return [
        f"leave out {listed(_endings(names))} ({len(names)}): {where} reads the weight past the "
        "module, and LoRA there would not run"
        for where, names in by_reader.items()
    ]


def _endings(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.rpartition(".")[2] for name in names))


def _has_insides(module: nn.Module) -> bool:
    return bool(module._modules) and not isinstance(module, _WITHOUT_CODE)


def _below(module: nn.Module, path: Path) -> Iterator[nn.Module]:
    """The modules that a path from this one may lead to."""
    if not path:
        yield module
        return
    children = module._modules
    for name in children if path[0] == ANY else [path[0]]:
        child = children.get(name)
        if child is not None:
            yield from _below(child, path[1:])


def _may_run(read: Read, module: nn.Module) -> bool:
    values = ((test(module), wanted) for test, wanted in read.tests)
    return all(value is UNKNOWN or bool(value) is wanted for value, wanted in values)
