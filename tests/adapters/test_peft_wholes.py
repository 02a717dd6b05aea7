"""What is trained whole, both ways with PEFT itself: modules, biases, resized vocabularies."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_classifier import ROWS, classifier
from tiny_peft import (
    CONFIG,
    SIZES,
    TENSORS,
    base,
    by_peft,
    config_of,
    edit,
    fill,
    in_peft,
    llm,
    logits,
)
from torch import nn

from lora_kernels import (
    AdapterMismatchError,
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    mark_only_lora_as_trainable,
    save_lora,
)
from lora_kernels.adapters.peft_wholes import task_type

# PEFT asks transformers by an old name, and says what it does about tied weights.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]
LAYER = "base_model.model.model.layers.0.self_attn.q_proj"


def outputs(model, ids=ROWS):
    with torch.no_grad():
        found = model(input_ids=ids)
    return torch.cat([found[k].flatten() for k in found if k.endswith("logits")])


TASKS = {
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}


@pytest.mark.parametrize("kind", TASKS)
def test_classifiers_both_ways(tmp_path, kind):
    theirs = by_peft(classifier(1, kind), tmp_path / "theirs", TASKS[kind])
    ours = classifier(2, kind)
    load_lora(ours, tmp_path / "theirs")
    assert torch.allclose(outputs(ours), outputs(theirs), atol=1e-5)
    save_lora(ours, tmp_path / "ours")
    config = config_of(tmp_path / "ours")
    assert config["task_type"] == TASKS[kind]
    assert config["modules_to_save"] == ["qa_outputs" if kind == "QuestionAnswering" else "score"]
    keys = load_file(tmp_path / "ours" / TENSORS).keys()
    assert keys == load_file(tmp_path / "theirs" / TENSORS).keys()
    back = in_peft(classifier(3, kind), tmp_path / "ours")
    assert torch.allclose(outputs(back), outputs(theirs), atol=1e-5)


def test_a_head_that_is_not_saved_is_not_promised(tmp_path):
    model = classifier(1)
    apply_lora(model, 4, target_modules=["q_proj"], modules_to_save=[], verbose=False)
    fill(lora_parameters(model))
    save_lora(model, tmp_path)
    assert config_of(tmp_path)["task_type"] is None
    assert torch.allclose(outputs(in_peft(classifier(1), tmp_path)), outputs(model), atol=1e-5)


def test_task_types():
    from transformers import BertConfig, BertModel

    sizes = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
    assert task_type(BertModel(BertConfig(**sizes)), ()) == "FEATURE_EXTRACTION"
    assert task_type(base("qwen2"), ()) == "CAUSAL_LM"
    assert task_type(base("minimind"), ()) == "CAUSAL_LM"
    assert task_type(nn.Linear(2, 2), ()) is None


WHOLE = {
    "untied": (False, {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "tied": (True, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "norms": (True, {"modules_to_save": ["model.norm", "input_layernorm"]}),
    "biases of the adapted": (False, {"bias": "lora_only"}),
    "all biases": (True, {"bias": "all"}),
    "biases and a module": (False, {"bias": "all", "modules_to_save": ["k_proj"]}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_modules_and_biases_both_ways(tmp_path, case):
    tied, settings = WHOLE[case]
    theirs = by_peft(llm(tied), tmp_path / "theirs", **settings)
    ours = llm(tied)
    bare = logits(ours)
    load_lora(ours, tmp_path / "theirs")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    with disable_lora(ours):
        assert torch.equal(logits(ours), bare)
    for name in ("ours", "ours.safetensors", "ours.pth"):
        save_lora(ours, tmp_path / name)
        again = llm(tied)
        if name == "ours.pth":
            sizes = {"alpha": 8, "bias": settings.get("bias", "none"), "verbose": False}
            saved = [*settings.get("modules_to_save", []), *(["lm_head"] if case == "tied" else [])]
            apply_lora(again, 4, target_modules=["q_proj"], modules_to_save=saved, **sizes)
        load_lora(again, tmp_path / name)
        assert torch.equal(logits(again), logits(ours))
    config = config_of(tmp_path / "ours")
    assert config["bias"] == settings.get("bias", "none")
    assert config.get("ensure_weight_tying", False) == (case == "tied")
    assert torch.allclose(logits(in_peft(llm(tied), tmp_path / "ours")), logits(theirs), atol=1e-5)


def test_what_peft_unties_is_refused(tmp_path):
    for settings in (["embed_tokens"], ["embed_tokens", "lm_head"]):
        by_peft(llm(True), tmp_path, modules_to_save=settings)
        model = llm(True)
        with pytest.raises(AdapterMismatchError, match=r"(is tied to|are one tensor in the model)"):
            load_lora(model, tmp_path)
        assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("tied", [False, True])
def test_a_resized_vocabulary(tmp_path, tied):
    """PEFT saves the embeddings then, and loads them into the base."""
    theirs = by_peft(llm(tied, 70), tmp_path / "theirs")
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    ours = llm(tied, 70, seed=4)  # other new rows, and with this seed another body too
    body = {k: v for k, v in theirs.get_base_model().state_dict().items() if "lora" not in k}
    body = {k.replace(".base_layer", ""): v for k, v in body.items()}
    own = {n: ours.state_dict()[n].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}
    ours.load_state_dict({**body, **own})
    bare = logits(ours)
    with pytest.warns(
        UserWarning, match=r"model\.embed_tokens\.weight.* of its base, which differs"
    ):
        load_lora(ours, tmp_path / "theirs")
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)
    assert not ours.lm_head.weight.requires_grad
    with disable_lora(ours):
        assert torch.equal(logits(ours), bare)
    mark_only_lora_as_trainable(ours)
    assert not ours.model.embed_tokens.weight.requires_grad and len(lora_parameters(ours)) == 4
    for name in ("again", "again.safetensors"):
        save_lora(ours, tmp_path / name)
        again = llm(tied, 70, seed=4)
        again.load_state_dict({**body, **own})
        with pytest.warns(UserWarning, match="which differs"):
            load_lora(again, tmp_path / name)
        assert torch.equal(logits(again), logits(ours)) and len(lora_parameters(again)) == 4
    with pytest.raises(ValueError, match=r"a \.pth file cannot say that .* is the base's"):
        save_lora(ours, tmp_path / "again.pth")
    small = llm(tied)
    with pytest.raises(AdapterMismatchError, match=r"call resize_token_embeddings\(70\) first"):
        load_lora(small, tmp_path / "theirs")


@pytest.mark.parametrize("same", [True, False])
def test_the_copy_of_an_adapted_head(tmp_path, same):
    theirs = by_peft(llm(False), tmp_path, target_modules=["q_proj", "lm_head"])
    assert "base_model.model.lm_head.base_layer.weight" in load_file(tmp_path / TENSORS)
    ours = llm(False)
    if same:
        load_lora(ours, tmp_path)
        assert len([m for m in ours.modules() if "_lora_aside" in m.__dict__]) == 0
    else:
        nn.init.normal_(ours.lm_head.weight)
        with pytest.warns(UserWarning, match=r"lm_head\.weight of its base"):
            load_lora(ours, tmp_path)
    assert torch.allclose(logits(ours), logits(theirs), atol=1e-5)


def test_a_name_that_ends_in_another_is_refused(tmp_path):
    model = nn.ModuleDict(
        {"head": nn.Linear(4, 4), "behead": nn.Linear(4, 4), "x": nn.Linear(4, 4)}
    )
    apply_lora(model, 2, target_modules=["x"], modules_to_save=["head"], verbose=False)
    with pytest.raises(ValueError, match="would take 'behead' for 'head'"):
        save_lora(model, tmp_path / "a")
    save_lora(model, tmp_path / "a.safetensors")


def hurt(tensors, name, change):
    key = f"base_model.model.{name}"
    tensors[key] = change(tensors[key])


DAMAGE = {
    "shape": (lambda t: t[:2], r"score\.weight: expected \[3, 32\], found \[2, 32\]"),
    "nan": (lambda t: t.clone().fill_(torch.nan), r"score\.weight: holds NaN or infinity"),
    "integers": (lambda t: t.long(), r"score\.weight: expected torch\.float32, found torch\.int64"),
    "narrow": (
        lambda t: t.to(torch.float8_e4m3fn),
        r"expected a floating-point tensor, found .*fl",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_head_changes_nothing(tmp_path, case):
    by_peft(classifier(1), tmp_path, "SEQ_CLS")
    change, message = DAMAGE[case]
    tensors = load_file(tmp_path / TENSORS)
    hurt(tensors, "score.weight", change)
    save_file(tensors, tmp_path / TENSORS)
    for model in (classifier(2), adapted := classifier(2)):
        if model is adapted:
            apply_lora(model, 4, alpha=8, target_modules=["q_proj"], verbose=False)
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(AdapterMismatchError, match=message):
            load_lora(model, tmp_path)
        assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_modules_on_one_side_only(tmp_path):
    by_peft(classifier(1), tmp_path / "a", "SEQ_CLS")
    model = classifier(2)
    sizes = {"alpha": 8, "target_modules": ["q_proj"], "verbose": False}
    apply_lora(model, 4, modules_to_save=["model.norm"], **sizes)
    with pytest.raises(AdapterMismatchError, match=r"missing from the file: model\.norm\.weight"):
        load_lora(model, tmp_path / "a")
    load_lora(model, tmp_path / "a", strict=False)
    bare = classifier(2)
    apply_lora(bare, 4, modules_to_save=[], **sizes)
    with pytest.raises(
        AdapterMismatchError, match=r"not trained whole in the model: score\.weight"
    ):
        load_lora(bare, tmp_path / "a")
    head = bare.score.weight.clone()
    load_lora(bare, tmp_path / "a", strict=False)
    assert torch.equal(bare.score.weight, head)
    edit(tmp_path / "a", modules_to_save=["score", "model.norm"])
    with pytest.raises(AdapterMismatchError, match=r"missing from the file: model\.norm, of mod"):
        load_lora(classifier(2), tmp_path / "a")
    assert (tmp_path / "a" / CONFIG).exists()
