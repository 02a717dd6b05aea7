"""`minimind export` on a tiny model: what it writes, what it refuses, what it leaves alone."""

from __future__ import annotations

import json
import os
import re
import stat

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_cli import finetune, make_base

from lora_kernels import load_lora, merge_lora
from minimind.cli import main
from minimind.commands import export as module
from minimind.data.tokenizer import load_tokenizer, save_tokenizer
from minimind.model.checkpoint import load_model
from minimind.model.eras import ERAS

TOKENS = torch.randint(0, 6400, (2, 20), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model):
    return model(input_ids=TOKENS).logits


def twin(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.fixture
def adapter(here):
    assert finetune("--out", "o", "--epochs", "1") == 0
    return "o/adapter.safetensors"


def expected(here, adapter=None):
    model = load_model(here / "base")
    if adapter:
        load_lora(model, adapter)
        merge_lora(model)
    return logits(model)


@pytest.mark.parametrize("era", ERAS)
@pytest.mark.parametrize("use_moe", [False, True])
def test_transformers_loads_it_with_tokenizer_template_and_ids(here, era, use_moe, capsys):
    make_base(here / "base", era=era, use_moe=use_moe, vocab_size=6500, eos_token_id=7)
    save_tokenizer(load_tokenizer(), here / "base")
    assert main(["export", "--to", "hf", "x", "--base", "base", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    kind = {"2025-02": "Llama", "2025-04": "Llama", "2026-03": "Qwen3"}[era]
    kind = {"Llama": "Ernie4_5_Moe", "Qwen3": "Qwen3Moe"}[kind] if use_moe else kind
    assert f"wrote x/: {kind}ForCausalLM in float32" in said
    assert ("chat --base x" in said) == (kind != "Ernie4_5_Moe")
    torch.testing.assert_close(logits(twin("x")), expected(here), atol=1e-5, rtol=1e-5)
    ours, theirs = load_tokenizer(), transformers.AutoTokenizer.from_pretrained("x")
    turns = [{"role": "user", "content": "How are you, 茶? 123"}]
    for prompt in (False, True):
        render = {"tokenize": False, "add_generation_prompt": prompt}
        text = ours.apply_chat_template(turns, **render)
        assert theirs.apply_chat_template(turns, **render) == text
        assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    generation = transformers.GenerationConfig.from_pretrained("x")
    assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (1, 2, 0)
    config = json.loads((here / "x" / "config.json").read_text())
    assert config["eos_token_id"] == 2  # the tokenizer's, which the template ends turns with
    assert config["architectures"] == [f"{kind}ForCausalLM"] and config["rope_theta"] == 1e6


def test_the_same_answer_comes_out_of_the_export(here, capsys):
    assert main(["export", "x", "--base", "base", "--dtype", "float32"]) == 0
    capsys.readouterr()
    answers = []
    for base in ("base", "x"):
        assert main(["chat", "--base", base, "--prompt", "Hi", "--max-new-tokens", "8"]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1]


def test_merge_folds_in_and_reports_the_rounding(here, adapter, capsys):
    arguments = ["export", "--base", "base", "--lora", adapter, "--merge"]
    assert main([*arguments, "x", "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "merged 2 modules in float32" in said and "wq: 0.00%" in said
    torch.testing.assert_close(logits(twin("x")), expected(here, adapter), atol=1e-5, rtol=1e-5)
    assert not (here / "x" / "adapter").exists()
    assert main([*arguments, "y"]) == 0
    said = capsys.readouterr().out
    reported = float(said.split("attention.wq: ")[1].partition("%")[0]) / 100
    base = load_model(here / "base").layers[0].attention.wq.weight
    model = load_model(here / "base")
    load_lora(model, adapter)
    delta = model.layers[0].attention.wq.delta_weight()
    merged = (base + delta).detach()
    lost = (merged.bfloat16().float() - merged).norm() / delta.norm()
    assert abs(reported - lost) < 1e-4 and lost > 0
    assert "rounding to bfloat16 moves a logit by up to" in said
    dtypes = {t.dtype for t in load_file(here / "y" / "model.safetensors").values()}
    assert dtypes == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")  # in PEFT
def test_an_adapter_that_is_not_merged_lies_beside_the_model(here, adapter, capsys):
    peft = pytest.importorskip("peft")
    arguments = ["export", "x", "--base", "base", "--lora", adapter, "--dtype", "float32"]
    assert main(arguments) == 0
    assert "adapter/: the adapter for it, in PEFT's format" in capsys.readouterr().out
    torch.testing.assert_close(logits(twin("x")), expected(here), atol=1e-5, rtol=1e-5)
    theirs = peft.PeftModel.from_pretrained(twin("x"), "x/adapter").eval()
    both = expected(here, adapter)
    torch.testing.assert_close(logits(theirs), both, atol=1e-5, rtol=1e-5)
    config = json.loads((here / "x" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "x"
    assert (both - expected(here)).abs().max() > 1e-3


@pytest.mark.parametrize("era", ERAS)
def test_a_pth_has_the_originals_names_and_values(here, era):
    make_base(here / "base", era=era)
    save_tokenizer(load_tokenizer(), here / "base")
    assert main(["export", "--to", "pth", "m.pth", "--base", "base", "--dtype", "float16"]) == 0
    content = torch.load(here / "m.pth", weights_only=True)
    state = load_model(here / "base").state_dict()
    assert content.keys() == state.keys()
    assert all(torch.equal(content[name], t.half()) for name, t in state.items())
    assert (here / "m.pth").stat().st_size < 2 * 1.1 * sum(
        p.numel() for p in load_model(here / "base").parameters()
    ) + 1e5  # the tied tensor is there once


def test_an_earlier_export_is_replaced_whole(here, adapter):
    arguments = ["export", "x", "--base", "base", "--dtype", "float32"]
    assert main([*arguments, "--lora", adapter]) == 0
    assert main([*arguments, "--lora", adapter, "--merge"]) == 0
    assert not (here / "x" / "adapter").exists()
    torch.testing.assert_close(logits(twin("x")), expected(here, adapter), atol=1e-5, rtol=1e-5)
    assert main([*arguments[:2], "--base", "x"]) == 0  # onto itself
    mode = stat.S_IMODE((here / "x" / "model.safetensors").stat().st_mode)
    (here / "plain").touch()
    assert mode == stat.S_IMODE((here / "plain").stat().st_mode)
    assert sorted(p.name for p in here.iterdir() if p.name.startswith(".")) == []


def stranger(here):
    (here / "x").mkdir()
    (here / "x" / "notes.txt").write_text("mine")


def export_and_more(here):
    assert main(["export", "x", "--base", "base"]) == 0
    (here / "x" / "model.gguf").write_text("mine")


def false_manifest(here):
    stranger(here)
    (here / "x" / "export.json").write_text('["notes.txt"]')


def link(here):
    (here / "real").mkdir()
    (here / "x").symlink_to(here / "real")


def file(here):
    (here / "x").write_text("mine")


def raw_scores(here):
    make_base(here / "base", use_moe=True, norm_topk_prob=False)


def other_adapter(here):
    names = [f"model.layers.0.self_attn.q_proj.lora.{f}.weight" for f in "AB"]
    torch.save(dict(zip(names, (torch.ones(2, 64), torch.ones(64, 2)), strict=True)), "a.pth")


def broken_adapter(here):
    torch.save({"layers.0.attention.wq.lora.A.weight": torch.ones(2, 64)}, "a.pth")


REFUSED = {
    "a stranger's directory": (stranger, [], r"x holds files that are not .*\(notes.txt\)"),
    "an export and more": (export_and_more, [], r"\(model.gguf\).*nothing was overwritten"),
    "a manifest that is none": (false_manifest, [], "holds files that are not an earlier export"),
    "a link": (link, [], "x is a link, which is not followed"),
    "a file": (file, [], "x is a file; give a directory"),
    "no base": (None, ["--base", "nowhere"], "no weight file at nowhere"),
    "dtype": (None, ["--dtype", "int8"], "dtype must be one of float32"),
    "merge of nothing": (None, ["--merge"], "--merge needs an adapter"),
    "no adapter there": (None, ["--lora", "a.pth"], "no adapter file at a.pth"),
    "adapter of another era": (other_adapter, ["--lora", "a.pth"], "2025-04 or 2026-03, the base"),
    "half an adapter": (broken_adapter, ["--lora", "a.pth", "--merge"], "missing key .*lora.B"),
    "no exact layout": (raw_scores, [], "has no exact counterpart in transformers"),
    "pth without its suffix": (None, ["--to", "pth"], "give a name that ends in .pth"),
    "pth with an adapter": (other_adapter, ["--to", "pth", "--lora", "a.pth"], "by --merge, or"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_name_the_fault_and_write_nothing(here, case, capsys):
    prepare, options, words = REFUSED[case]
    if prepare:
        prepare(here)
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    capsys.readouterr()
    base = [] if "--base" in options else ["--base", "base"]
    assert main(["export", "x", *base, *options]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert re.search(words, message), message
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


def test_a_pth_that_is_there_is_left_alone(here, capsys):
    (here / "m.pth").write_text("mine")
    assert main(["export", "--to", "pth", "m.pth", "--base", "base"]) == 2
    assert "m.pth exists; nothing was overwritten" in capsys.readouterr().err
    assert (here / "m.pth").read_text() == "mine"


def test_a_later_era_without_its_tokenizer_is_asked_for_it(here, capsys):
    make_base(here / "base", era="2026-03")
    for command in (["export", "x"], ["chat", "--prompt", "Hi"]):
        assert main([*command, "--base", "base"]) == 2
        assert "no tokenizer.json beside the base base" in capsys.readouterr().err
    save_tokenizer(load_tokenizer(), here / "t")
    assert main(["export", "x", "--base", "base", "--tokenizer", "t"]) == 0


def test_what_does_not_compute_the_same_is_not_left_behind(here, monkeypatch, capsys):
    def unturned(model, layout, dtype):
        tensors = hub_tensors(model, layout, dtype)
        name = "model.layers.0.self_attn.q_proj.weight"
        return {**tensors, name: tensors[name].flip(0)}

    hub_tensors = module.hub_tensors
    monkeypatch.setattr(module, "hub_tensors", unturned)
    assert main(["export", "x", "--base", "base"]) == 2
    assert "computes other logits from the exported Llama" in capsys.readouterr().err
    assert not (here / "x").exists() and not list(here.glob(".x*"))


def test_an_adapter_that_does_not_compute_the_same_is_not_left_behind(
    here, adapter, monkeypatch, capsys
):
    def unturned(model, layout, twin):
        names = copy_adapter(model, layout, twin)
        with torch.no_grad():
            b = twin.get_submodule(names[0]).lora.B.weight
            b.copy_(b.flip(0))

    copy_adapter = module.copy_adapter
    monkeypatch.setattr(module, "copy_adapter", unturned)
    assert main(["export", "x", "--base", "base", "--lora", adapter]) == 2
    assert "computes other logits" in capsys.readouterr().err
    assert not (here / "x").exists()


def test_a_failed_move_puts_the_earlier_export_back(here, monkeypatch):
    arguments = ["export", "x", "--base", "base"]
    assert main(arguments) == 0
    before = {p.name: p.read_bytes() for p in (here / "x").iterdir()}
    rename = os.rename

    def fail(source, target, **options):
        if str(target) == "x" and str(source).endswith("new"):
            raise OSError("disk full")
        return rename(source, target, **options)

    monkeypatch.setattr(os, "rename", fail)
    assert main([*arguments, "--dtype", "float32"]) == 2
    assert {p.name: p.read_bytes() for p in (here / "x").iterdir()} == before
    assert not list(here.glob(".x*"))
