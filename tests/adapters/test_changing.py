"""A change of a model that is stopped anywhere leaves it bit-equal, and usable."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from faults import Stop, failing_line, failing_operation, stopped_everywhere
from tiny_model import IDS, Model
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    LoRALinear,
    apply_lora,
    disable_lora,
    load_lora,
    lora_adapters,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
    save_lora,
    use_lora,
)
from lora_kernels.adapters.changing import change_of, write_together

ON = {"target_modules": ["q", "gate"], "verbose": False}


def adapted(**kwargs):
    """Two adapters, one of which trains a module whole and single tokens of the embedding."""
    model = plain()
    apply_lora(
        model, 2, **ON, modules_to_save=["k", "norm"], trainable_token_indices={"embed": [1, 3]}
    )
    apply_lora(model, 2, name="fr", target_modules=["q", "out_proj"], verbose=False)
    with torch.no_grad():
        for parameter in lora_parameters(model, ["default", "fr"]):
            parameter.copy_(torch.randn(parameter.shape) / 3)
    return model


def plain():
    torch.manual_seed(0)
    model = Model()
    model.norm = nn.LayerNorm(8)
    return model


def facts(model):
    """All that a change could leave behind, without the order of what it is looked up by."""
    modules = {
        name: (id(module), type(module), module._lora_state, module._lora_blocks)
        if hasattr(module, "_lora_state")
        else (id(module), type(module))
        for name, module in model.named_modules()
    }
    hooks = {name: list(m._forward_hooks.values()) for name, m in model.named_modules()}
    asides = {
        name: {
            key: (a.using, a.off, sorted(a.frozen), {n: id(t) for n, t in a.others.items()})
            for key, a in vars(module).get("_lora_aside", {}).items()
        }
        for name, module in model.named_modules()
    }
    parameters = {n: (id(p), p.requires_grad) for n, p in model.named_parameters()}
    return modules, hooks, asides, parameters, lora_adapters(model)


class Before:
    """A model as it is now, to be held against what a stopped change leaves of it."""

    def __init__(self, make):
        self.model = make()
        self.facts = facts(self.model)
        self.state = {name: t.clone() for name, t in self.model.state_dict().items()}
        self.output = self.model(IDS)
        with disable_lora(self.model) if lora_adapters(self.model) else torch.no_grad():
            self.bare = self.model(IDS)

    def check(self):
        state = self.model.state_dict()
        assert facts(self.model) == self.facts
        assert list(state) == list(self.state)
        assert all(torch.equal(state[name], self.state[name]) for name in state)
        assert torch.equal(self.model(IDS), self.output)
        with disable_lora(self.model) if lora_adapters(self.model) else torch.no_grad():
            assert torch.equal(self.model(IDS), self.bare)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "a.safetensors"
    other = adapted()
    with torch.no_grad():
        for parameter in lora_parameters(other, ["default"]):
            parameter.add_(1)
    save_lora(other, path)
    return path


def blocks(block):
    def act(model):
        with block(model):
            model(IDS)

    return act


def for_a_while(model):
    with use_lora(model, ["default", "fr"], weights=[0.5, 2]):
        model(IDS)


ACTS = {
    "apply": (
        plain,
        lambda m, _: apply_lora(
            m,
            2,
            **ON,
            modules_to_save=["k"],
            bias="lora_only",
            trainable_token_indices={"embed": [2]},
        ),
    ),
    "apply another": (
        adapted,
        lambda m, _: apply_lora(m, 3, name="de", **ON, modules_to_save=["norm"]),
    ),
    "load": (plain, lambda m, path: load_lora(m, path)),
    "load over": (adapted, lambda m, path: load_lora(m, path)),
    "load another": (adapted, lambda m, path: load_lora(m, path, name="de")),
    "remove": (adapted, lambda m, _: remove_lora(m)),
    "remove one": (adapted, lambda m, _: remove_lora(m, "default")),
    "use": (adapted, lambda m, _: use_lora(m, "fr")),
    "mark": (adapted, lambda m, _: mark_only_lora_as_trainable(m, "default")),
    "use for a while": (adapted, lambda m, _: for_a_while(m)),
    "merged": (adapted, lambda m, _: blocks(merged_lora)(m)),
    "disabled": (adapted, lambda m, _: blocks(disable_lora)(m)),
}


@pytest.mark.parametrize("name", [name for name in ACTS if name != "mark"])
@pytest.mark.parametrize("kind", [MemoryError, Stop])
def test_stopped_at_any_operation_of_torch(name, kind, saved):
    make, act = ACTS[name]
    assert stopped_everywhere(
        failing_operation,
        kind,
        lambda: Before(make),
        lambda before: act(before.model, saved),
        Before.check,
        also=[AdapterMismatchError] if "load" in name else [],  # safetensors's word for it
        stride=4 if "load" in name else 1,
    )


# The functions whose lines change a model.
# fmt: off
CHANGING = (
    "_use", "add_adapter", "remove_adapter", "use_adapters", "replace_modules", "insert_wholes",
    "insert_tokens", "use_wholes", "drop_wholes", "drop_tokens", "rest_wholes", "wake_wholes",
    "folded_tokens", "keep_wholes", "_forget", "_mark", "_unfold", "_write", "_merge_one",
    "_enable", "_bring_back", "write_together",
)
# fmt: on


@pytest.mark.parametrize("name", ACTS)
def test_stopped_at_any_line_it_is_as_before_or_done(name, saved):
    make, act = ACTS[name]
    done = Before(make)
    act(done.model, saved)
    done_state = {key: t.clone() for key, t in done.model.state_dict().items()}

    def check(before):
        after = before.model.state_dict()
        same = list(after) == list(before.state) and all(
            torch.equal(after[key], before.state[key]) for key in after
        )
        if same and facts(before.model) == before.facts:
            return before.check()
        assert list(after) == list(done_state)
        assert lora_adapters(before.model) == lora_adapters(done.model)
        assert torch.equal(before.model(IDS), done.model(IDS)) or name.startswith("apply")

    stopped_everywhere(
        partial(failing_line, within=CHANGING),
        Stop,
        lambda: Before(make),
        lambda before: act(before.model, saved),
        check,
        stride=7,
    )


@pytest.mark.parametrize("failing", [failing_operation, failing_line])
def test_a_merge_that_is_stopped_goes_on_where_it_was(failing):
    """A module is merged or as it was, whatever stopped it; another call comes to the same bits."""
    merged = adapted()
    merge_lora(merged)
    expected = merged.state_dict()
    output, half_way = adapted()(IDS), []
    embedding = plain().embed.weight
    names = {n for n, m in adapted().named_modules() if isinstance(m, LoRALinear)}

    def check(model):
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}
        half_way.append(len(layers))
        torch.testing.assert_close(model(IDS), output)
        for name in names - layers.keys():
            assert type(model.get_submodule(name)) is nn.Linear
            assert torch.equal(model.get_submodule(name).weight, expected[f"{name}.weight"])
        rows = [m for m in model.modules() if "lora_tokens" in m._modules]
        assert all(torch.equal(m.weight, embedding) for m in rows)
        if layers:
            merge_lora(model)
        after = model.state_dict()
        assert list(after) == list(expected)
        assert all(torch.equal(after[key], expected[key]) for key in expected)
        assert not any(m._forward_hooks for m in model.modules())

    lines = ("_merge_one", "folded_tokens", "keep_wholes", "drop_tokens", "replace_modules")
    kwargs = {"within": lines} if failing is failing_line else {}
    stopped_everywhere(partial(failing, **kwargs), Stop, adapted, merge_lora, check)
    assert len(set(half_way)) > 2


def test_what_is_overwritten_comes_back():
    tensors = [torch.randn(3) for _ in range(3)]
    before = [t.clone() for t in tensors]
    with pytest.raises(RuntimeError):
        write_together([*((t, t + 1) for t in tensors), (torch.zeros(2), torch.zeros(3))])
    assert all(map(torch.equal, tensors, before))


def test_a_value_that_a_change_has_cast_comes_back():
    model = plain()
    apply_lora(model, 2, **ON, modules_to_save=["norm"])
    with use_lora(model, None):
        model.norm.half()
        with pytest.raises(KeyError), change_of(model):
            use_lora(model, "default")
            assert model.norm.weight.dtype == torch.float16
            raise KeyError
        aside = vars(model.norm)["_lora_aside"]["weight"]
        assert aside.others["default"].dtype == torch.float32
