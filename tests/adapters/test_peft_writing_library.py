"""PEFT's format against PEFT itself: both compute the same of each other's files."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file
from tiny_peft import BASES, OURS, TARGETS, TENSORS, base, config_of, fill, logits, ours
from torch import nn

from lora_kernels import LoRALinear, apply_lora, load_lora, lora_parameters, save_lora

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


@pytest.mark.parametrize("fold", [False, True], ids=["kept", "folded"])
@pytest.mark.parametrize("way", OURS)
@pytest.mark.parametrize("name", BASES)
def test_peft_computes_what_we_compute(tmp_path, name, way, fold):
    peft = pytest.importorskip("peft")
    source = ours(name, way)
    save_lora(source, tmp_path / "a", fold_scale=fold)
    theirs = peft.PeftModel.from_pretrained(base(name), tmp_path / "a").eval()
    assert type(theirs) is peft.PeftModelForCausalLM
    assert (logits(source) - logits(base(name))).abs().max() > 1e-2
    torch.testing.assert_close(logits(theirs), logits(source), rtol=0, atol=1e-6)
    adapted = {n for n, m in theirs.base_model.model.named_modules() if hasattr(m, "lora_A")}
    assert adapted == {n for n, m in source.named_modules() if isinstance(m, LoRALinear)}


THEIRS = {
    "plain": {"r": 4, "lora_alpha": 8},
    "default alpha": {"r": 4},
    "rslora": {"r": 4, "lora_alpha": 8, "use_rslora": True},
    "patterns": {"r": 4, "lora_alpha": 3, "rank_pattern": 2, "alpha_pattern": 5},
    "overlapping": {
        "r": 4,
        "lora_alpha": 3,
        "rank_pattern": 2,
        "alpha_pattern": 5,
        "overlap": True,
    },
    "rslora, patterns": {"r": 4, "lora_alpha": 8, "rank_pattern": 2, "use_rslora": True},
    "gaussian, one layer": {"init_lora_weights": "gaussian", "layers_to_transform": [1]},
    "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
}


def theirs(name, way, directory, dtype=torch.float32, **more):
    """The model that PEFT made and saved."""
    peft = pytest.importorskip("peft")
    settings = {"target_modules": TARGETS[name], **THEIRS[way], **more}
    second = TARGETS[name][1]
    for pattern in ("rank_pattern", "alpha_pattern"):
        if pattern in settings:
            # PEFT sorts the keys as it saves, so that only overlaps in that order survive.
            wider = {second: 3} if settings.get("overlap") else {}
            settings[pattern] = {rf"^.*layers\.1\..*{second}": settings[pattern], **wider}
    settings.pop("overlap", None)
    if name == "minimind":  # its names begin with "layers", where PEFT looks for no number
        settings.pop("layers_to_transform", None)
    model = peft.get_peft_model(base(name, dtype=dtype), peft.LoraConfig(**settings)).eval()
    fill(p for n, p in model.named_parameters() if ".lora_" in n)
    model.save_pretrained(directory, save_embedding_layers=False)  # "auto" may ask the network
    return model


@pytest.mark.parametrize("way", THEIRS)
@pytest.mark.parametrize("name", BASES)
def test_we_compute_what_peft_computes(tmp_path, name, way):
    source = theirs(name, way, tmp_path)
    target = base(name)
    loaded = load_lora(target, tmp_path)
    torch.testing.assert_close(logits(target), logits(source), rtol=0, atol=1e-6)
    for module in loaded:
        scaling = source.base_model.model.get_submodule(module).scaling["default"]
        assert target.get_submodule(module).scale == scaling
    # Again, onto a model that has LoRA already, and out to PEFT once more.
    fill(lora_parameters(target))
    assert load_lora(target, tmp_path) == loaded
    save_lora(target, tmp_path / "back")
    peft = pytest.importorskip("peft")
    again = peft.PeftModel.from_pretrained(base(name), tmp_path / "back").eval()
    torch.testing.assert_close(logits(again), logits(source), rtol=0, atol=1e-6)


def test_what_peft_saves_of_a_narrow_base_is_wide(tmp_path):
    source = theirs("llama", "plain", tmp_path / "theirs", dtype=torch.bfloat16)
    tensors = load_file(tmp_path / "theirs" / TENSORS)
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    target = base("llama", dtype=torch.bfloat16)
    apply_lora(target, 4, alpha=8, target_modules=TARGETS["llama"], verbose=False)
    for layer in target.modules():
        if isinstance(layer, LoRALinear):
            layer.lora.float()
    load_lora(target, tmp_path / "theirs")
    save_lora(target, tmp_path / "ours")
    back = load_file(tmp_path / "ours" / TENSORS)
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in tensors.items())
    bare = base("llama", dtype=torch.bfloat16)
    load_lora(bare, tmp_path / "theirs")
    for model in (target, bare):
        # Not 1e-6: PEFT multiplies in float32 here, we in bfloat16, and the base rounds anyway.
        torch.testing.assert_close(logits(model), logits(source), rtol=0, atol=3e-2)


def test_peft_reads_the_narrow_and_writes_the_same_config(tmp_path):
    peft = pytest.importorskip("peft")
    save_lora(ours("llama", "patterns", dtype=torch.bfloat16), tmp_path / "a")
    assert {t.dtype for t in load_file(tmp_path / "a" / TENSORS).values()} == {torch.bfloat16}
    config = peft.PeftConfig.from_pretrained(tmp_path / "a")
    written = config_of(tmp_path / "a")
    read = config.to_dict()
    assert {key: read[key] for key in written if key != "target_modules"} == {
        key: value for key, value in written.items() if key != "target_modules"
    }


class Nested(nn.Module):
    """Names that end in one another, and one that a dot as a wildcard would match."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 8)
        self.block = nn.ModuleDict({"gate": nn.Linear(8, 8), "xgate": nn.Linear(8, 8)})
        self.a = nn.ModuleDict({"block": nn.ModuleDict({"gate": nn.Linear(8, 8)})})
        self.blockXgate = nn.Linear(8, 8)
        self.odd = nn.ModuleDict({"q-(1)+": nn.Linear(8, 8), "other": nn.Embedding(4, 8)})
        self.other = nn.Linear(8, 8)

    def linears(self):
        return {n: m for n, m in self.named_modules() if isinstance(m, nn.Linear)}

    def forward(self, x):
        for linear in (
            self.gate,
            *self.block.values(),
            self.a["block"]["gate"],
            self.blockXgate,
            self.odd["q-(1)+"],
            self.other,
        ):
            x = torch.tanh(linear(x))
        return x


