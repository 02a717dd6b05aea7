"""Single tokens trained: rows of the embeddings, and of a head that is tied to them."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from tiny_model import SUFFIXES, Model, assert_untouched, snapshot
from tiny_peft import CONFIG, TENSORS, by_peft, edit, fill, in_peft, llm
from torch import nn
from torch.nn import functional as F

from lora_kernels import (
    AdapterMismatchError,
    LoRAConfig,
    apply_lora,
    disable_lora,
    load_lora,
    lora_parameters,
    lora_state_dict,
    mark_only_lora_as_trainable,
    merge_lora,
    merged_lora,
    remove_lora,
    save_lora,
    use_lora,
)

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")
TOKENS = [9, 3, 40]
IDS = torch.tensor([[3, 9, 1, 40, 3, 0], [9, 9, 63, 2, 41, 40]])
LAYER = ["layers.0.self_attn.q_proj"]


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def adapted(tied=True, asked=None, **settings):
    model = llm(tied)
    asked = TOKENS if asked is None else asked
    settings = {"target_modules": LAYER, "verbose": False, **settings}
    apply_lora(model, 4, alpha=8, trainable_token_indices=asked, **settings)
    fill(lora_parameters(model))
    return model


def spelled_out(model, tied):
    """The same model with the rows in its weights, which autograd goes through whole."""
    plain = llm(tied)
    apply_lora(plain, 4, alpha=8, target_modules=LAYER, verbose=False)
    state = lora_state_dict(model)
    plain.load_state_dict({k: v for k, v in state.items() if ".lora." in k}, strict=False)
    index = state["model.embed_tokens.lora_tokens.index"]
    rows = state["model.embed_tokens.lora_tokens.weight"]
    with torch.no_grad():
        plain.model.embed_tokens.weight[index] = rows
    return plain, index


@pytest.mark.parametrize("tied", [True, False])
def test_it_computes_and_learns_what_the_whole_weight_would(tied):
    model = adapted(tied)
    plain, index = spelled_out(model, tied)
    assert index.tolist() == sorted(TOKENS)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-6)
    mark_only_lora_as_trainable(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == [
        "model.embed_tokens.lora_tokens.weight",
        "model.layers.0.self_attn.q_proj.lora.A.weight",
        "model.layers.0.self_attn.q_proj.lora.B.weight",
    ]
    for m in (model, plain):
        F.cross_entropy(m(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    whole = plain.model.embed_tokens.weight.grad
    rows = model.model.embed_tokens.lora_tokens.weight.grad
    torch.testing.assert_close(rows, whole[index], rtol=1e-4, atol=1e-6)
    assert rows.any(dim=1).all() and model.model.embed_tokens.weight.grad is None
    ours, theirs = (m.model.layers[0].self_attn.q_proj.lora.A.weight.grad for m in (model, plain))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_nothing_else_of_the_vocabulary_moves():
    model = adapted()
    before = model.model.embed_tokens.weight.detach().clone()
    mark_only_lora_as_trainable(model)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2, weight_decay=0.5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert torch.equal(model.model.embed_tokens.weight, before)
    fresh = set(range(64)) - set(IDS.flatten().tolist()) - set(TOKENS)
    other = torch.tensor(sorted(fresh))[None]
    assert torch.equal(model.model.embed_tokens(other), before[other])


@pytest.mark.parametrize("tied", [True, False])
def test_the_base_and_the_merged_model(tied):
    model, bare = adapted(tied), logits(llm(tied))
    trained = logits(model)
    assert not torch.allclose(trained, bare, atol=1e-2)
    with disable_lora(model):
        assert torch.equal(logits(model), bare)
    assert torch.equal(logits(model), trained)
    with merged_lora(model):
        torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-5)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin), trained)
        remove_lora(twin)
        assert torch.equal(logits(twin), bare)
        assert twin.state_dict().keys() == llm(tied).state_dict().keys()
    merge_lora(model)
    torch.testing.assert_close(logits(model), trained, rtol=0, atol=1e-5)
    assert model.state_dict().keys() == llm(tied).state_dict().keys()
    assert not model.model.embed_tokens._forward_hooks and not model.lm_head._forward_hooks
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_an_embedding_that_scales():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    torch.manual_seed(0)
    model, plain = Gemma3ForCausalLM(config).eval(), Gemma3ForCausalLM(config).eval()
    plain.load_state_dict(model.state_dict())
    apply_lora(model, 2, target_modules=["q_proj"], trainable_token_indices=TOKENS, verbose=False)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        model.model.embed_tokens.lora_tokens.weight.normal_()
        index = model.model.embed_tokens.lora_tokens.index
        plain.model.embed_tokens.weight[index] = model.model.embed_tokens.lora_tokens.weight
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)


def test_rows_of_a_narrow_model_are_wide():
    model = llm(True).bfloat16()
    apply_lora(model, 2, target_modules=LAYER, trainable_token_indices=[3], verbose=False)
    assert model.model.embed_tokens.lora_tokens.weight.dtype == torch.float32
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), logits(llm(True).bfloat16()))


@pytest.mark.parametrize("suffix", [*SUFFIXES, ""])
@pytest.mark.parametrize(
    ("tied", "asked"),
    [(True, None), (False, None), (False, {"embed_tokens": [5, 1], "lm_head": [2, 7, 4]})],
)
def test_files(tmp_path, tied, asked, suffix):
    model = adapted(tied, asked)
    save_lora(model, tmp_path / f"a{suffix}")
    fresh, again = llm(tied), adapted(tied, asked)
    if suffix not in (".pth", ".pt"):  # which do not say alpha
        load_lora(fresh, tmp_path / f"a{suffix}")
        assert torch.equal(logits(fresh), logits(model))
    load_lora(again, tmp_path / f"a{suffix}")
    assert torch.equal(logits(again), logits(model))
    with pytest.raises(AdapterMismatchError, match="the file has the tokens .*the model trains"):
        load_lora(adapted(tied, [1, 2]), tmp_path / f"a{suffix}")
    with pytest.raises(AdapterMismatchError, match=r"missing from the file: model\.embed_tokens"):
        plain = adapted(tied, asked)
        save_lora(remove_tokens(plain), tmp_path / f"b{suffix}")
        load_lora(again, tmp_path / f"b{suffix}")


def remove_tokens(model):
    """The same factors on a model that trains no tokens."""
    plain = llm(model.lm_head.weight is model.model.embed_tokens.weight)
    apply_lora(plain, 4, alpha=8, target_modules=LAYER, verbose=False)
    return plain


@pytest.mark.parametrize(
    ("tied", "asked"),
    [
        (True, [9, 3, 40]),
        (False, [9, 3, 40]),
        (False, {"embed_tokens": [5, 1], "lm_head": [2, 7, 4]}),
        (True, {"embed_tokens": [5, 1], "lm_head": [5, 1]}),
    ],
)
def test_both_ways_with_peft(tmp_path, tied, asked):
    theirs = by_peft(llm(tied), tmp_path / "theirs", trainable_token_indices=asked)
    ours = llm(tied)
    load_lora(ours, tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    save_lora(ours, tmp_path / "ours")
    back = in_peft(llm(tied), tmp_path / "ours")
    torch.testing.assert_close(logits(back), logits(ours), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")
@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_of_a_resized_vocabulary(tmp_path, tied):
    base = llm(tied, 70)
    fresh = copy.deepcopy(base)
    theirs = by_peft(base, tmp_path, trainable_token_indices=[65, 64])
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    load_lora(fresh, tmp_path)
    torch.testing.assert_close(logits(fresh), logits(theirs), rtol=0, atol=1e-5)
    with pytest.raises(AdapterMismatchError, match="call resize_token_embeddings"):
        load_lora(llm(tied), tmp_path)


def test_out_of_a_checkpoint(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path)
    fresh = llm(True)
    with pytest.warns(UserWarning, match="says neither alpha"):
        load_lora(fresh, tmp_path)
    rows = fresh.model.embed_tokens.lora_tokens
    assert torch.equal(rows.weight, model.model.embed_tokens.lora_tokens.weight)
    again = adapted()
    load_lora(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


class Renormed(Model):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8, max_norm=1.0)


class Own(nn.Embedding):
    def forward(self, x):
        return 2 * super().forward(x)


MISTAKES = {
    "no list": ({"trainable_token_indices": 3}, "must be a list of token numbers"),
    "negative": ({"trainable_token_indices": [-1]}, "must be a list of token numbers"),
    "floats": ({"trainable_token_indices": [1.0]}, "must be a list of token numbers"),
    "empty": ({"trainable_token_indices": []}, "must be a list of token numbers"),
    "twice": ({"trainable_token_indices": [1, 1]}, "names a token twice"),
    "too far": ({"trainable_token_indices": {"embed": [10]}}, "go to 10, its weight has 10 rows"),
    "no module": ({"trainable_token_indices": {"emb": [1]}}, "'emb', which means no module"),
    "several": (
        {"trainable_token_indices": {"q": [1]}},
        "'q', which means 'blocks.0.q', 'blocks.1.q';",
    ),
    "a list without embeddings": ({"trainable_token_indices": [1]}, "'embed_tokens', which means"),
    "a container": ({"trainable_token_indices": {"blocks": [1]}}, "is a ModuleList, not an nn.Emb"),
    "also adapted": ({"trainable_token_indices": {"gate": [1]}}, "'gate' is adapted or trained"),
    "tied apart": (
        {"trainable_token_indices": {"embed": [1], "lm_head": [2]}},
        "'embed' and 'lm_head' differ, and they are tied",
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_change_nothing(case):
    settings, message = MISTAKES[case]
    model = Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        apply_lora(model, 2, verbose=False, **settings)
    assert_untouched(model, before)


@pytest.mark.parametrize("kind", [Renormed, Own])
def test_an_embedding_that_computes_something_else_is_refused(kind):
    model = Model() if kind is Own else Renormed()
    if kind is Own:
        model.embed = Own(10, 8)
    with pytest.raises(ValueError, match="not an nn.Embedding or a head"):
        apply_lora(model, 2, trainable_token_indices={"embed": [1]}, verbose=False)


def test_a_whole_embedding_is_not_trained_by_rows_too():
    asked = LoRAConfig(
        2, modules_to_save=["embed", "lm_head"], trainable_token_indices={"embed": [1]}
    )
    with pytest.raises(ValueError, match="'embed' is adapted or trained whole already"):
        apply_lora(Model(), config=asked, verbose=False)


def drop_indices(directory):
    edit(directory, trainable_token_indices=None)


def few_indices(directory):
    edit(directory, trainable_token_indices=[1])


def far_indices(directory):
    edit(directory, trainable_token_indices=[1, 2, 10**6])


def huge_indices(directory):
    edit(directory, trainable_token_indices=[1, 2, 10**30])


def text_indices(directory):
    edit(directory, trainable_token_indices=[1, 2, "3"])


def narrow_rows(directory):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / TENSORS)
    key = next(key for key in tensors if "trainable_tokens_delta" in key)
    tensors[key] = tensors[key][:, :5].clone()
    save_file(tensors, directory / TENSORS)


DAMAGE = {
    drop_indices: "trainable_token_indices is None for 'model.embed_tokens', expected a list",
    few_indices: r"lora_tokens\.weight: expected 1 rows, found \[3, 32\]",
    far_indices: "indices go to 1000000, its weight has 64 rows",
    huge_indices: "expected a list of token numbers",
    text_indices: "expected a list of token numbers",
    narrow_rows: r"lora_tokens\.weight: expected rows of 32, found \[3, 5\]",
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_damaged_files_change_nothing(tmp_path, damage):
    save_lora(adapted(), tmp_path)
    damage(tmp_path)
    model = llm(True)
    before = snapshot(model)
    with pytest.raises(AdapterMismatchError, match=DAMAGE[damage]):
        load_lora(model, tmp_path)
    assert_untouched(model, before)
    assert (tmp_path / CONFIG).exists()


@pytest.mark.parametrize("loading", [False, True])
def test_a_further_adapter_may_ask_for_them_by_the_head_that_is_tied(tmp_path, loading):
    model = adapted(asked={"embed_tokens": [9]})
    settings = {"asked": {"lm_head": [3, 40]}}
    expected = adapted(**settings)
    save_lora(expected, tmp_path / "fr.safetensors")
    if loading:
        load_lora(model, tmp_path / "fr.safetensors", name="fr")
    else:
        tokens = {"trainable_token_indices": {"lm_head": [3, 40]}}
        apply_lora(model, 4, alpha=8, target_modules=LAYER, name="fr", verbose=False, **tokens)
        fill(lora_parameters(model, "fr"))
    before = logits(model)
    state, wanted = lora_state_dict(model, "fr"), lora_state_dict(expected)
    assert state["model.embed_tokens.lora_tokens.index"].tolist() == [3, 40]
    rows = state["model.embed_tokens.lora_tokens.weight"]
    assert rows.shape == wanted["lm_head.lora_tokens.weight"].shape and rows.any(dim=1).all()
    with use_lora(model, "fr"):
        assert not torch.equal(logits(model), before)
        if loading:
            torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-6)
    assert torch.equal(logits(model), before)


def test_a_module_that_two_names_mean_is_refused():
    model = llm(True)
    twice = {"embed_tokens": [1], "model.embed_tokens": [2]}
    before = snapshot(model)
    with pytest.raises(ValueError, match="names 'model.embed_tokens' twice"):
        apply_lora(model, 4, target_modules=LAYER, trainable_token_indices=twice, verbose=False)
    assert_untouched(model, before)


@pytest.mark.parametrize("value", [1e6, float("inf")])
def test_rows_too_large_for_the_weight_are_not_merged(value):
    model = adapted().half()
    with torch.no_grad():
        model.model.embed_tokens.lora_tokens.weight.data = torch.full((3, 32), value)
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot merge the tokens of 'model.embed_tokens'"):
        merge_lora(model)
    assert_untouched(model, before)
