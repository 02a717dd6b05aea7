"""The examples of the README, run as they stand there, on small models and without a network."""

from __future__ import annotations

import ast
import re
import shlex

import pytest
import tiny_cli
import torch
from places import ROOT
from safetensors.torch import load_file
from tiny_peft import SIZES

from lora_kernels import LoRALinear
from minimind import MiniMindLM, load_tokenizer
from minimind.cli import build_parser

# A word that each example has and no other, in the order of the README.
EXAMPLES = [
    "from_linear",
    "AdamW",
    "merged_lora",
    "use_lora",
    "LoraConfig",
    "PeftModel",
    "load_model",
]

# PEFT asks transformers by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def blocks(language, file="README.md"):
    text = (ROOT / file).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def commands(program, file="README.md"):
    """The arguments of each call of ``program`` in the README's shell examples."""
    lines = [line for block in blocks("sh", file) for line in block.splitlines()]
    calls = [shlex.split(call, comments=True) for line in lines for call in line.split("&&")]
    return [call[1:] for call in calls if call and call[0].split("/")[-1] == program]


def model():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(2)
    return Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "vocab_size": 6400})).eval()


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(12).reshape(2, 6)).logits


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs an example in an empty directory and returns its variables."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("peft")
    monkeypatch.chdir(tmp_path)
    tokenizer = load_tokenizer()

    def stands_for(made):
        def from_pretrained(name):
            assert name == "Qwen/Qwen2.5-0.5B"
            return made()

        return staticmethod(from_pretrained)

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", stands_for(model))
    monkeypatch.setattr(
        transformers.AutoTokenizer, "from_pretrained", stands_for(lambda: tokenizer)
    )

    def run(word):
        (code,) = [block for block in blocks("python") if word in block]
        names = {}
        exec(compile(code, f"README.md, {word}", "exec"), names)
        return names

    return run


def test_every_example_is_run_below_and_is_short():
    found = blocks("python")
    assert len(found) == len(EXAMPLES)
    for word, code in zip(EXAMPLES, found, strict=True):
        assert word in code and sum(word in other for other in found) == 1
        assert len(code.splitlines()) < 15


def test_swap_one_layer(run):
    names = run("from_linear")
    layer = names["layer"]
    assert layer.weight is names["linear"].weight and layer.scale == 2
    trained = {name for name, p in layer.named_parameters() if p.requires_grad}
    assert trained == {"lora.A.weight", "lora.B.weight"}
    assert names["y"].shape == (4, 512) and names["y"].requires_grad


def test_adapt_train_save_and_use_again(run, capsys):
    names = run("AdamW")
    assert "apply lora on module: model.layers.1.self_attn.v_proj\n" in capsys.readouterr().out
    words = names["words"]["input_ids"]
    trained = names["model"]
    assert trained(words, labels=words).loss < model()(words, labels=words).loss - 0.01
    tensors = load_file("adapter.safetensors")
    assert len(tensors) == 8 and all(".lora." in name for name in tensors)
    again = run("merged_lora")["model"]
    assert not any(isinstance(module, LoRALinear) for module in again.modules())
    assert (logits(trained) - logits(model())).abs().max() > 1e-3
    torch.testing.assert_close(logits(again), logits(trained), rtol=0, atol=1e-5)


def test_several_adapters(run, capsys):
    run("AdamW")
    names = run("use_lora")
    both = names["model"]
    assert torch.equal(logits(both), logits(model()))
    torch.nn.init.normal_(both.model.layers[0].mlp.up_proj.loras["tone"].B.weight)
    names["use_lora"](both, ["robin", "tone"])
    assert (logits(both) - logits(model())).abs().max() > 1e-3
    assert all(".lora." in name for name in load_file("tone.safetensors"))
    trained = {name for name, p in both.named_parameters() if p.requires_grad}
    assert trained and all(".loras.tone." in name for name in trained)


def test_accelerate_a_peft_model(run, capsys):
    adapted = run("LoraConfig")["model"]
    assert capsys.readouterr().out.startswith("accelerate_peft: 4 of 4 adapter layers taken\n")
    kinds = {type(m).__name__ for n, m in adapted.named_modules() if n.endswith("q_proj")}
    assert kinds == {"Linear"} and torch.equal(logits(adapted), logits(model()))


def test_save_for_peft(run):
    trained = run("AdamW")["model"]
    names = run("PeftModel")
    assert type(names["model"]).__name__ == "PeftModelForCausalLM"
    torch.testing.assert_close(logits(names["model"]), logits(trained), rtol=0, atol=1e-5)


def test_load_minimind(run, tmp_path):
    tiny_cli.make_base(tmp_path / "out" / "robin")
    names = run("load_model")
    assert isinstance(names["model"], MiniMindLM) and names["model"].config.use_moe


def test_the_commands_are_commands():
    parser = build_parser()
    found = commands("minimind")
    assert len(found) >= 8
    for arguments in found:
        parser.parse_args(arguments)
    assert {arguments[0] for arguments in found} >= {"finetune", "chat", "merge", "sft", "info"}


def test_torchrun_starts_minimind():
    from torch.distributed.run import parse_args

    (arguments,) = commands("torchrun")
    options = parse_args(arguments)
    assert options.module and options.training_script == "minimind"
    assert options.nproc_per_node == "2"
    build_parser().parse_args(options.training_script_args)


def test_the_chinese_readme_has_the_same_code():
    ours, theirs = blocks("python"), blocks("python", "README.zh.md")
    assert [ast.dump(ast.parse(c)) for c in theirs] == [ast.dump(ast.parse(c)) for c in ours]
    for program in ("minimind", "torchrun", "python3"):
        assert commands(program, "README.zh.md") == commands(program)
    assert blocks("json") == blocks("json", "README.zh.md")