X = torch.linspace(-1, 1, 24).reshape(3, 8)


@pytest.mark.parametrize(
    "ranks",
    [
        {"gate": 1, "block.gate": 2, "block.xgate": 2, "a.block.gate": 2, "blockXgate": 2},
        {"gate": 2, "block.gate": 1, "block.xgate": 2, "a.block.gate": 2, "blockXgate": 2},
        {"gate": 2, "block.gate": 1, "a.block.gate": 3, "odd.q-(1)+": 4, "blockXgate": 2},
        {"gate": 2, "other": 2},
        {"block.gate": 3},
        {"gate": 1, "block.gate": 2, "a.block.gate": 3, "odd.q-(1)+": 4, "other": 5},
    ],
)
@pytest.mark.parametrize("library", ["ours", "peft"])
def test_every_name_has_its_own_rank_and_alpha(tmp_path, ranks, library):
    torch.manual_seed(2)
    source = Nested()
    plain = Nested()
    plain.load_state_dict(source.state_dict())
    patterns = {f"^{re.escape(name)}": rank for name, rank in ranks.items()}
    apply_lora(
        source,
        target_modules="|".join(map(re.escape, ranks)),
        rank_pattern=patterns,
        alpha_pattern={key: 7 + rank**2 for key, rank in patterns.items()},
        verbose=False,
    )
    fill(lora_parameters(source))
    save_lora(source, tmp_path / "a")
    if library == "peft":
        peft = pytest.importorskip("peft")
        wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "a")
        made = {
            name: (module.r["default"], module.scaling["default"])
            for name, module in wrapped.base_model.model.named_modules()
            if hasattr(module, "lora_A")
        }
        result = wrapped(X)
    else:
        load_lora(plain, tmp_path / "a")
        made = {n: (m.rank, m.scale) for n, m in plain.linears().items() if hasattr(m, "lora")}
        result = plain(X)
    assert made == {name: (rank, (7 + rank**2) / rank) for name, rank in ranks.items()}
    torch.testing.assert_close(result, source(X), rtol=0, atol=1e-6)


def test_many_modules_with_many_ranks(tmp_path):
    peft = pytest.importorskip("peft")  # it shortens lists of 20 names and more
    model, plain = (nn.ModuleDict({"layers": nn.ModuleList()}) for _ in range(2))
    for side in (model, plain):
        side["layers"].extend(nn.Linear(8, 8) for _ in range(24))
    apply_lora(
        model,
        target_modules=r"layers\.(?!3$).*",
        rank_pattern={rf"layers\.{i}": 1 + i % 5 for i in range(24) if i != 3},
        alpha=3,
        verbose=False,
    )
    save_lora(model, tmp_path / "a")
    wrapped = peft.PeftModel.from_pretrained(plain, tmp_path / "a").base_model.model
    for i, (layer, linear) in enumerate(zip(wrapped["layers"], model["layers"], strict=True)):
        assert hasattr(layer, "lora_A") == (i != 3)
        assert i == 3 or layer.scaling["default"] == linear.scale
