"""LoRA put into a model, merged, switched off and taken out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lora_kernels import (
    LoRAConfig,
    LoRALinear,
    apply_lora,
    disable_lora,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 4)
        self.out_proj = nn.Linear(4, 8)

    def forward(self, x):
        return x + self.out_proj(self.k(self.q(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.gate = nn.Linear(8, 8)
        self.lm_head = nn.Linear(8, 10, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.lm_head(self.gate(x))


IDS = torch.arange(10)[None]


def trained(model, **kwargs):
    """LoRA on ``model`` with a B that is not zero."""
    apply_lora(model, verbose=False, **kwargs)
    for parameter in lora_parameters(model):
        nn.init.normal_(parameter, std=0.3)
    return model


def snapshot(model):
    return {id(m): type(m) for m in model.modules()}, {
        name: p.clone() for name, p in model.state_dict().items()
    }


def assert_untouched(model, before):
    modules, state = snapshot(model)
    assert modules == before[0] and state.keys() == before[1].keys()
    assert all(torch.equal(state[name], before[1][name]) for name in state)


def test_square_linears_by_default_in_order_and_announced(capsys):
    model = Model()
    names = apply_lora(model, rank=2)
    assert names == ["blocks.0.q", "blocks.1.q", "gate"]
    assert capsys.readouterr().out == "".join(f"apply lora on module: {n}\n" for n in names)
    assert [n for n, m in model.named_modules() if isinstance(m, LoRALinear)] == names
    apply_lora(Model(), verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("targets", "exclude", "expected"),
    [
        (["q"], None, ["blocks.0.q", "blocks.1.q"]),
        (["blocks.1.q", "gate"], None, ["blocks.1.q", "gate"]),
        (["0.k"], None, ["blocks.0.k"]),
        (["k", "q"], ["blocks.1.k"], ["blocks.0.q", "blocks.0.k", "blocks.1.q"]),
        (r"blocks\.\d\.(q|k)", r".*\.1\..*", ["blocks.0.q", "blocks.0.k"]),
        (
            "all-linear",
            ["out_proj"],
            ["blocks.0.q", "blocks.0.k", "blocks.1.q", "blocks.1.k", "gate"],
        ),
        (None, ["gate"], ["blocks.0.q", "blocks.1.q"]),
    ],
)
def test_targets(targets, exclude, expected):
    model = Model()
    names = apply_lora(model, target_modules=targets, exclude_modules=exclude, verbose=False)
    assert names == expected


def test_a_suffix_begins_at_a_dot():
    with pytest.raises(ValueError, match="the target 'ate'.*did you mean.*gate"):
        apply_lora(Model(), target_modules=["ate"])


def test_the_output_head_is_found_by_the_models_own_word():
    class Named(Model):
        def get_output_embeddings(self):
            return self.gate

    assert "gate" not in apply_lora(Named(), target_modules="all-linear", verbose=False)


def test_patterns_and_config():
    model = Model()
    config = LoRAConfig(
        rank=4, alpha=8, target_modules=["q", "gate"], rank_pattern={"blocks.0.q": 2}
    )
    apply_lora(model, config=config, verbose=False)
    assert [model.blocks[0].q.rank, model.blocks[1].q.rank, model.gate.rank] == [2, 4, 4]
    assert [model.blocks[0].q.scale, model.gate.scale] == [4.0, 2.0]


class Subclass(nn.Linear):
    pass


def with_attention(model):
    model.attention = nn.MultiheadAttention(8, 2)
    return model


def with_subclass(model):
    model.gate = Subclass(8, 8)
    return model


def with_lora(model):
    apply_lora(model, target_modules=["k"], verbose=False)
    return model


def with_encoder(model):
    model.encoder = nn.TransformerEncoderLayer(8, 2, 8)
    return model


REFUSED = {
    "an encoder layer's own linear": (TypeError, "TransformerEncoderLayer", with_encoder, {
        "target_modules": ["linear1"]
    }),
    "a word for an ending": (ValueError, r"'gat'.*pass a list.*did you mean \['gate'\]",
        lambda m: m, {"target_modules": "gat"}),
    "a pattern for nothing": (ValueError, "rank_pattern has 'wx', which matches no", lambda m: m, {
        "rank_pattern": {"wx": 2}
    }),
    "no match": (ValueError, "the target 'wq'", lambda m: m, {"target_modules": ["q", "wq"]}),
    "no match of an expression": (ValueError, "matches", lambda m: m, {"target_modules": "wq.*"}),
    "nothing square": (ValueError, "square", lambda m: m.blocks[0].k, {}),
    "all excluded": (ValueError, "leaves none", lambda m: m, {"exclude_modules": ["q", "gate"]}),
    "second application": (ValueError, "carries LoRA already", with_lora, {}),
    "tied weight": (ValueError, "shares its weight with 'embed'", lambda m: m, {
        "target_modules": ["q", "lm_head"]
    }),
    "not a linear": (TypeError, "'embed' is a Embedding", lambda m: m, {
        "target_modules": ["q", "embed"]
    }),
    "a subclass": (TypeError, "'gate' is a Subclass", with_subclass, {"target_modules": ["gate"]}),
    "attention's own linear": (TypeError, "NonDynamically", with_attention, {
        "target_modules": ["attention.out_proj"]
    }),
    "rank 0": (ValueError, "rank must be at least 1", lambda m: m, {"rank": 0}),
    "config and arguments": (ValueError, "config and its single", lambda m: m, {
        "rank": 2, "config": LoRAConfig()
    }),
    "a dictionary for config": (TypeError, "must be a LoRAConfig", lambda m: m, {"config": {}}),
    "the model itself": (ValueError, "from_linear", lambda m: m.gate, {}),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_and_left_as_it_was(case):
    error, message, change, arguments = REFUSED[case]
    model = change(Model())
    before = snapshot(model)
    with pytest.raises(error, match=message):
        apply_lora(model, **arguments)
    assert_untouched(model, before)


def test_a_shared_module_is_replaced_everywhere():
    model = Model()
    model.alias = model.gate
    names = apply_lora(model, target_modules=["gate"], verbose=False)
    assert names == ["gate"] and model.alias is model.gate and isinstance(model.gate, LoRALinear)


def test_only_lora_is_trainable():
    model = trained(Model())
    mark_only_lora_as_trainable(model)
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if "lora" in name}
    assert len(lora_parameters(model)) == 6
    base = [p for name, p in model.named_parameters() if "lora" not in name]
    before = [p.clone() for p in base]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(IDS).square().sum().backward()
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(base, before, strict=True))


def test_disable_runs_the_base_and_nests():
    model = Model()
    base = model(IDS)
    trained(model)
    adapted = model(IDS)
    assert not torch.allclose(base, adapted)
    with disable_lora(model):
        assert torch.equal(model(IDS), base)
        with disable_lora(model):
            assert torch.equal(model(IDS), base)
        assert torch.equal(model(IDS), base)
    assert torch.equal(model(IDS), adapted)
    with pytest.raises(KeyError), disable_lora(model):
        raise KeyError
    assert torch.equal(model(IDS), adapted)


def test_remove_restores_the_model():
    model = Model()
    before = snapshot(model)[1]
    base = model(IDS)
    trained(model)
    assert remove_lora(model) == ["blocks.0.q", "blocks.1.q", "gate"]
    assert not any(isinstance(m, LoRALinear) for m in model.modules())
    assert model.state_dict().keys() == before.keys() and torch.equal(model(IDS), base)
    apply_lora(model, verbose=False)  # and it can be adapted again


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merge_equals_the_adapted_model(dtype):
    model = trained(Model().to(dtype), target_modules=["q", "k"], rank=3, alpha=2)
    adapted = model(IDS)
    deltas = {n: m.delta_weight() for n, m in model.named_modules() if isinstance(m, LoRALinear)}
    weights = {n: model.get_submodule(n).weight.clone() for n in deltas}
    assert merge_lora(model) == list(deltas)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in deltas)
    for name, delta in deltas.items():
        # Rounded once: the sum in the wide dtype, then the weight's.
        once = (weights[name].to(delta.dtype) + delta).to(dtype)
        assert torch.equal(model.get_parameter(f"{name}.weight"), once)
    tolerance = {"rtol": 0.1, "atol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(model(IDS), adapted, **tolerance)
    with pytest.raises(ValueError, match="no LoRALinear"):
        merge_lora(model)


def test_merged_for_a_while_restores_the_very_bits():
    model = trained(Model().to(torch.bfloat16))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    adapted = model(IDS)
    permanent = copy.deepcopy(model)
    merge_lora(permanent)
    with merged_lora(model):
        assert torch.equal(model(IDS), permanent(IDS))
        assert not torch.equal(model.gate.weight, before["gate.weight"])
    with pytest.raises(KeyError), merged_lora(model):
        raise KeyError
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(model(IDS), adapted)


def test_merging_narrower_factors_keeps_every_bit_of_the_weight():
    model = Model().double()
    trained(model)
    weight = model.gate.weight.detach().clone()
    model.gate.lora.float()
    with torch.no_grad():
        model.gate.lora.B.weight.zero_()
    merge_lora(model)
    assert torch.equal(model.gate.weight, weight)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["weight", "lora.A.weight", "lora.B.weight"])
def test_a_merge_refuses_what_is_not_finite(bad, where):
    model = trained(Model())
    with torch.no_grad():
        model.gate.get_parameter(where)[0, 0] = bad
    with pytest.raises(ValueError, match="'gate': the sum would hold NaN or infinity"):
        merge_lora(model)


@pytest.mark.parametrize("scale", [0.01, 100.0])
def test_a_merge_takes_what_a_bound_alone_would_refuse(scale):
    """Large factors whose products cancel, and small ones times a large scale."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False).half())
    apply_lora(model, rank=2, alpha=2 * scale, target_modules=["0"], verbose=False)
    with torch.no_grad():
        model[0].lora.A.weight.copy_(torch.tensor([[300.0, 1.0], [300.0, 1.0]]))
        model[0].lora.B.weight.copy_(torch.tensor([[300.0, -300.0], [0.0, 0.5]]))
        expected = model[0].delta_weight() + model[0].weight
    merge_lora(model)
    assert torch.equal(model[0].weight, expected.half()) and model[0].weight.isfinite().all()


