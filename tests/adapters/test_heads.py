"""The head of a classifier: left out by all-linear, trained and saved whole, as PEFT does."""

from __future__ import annotations

import pytest
import torch
from tiny_classifier import ROWS, answers, classifier, trained_classifier
from tiny_model import SUFFIXES
from tiny_peft import base
from torch import nn

from lora_kernels import (
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    save_lora,
)
from lora_kernels.adapters.heads import classifier_heads, is_head_name

HEADS = {
    ("Qwen2", "SequenceClassification"): ["score"],
    ("Qwen2", "TokenClassification"): ["score"],
    ("Qwen2", "QuestionAnswering"): ["qa_outputs"],
    ("Bert", "SequenceClassification"): ["classifier"],
    ("Bert", "MultipleChoice"): ["classifier"],
    ("DistilBert", "SequenceClassification"): ["pre_classifier", "classifier"],
    ("Roberta", "SequenceClassification"): ["classifier"],
    ("T5", "TokenClassification"): ["classifier"],
}


@pytest.mark.parametrize(("family", "kind"), HEADS)
def test_heads_by_family(family, kind):
    assert classifier_heads(classifier(0, kind, family)) == HEADS[family, kind]


def test_language_models_have_no_such_head():
    assert classifier_heads(base("qwen2")) == classifier_heads(base("minimind")) == []


def test_all_linear_leaves_the_head_out_and_trains_it(capsys):
    model = classifier(0)
    names = apply_lora(model, 4, target_modules="all-linear")
    assert names[-1] == "model.layers.1.mlp.down_proj" and len(names) == 14
    assert capsys.readouterr().out.endswith("\ntrain module whole: score\n")
    mark_only_lora_as_trainable(model)
    assert model.score.weight.requires_grad
    assert lora_parameters(model)[-1] is model.score.weight


def test_an_empty_list_leaves_the_head_alone():
    model = classifier(0)
    apply_lora(model, 4, target_modules=["q_proj"], modules_to_save=[], verbose=False)
    assert len(lora_parameters(model)) == 4
    model = classifier(0, family="DistilBert")
    apply_lora(model, 4, target_modules="all-linear", modules_to_save=[], verbose=False)
    assert type(model.pre_classifier) is type(model.classifier) is nn.Linear
    model = classifier(0)
    names = apply_lora(model, 4, target_modules=["score"], modules_to_save=[], verbose=False)
    assert names == ["score"]


def test_a_list_is_added_to_the_head():
    model = classifier(0)
    apply_lora(model, 4, target_modules=["q_proj"], modules_to_save=["model.norm"], verbose=False)
    assert len(lora_parameters(model)) == 6


def test_a_wrapped_classifier():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.DataParallel(classifier(0))  # whose child is `module`

    assert classifier_heads(Outer()) == ["inner.module.score"]
    model = Outer()
    names = apply_lora(model, 4, target_modules="all-linear", verbose=False)
    assert names[-1] == "inner.module.model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("name", ["classifier", "score", "qa_outputs", "output", "a.lm_head"])
def test_heads_by_name_alone(name):
    assert is_head_name(name)
    assert not is_head_name(f"a.{name}") or name == "a.lm_head"


@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
@pytest.mark.parametrize(("family", "kind"), [k for k in HEADS if k != ("Bert", "MultipleChoice")])
def test_a_fresh_process_gets_the_head(tmp_path, family, kind, suffix):
    model = classifier(1, kind, family)
    settings = {} if suffix in (".safetensors", "") else {"alpha": None}
    apply_lora(model, 4, **{"alpha": 8, **settings}, target_modules="all-linear", verbose=False)
    with torch.no_grad():
        for parameter in lora_parameters(model):
            parameter.add_(torch.randn_like(parameter), alpha=0.2)

    def outputs(m):
        with torch.no_grad():
            out = m(input_ids=ROWS)
        return torch.stack([v.sum() for v in out.values() if torch.is_tensor(v)])

    save_lora(model, tmp_path / f"a{suffix}")
    other, again = classifier(2, kind, family), classifier(3, kind, family)
    before = outputs(other)
    apply_lora(again, 4, **{"alpha": 8, **settings}, target_modules="all-linear", verbose=False)
    for fresh in (other, again):
        load_lora(fresh, tmp_path / f"a{suffix}")
        assert torch.equal(outputs(fresh), outputs(model))
    assert not torch.equal(before, outputs(model))
    with disable_lora(other):
        assert torch.equal(outputs(other), before)


def test_a_classifier_learns_and_is_reloaded_as_it_was(tmp_path):
    def rows(seed, n=64):
        x = torch.randint(1, 64, (n, 6), generator=torch.Generator().manual_seed(seed))
        return x, (x[:, -1] - 1) // 21

    def accuracy(m):
        x, y = rows(999, 300)
        with torch.no_grad():
            return (m(input_ids=x).logits.argmax(-1) == y).float().mean().item()

    model = classifier(1).train()
    apply_lora(model, 8, alpha=16, target_modules="all-linear", verbose=False)
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    for step in range(80):
        x, y = rows(step)
        nn.functional.cross_entropy(model(input_ids=x).logits, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    trained = accuracy(model.eval())
    save_lora(model, tmp_path / "a.safetensors")
    fresh = classifier(2)
    load_lora(fresh, tmp_path / "a.safetensors")
    assert trained > 0.9 and accuracy(fresh) == trained


def test_the_head_is_taken_out_of_a_checkpoint(tmp_path):
    model = trained_classifier()
    model.save_pretrained(tmp_path)
    fresh = classifier(5)
    with pytest.warns(UserWarning, match="alpha"):
        load_lora(fresh, tmp_path)
    assert torch.equal(fresh.score.weight, model.score.weight)
    again = classifier(5)
    apply_lora(again, 4, alpha=8, target_modules="all-linear", verbose=False)
    load_lora(again, tmp_path)
    assert torch.equal(answers(again), answers(model))
