"""`apply_lora(group=…)`: which linears find each other, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch
from grouped import IDS, groups, nodes
from tiny_families import FAMILIES, family
from torch import nn

from lora_kernels import (
    LoRALinear,
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
    save_lora,
    use_lora,
)
from lora_kernels.group import siblings as room


@pytest.fixture(autouse=True)
def few_rows_too(monkeypatch):
    monkeypatch.setattr(room, "_LEAST_ROWS_ON_CPU", 0)


def adapted(name, group, dropout=0.0, dtype=torch.float32, targets=None):
    model = family(name, dtype)
    apply_lora(
        model,
        4,
        alpha=6,
        dropout=dropout,
        target_modules=targets or FAMILIES[name][2],
        verbose=False,
        group=group,
        lora_dtype=dtype,
    )
    mark_only_lora_as_trainable(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.normal_(std=0.2)
    return model


def step(model, ids, checkpointing=False):
    model.zero_grad()
    if checkpointing:
        enable = getattr(model, "activation_checkpointing_enable", None)
        enable = enable or model.gradient_checkpointing_enable  # its older name
        enable({"use_reentrant": checkpointing == "reentrant"})
        model.enable_input_require_grads()
    model.train()
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return out.logits.detach(), [p.grad for p in lora_parameters(model)]


EXPECTED = {  # of each layer
    "llama": [("self_attn", "q_proj k_proj v_proj"), ("mlp", "gate_proj up_proj")],
    "qwen2": [("self_attn", "q_proj k_proj v_proj")],
    "mistral": [("self_attn", "q_proj v_proj")],
    "gemma": [("self_attn", "q_proj k_proj v_proj"), ("mlp", "gate_proj up_proj")],
    "qwen2_moe": [
        ("self_attn", "q_proj k_proj v_proj"),
        ("mlp.shared_expert", "gate_proj up_proj"),
    ],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_families_find_theirs_and_compute_the_same(name):
    model, plain = adapted(name, True), adapted(name, False)
    assert groups(model) == {
        frozenset(f"model.layers.{i}.{parent}.{one}" for one in members.split())
        for i in range(2)
        for parent, members in EXPECTED[name]
    }
    assert not groups(plain)
    logits = model(input_ids=IDS).logits
    with_mlp = any(target.endswith("up_proj") for target in FAMILIES[name][2])
    assert nodes(logits) == 2 * (1 + with_mlp)  # gate and up go with their whole feed-forward
    (ours, grads), (theirs, expected) = step(model, IDS), step(plain, IDS)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(grads, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("checkpointing", ["reentrant", "other"])
@pytest.mark.parametrize("name", ["llama", "qwen2_moe"])
def test_with_activation_checkpointing(name, checkpointing):
    ours = step(adapted(name, True), IDS, checkpointing)
    theirs = step(adapted(name, False), IDS)
    torch.testing.assert_close(ours[0], theirs[0])
    for a, b in zip(ours[1], theirs[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_in_bfloat16_and_under_autocast():
    for dtype, casting in ((torch.bfloat16, False), (torch.float32, True)):
        results = []
        for group in (True, False):
            model = adapted("llama", group, dtype=dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=casting):
                logits, grads = step(model, IDS)
            results.append(torch.cat([g.flatten().float() for g in grads]))
        assert (results[0] - results[1]).norm() < 0.02 * results[1].norm()


def test_generation_with_a_cache():
    model, plain = adapted("llama", True).eval(), adapted("llama", False).eval()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(IDS, **options), plain.generate(IDS, **options))


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing`:FutureWarning")
def test_under_the_librarys_trainer(tmp_path):
    transformers = pytest.importorskip("transformers")
    results = []
    for group in (True, False):
        model = adapted("qwen2", group)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(group)),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_checkpointing=True,
            bf16=True,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            seed=1,
        )
        data = [{"input_ids": row, "labels": row} for row in IDS.repeat(4, 1)]
        transformers.Trainer(model, arguments, train_dataset=data).train()
        results.append(torch.cat([p.detach().flatten() for p in lora_parameters(model)]))
    assert (results[0] - results[1]).norm() < 0.01 * results[1].norm()


def test_only_what_is_called_together():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x):
            return self.third(self.second(self.first(x)))

    model = Block()
    apply_lora(model, 2, target_modules="all-linear", verbose=False, group=True)
    for _ in range(2):
        y = model(torch.randn(3, 8))
    assert not groups(model) and nodes(y) == 0
    assert not any(hasattr(m, "_lora_siblings") for m in model.modules())


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(8, n) for n in (3, 3, 3, 3, 3))

    def forward(self, x):
        return sum(head(x) for head in self.heads)


class HeadsApart(Heads):
    def forward(self, x):
        return [head(x) for head in self.heads]


def test_a_list_of_linears():
    for group in (True, None):
        model = Heads()
        apply_lora(model, 2, target_modules="all-linear", verbose=False, group=group)
        assert len(groups(model)) == 1
        assert nodes(model(torch.randn(300, 8))) == 1


def test_outputs_that_are_returned_apart_are_grouped_only_where_asked():
    """Each of them may get a backward of its own, which one call for all has but once."""
    model = HeadsApart()
    apply_lora(model, 2, target_modules="all-linear", verbose=False)
    ys = model(torch.randn(300, 8))
    assert not groups(model)
    for y in ys:
        y.sum().backward()
    asked = HeadsApart()
    apply_lora(asked, 2, target_modules="all-linear", verbose=False, group=True)
    assert len(groups(asked)) == 1 and nodes(sum(asked(torch.randn(3, 8)))) == 1


def test_what_was_said_of_a_model_holds_for_its_next_adapter(tmp_path):
    for group, count in ((False, 0), (True, 4)):
        model = adapted("llama", group)
        apply_lora(model, 2, target_modules=["q_proj"], name="b", verbose=False)
        use_lora(model, "default")
        assert nodes(model(input_ids=IDS).logits) == count
        save_lora(model, tmp_path / "lora.safetensors", name="b")
        load_lora(model, tmp_path / "lora.safetensors", name="c")
        assert nodes(model(input_ids=IDS).logits) == count


def test_minimind_is_read_by_its_names():
    transformer = pytest.importorskip("minimind.model.transformer")
    config = pytest.importorskip("minimind.model.config")
    model = transformer.MiniMindLM(config.LMConfig(dim=32, n_layers=2, n_heads=4, n_kv_heads=2))
    apply_lora(model, 2, target_modules=["wq", "wk", "wv"], verbose=False, group=True)
    assert {len(group) for group in groups(model)} == {3} and len(groups(model)) == 2
    assert nodes(model(IDS).logits) == 2


def test_the_default_on_a_cpu_and_no():
    targets = FAMILIES["llama"][2]
    assert nodes(adapted("llama", None)(input_ids=IDS).logits) == 4
    assert not groups(adapted("llama", False))
    with pytest.raises(TypeError, match="group must be True, False or None"):
        apply_lora(family("llama"), target_modules=targets, group="yes", verbose=False)


def test_state_files_and_ways_out_are_as_without(tmp_path):
    model, plain = adapted("llama", True), adapted("llama", False)
    assert list(model.state_dict()) == list(plain.state_dict())
    logits = model(input_ids=IDS).logits
    save_lora(model, tmp_path / "lora.safetensors")
    loaded = family("llama")
    load_lora(loaded, tmp_path / "lora.safetensors")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, logits)
    with disable_lora(model), disable_lora(plain):
        assert nodes(model(input_ids=IDS).logits) == 0
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with merged_lora(model):
        torch.testing.assert_close(model(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-4)
    assert nodes(model(input_ids=IDS).logits) == 4
    twin = copy.deepcopy(model)
    merge_lora(twin)
    torch.testing.assert_close(twin(input_ids=IDS).logits, logits, rtol=1e-3, atol=1e-4)
    remove_lora(model)
    for each in (twin, model):
        assert not any("_lora" in key for m in each.modules() for key in m.__dict__)


def test_a_second_adapter_on_more_modules_joins_anew():
    model = adapted("llama", True, targets=["q_proj", "v_proj"])
    assert {len(group) for group in groups(model)} == {2}
    apply_lora(model, 2, target_modules=["k_proj"], name="k", verbose=False, group=True)
    assert {len(group) for group in groups(model)} == {3}
    plain = adapted("llama", False, targets=["q_proj", "v_proj"])
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)


def test_one_member_that_is_taken_out():
    model = adapted("llama", True)
    attention = model.model.layers[0].self_attn
    attention.k_proj = attention.k_proj.to_linear()
    plain = adapted("llama", False)
    plain.model.layers[0].self_attn.k_proj = plain.model.layers[0].self_attn.k_proj.to_linear()
    assert not isinstance(attention.k_proj, LoRALinear)
    torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits)
