"""What takes no LoRA is named: its class, how many there are, one of them, and what to do."""

from __future__ import annotations

import pytest
import torch
from tiny_model import Model, assert_untouched, snapshot
from torch import nn

from lora_kernels import apply_lora
from lora_kernels.adapters.lookalikes import way_out

QUANTISED = "quantised, which is not supported; load the model without quantization_config"


class Linear4bit(nn.Linear):
    """As bitsandbytes' is."""


class Packed(nn.Module):
    """As GPTQ's and AWQ's are: no weight, but its sizes."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = 8, 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))


class Bytes(nn.Linear):
    """Of no telling name, with a weight of eight bits."""

    def __init__(self):
        super().__init__(8, 8)
        self.weight = nn.Parameter(torch.zeros(8, 8, dtype=torch.int8), requires_grad=False)


class Gated(nn.Linear):
    """A subclass that computes something else."""


class Conv1D(nn.Module):
    """As GPT-2's is."""

    def __init__(self, nf=8):
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.zeros(8, nf))


class SomeExperts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(2, 8, 8))


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 8))


@pytest.mark.parametrize(
    ("module", "said"),
    [
        (Linear4bit(8, 8), QUANTISED),
        (Packed(), QUANTISED),
        (Bytes(), QUANTISED),
        (Gated(8, 8), "not exactly an nn.Linear, and may compute something else"),
        (Conv1D(), "its weight is transposed; put an nn.Linear"),
        (SomeExperts(), "fused experts"),
        (nn.MultiheadAttention(8, 2).out_proj, "nn.MultiheadAttention uses its weight"),
        (nn.Linear(8, 8), ""),
        (Router(), ""),
        (nn.Embedding(4, 8), ""),
        (nn.ModuleList([nn.Linear(8, 8)]), ""),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_way_out(module, said):
    found = way_out(module)
    assert found.startswith(said) and bool(found) == bool(said)


@pytest.mark.parametrize("kind", [Linear4bit, Conv1D, SomeExperts])
@pytest.mark.parametrize("targets", [None, "all-linear", ["no_such"], "no_such.*"])
def test_a_model_of_nothing_else(kind, targets):
    parts = [kind(8, 8) if kind is Linear4bit else kind() for _ in range(3)]
    model = nn.ModuleDict({"proj": nn.ModuleList(parts)})
    with pytest.raises(ValueError, match="no module of the model matches") as caught:
        apply_lora(model, 2, target_modules=targets)
    first, second = str(caught.value).splitlines()
    assert first.endswith("it has no nn.Linear")
    assert second == f"  it has 3 {kind.__name__} (the first is 'proj.0'): {way_out(parts[0])}"


@pytest.mark.parametrize("kind", [Linear4bit, Conv1D, SomeExperts])
def test_named_itself(kind):
    model = Model()
    model.gate = kind(8, 8) if kind is Linear4bit else kind()
    before = snapshot(model)
    with pytest.raises(TypeError) as caught:
        apply_lora(model, 2, target_modules=["q", "gate"])
    assert str(caught.value) == f"target 'gate' is a {kind.__name__}: {way_out(model.gate)}"
    assert_untouched(model, before)


def test_all_linear_says_what_it_leaves_out(capsys):
    model = Model()
    model.extra = nn.ModuleList([Linear4bit(8, 8), SomeExperts(), Linear4bit(8, 4)])
    apply_lora(model, 2, target_modules="all-linear")
    said = capsys.readouterr().out.splitlines()
    assert said[:7] == [line for line in said if line.startswith("apply lora on module")]
    assert said[7:] == [
        f"leave out 2 Linear4bit (the first is 'extra.0'): {way_out(model.extra[0])}",
        f"leave out 1 SomeExperts (the first is 'extra.1'): {way_out(model.extra[1])}",
    ]
    apply_lora(Model(), 2, target_modules="all-linear")
    assert len(capsys.readouterr().out.splitlines()) == 7


def test_many_classes_are_cut_and_counted():
    kinds = [type(f"Kind{i}", (nn.Linear,), {}) for i in range(80)]
    model = nn.ModuleList(kind(2, 2) for kind in kinds)
    with pytest.raises(ValueError, match="no module of the model matches") as caught:
        apply_lora(model, 2)
    said = str(caught.value)
    assert len(said.splitlines()) <= 30 and len(said) <= 2000 and "more" in said.splitlines()[-1]


def test_many_names_are_cut_and_counted():
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(300))
    with pytest.raises(ValueError, match="rank_pattern has 'x'.* and 292 more") as caught:
        apply_lora(model, 2, rank_pattern={"x": 2})
    assert len(str(caught.value)) < 400