def test_a_merge_that_fails_leaves_every_layer_as_it_was():
    model = trained(Model().half())
    with torch.no_grad():  # the last of three: its sum overflows, A and B themselves do not
        model.gate.lora.A.weight.fill_(300.0)
        model.gate.lora.B.weight.fill_(300.0)
    before = snapshot(model)
    with pytest.raises(ValueError, match="'gate': the sum would hold NaN or infinity"):
        merge_lora(model)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match="'gate'"), merged_lora(model):
        pass
    assert_untouched(model, before)
    assert "merged" not in repr(model)


def test_a_bare_layer_is_not_merged_or_removed_by_half():
    layer = LoRALinear(8, 8, rank=2)
    nn.init.ones_(layer.lora.B.weight)
    x = torch.randn(3, 8)
    y = layer(x)
    for function in (merge_lora, remove_lora):
        with pytest.raises(ValueError, match="cannot be replaced from inside"):
            function(layer)
    with merged_lora(layer):
        torch.testing.assert_close(layer(x), y)
    assert torch.equal(layer(x), y)


def test_names_that_differ_by_a_wrappers_word_stay_two_layers():
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "module": nn.ModuleDict({"fc": nn.Linear(4, 4)})})
    assert apply_lora(model, verbose=False) == ["fc", "module.fc"]
    assert len(lora_parameters(model)) == 4
    with pytest.raises(ValueError, match="'fc' is there twice"):
        lora_state_dict(model)
    assert merge_lora(model) == ["fc", "module.fc"]


def test_copies_taken_inside_a_block_are_active_or_refused():
    model = trained(Model())
    adapted = model(IDS)
    with disable_lora(model):
        twin = copy.deepcopy(model)
    assert torch.equal(twin(IDS), adapted)
    with merged_lora(model), pytest.raises(RuntimeError, match="inside merged_lora"):
        copy.deepcopy(model)


@pytest.mark.parametrize("inner", [merge_lora, remove_lora, disable_lora, merged_lora])
def test_nothing_else_inside_merged(inner):
    model = trained(Model())
    adapted = model(IDS)
    with merged_lora(model), pytest.raises(ValueError, match="merged_lora"):
        result = inner(model)
        with result:
            pass
    assert torch.equal(model(IDS), adapted)


def test_no_merge_inside_disable():
    model = trained(Model())
    with disable_lora(model), pytest.raises(ValueError, match="disabled"):
        merge_lora(model)


def test_merge_refuses_damaged_factors_and_tied_weights():
    model = trained(Model())
    with torch.no_grad():
        model.gate.lora.A.weight[0, 0] = float("nan")
    before = snapshot(model)[1]
    with pytest.raises(ValueError, match="'gate'.*NaN"):
        merge_lora(model)
    after = snapshot(model)[1]
    assert all(torch.equal(after[n], before[n]) for n in after if n != "gate.lora.A.weight")
    model = trained(Model())
    model.gate.weight = nn.Parameter(torch.ones(1, 8).expand(8, 8))
    with pytest.raises(ValueError, match="'gate': its weight is an expanded view"):
        merge_lora(model)
    model = trained(Model())
    model.blocks[1].q.weight = model.gate.weight
    with pytest.raises(ValueError, match="tied"):
        merge_lora(model)


@pytest.mark.parametrize(
    "function", [merge_lora, remove_lora, lora_parameters, lora_state_dict,
                 mark_only_lora_as_trainable]
)  # fmt: skip
def test_a_model_without_lora_is_said(function):
    with pytest.raises(ValueError, match="no LoRALinear; call apply_lora"):
        function(Model())
