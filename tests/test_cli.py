"""The `minimind` command on a tiny model: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_kernels import load_lora, lora_state_dict
from minimind import LMConfig, MiniMindLM, load_model, load_tokenizer
from minimind.checkpoint import save_model
from minimind.cli import main
from minimind.training import Trainer

SIZES = {"dim": 64, "n_layers": 1, "n_heads": 2, "n_kv_heads": 1}
RESULTS = ["adapter.safetensors", "answers.jsonl", "loss.png", "metrics.jsonl", "run.json"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A directory with a tiny base model and a little data; the command runs in it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(MiniMindLM(LMConfig(**SIZES)), tmp_path / "base", torch.float32)
    write("data.jsonl", [talk(f"What is {i} plus 1?", f"It is {i + 1}.") for i in range(30)])
    return tmp_path


def talk(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def write(path, conversations):
    lines = [json.dumps({"conversations": c}, ensure_ascii=False) for c in conversations]
    Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")


def finetune(*options):
    return main(
        ["finetune", "--base", "base", "--data", "data.jsonl", "--epochs", "2", "--batch-size", "4",
         "--dtype", "float32", "--lr", "0.01", *options]
    )  # fmt: skip


def test_finetune_writes_its_results_and_says_where(here, capsys):
    base_bytes = (here / "base" / "model.safetensors").read_bytes()
    assert finetune("--out", "o", "--log-interval", "3", "--rank", "4", "--alpha", "8") == 0
    said = capsys.readouterr()
    assert sorted(p.name for p in (here / "o").iterdir()) == RESULTS
    assert (here / "base" / "model.safetensors").read_bytes() == base_bytes
    for words in (
        "device      cpu",
        "dtype       float32\n",
        "path        reference: x is on cpu",
        "data        data.jsonl: 27 conversations",
        "held out    3\n",
        "apply lora on module: layers.0.attention.wq\n",
        "apply lora on module: layers.0.attention.wo\n",
        "1,024 of them LoRA",
        "held-out loss ",
        "> What is",
        "before: ",
        "after: ",
        "wrote o/",
        "next:  minimind chat --base base --lora o/adapter.safetensors --compare",
    ):
        assert words in said.out, words
    for words in ("loss ", "lr ", "tokens/s", "14/14"):
        assert words in said.err, words
    adapter = load_file(here / "o" / "adapter.safetensors")
    assert sum(t.numel() for t in adapter.values()) == 1024
    rows = [json.loads(line) for line in (here / "o" / "metrics.jsonl").read_text().splitlines()]
    assert [r.get("step", r.get("event")) for r in rows] == ["before", 3, 6, 9, 12, 14, "after"]
    assert rows[-1]["heldout_loss"] < rows[0]["heldout_loss"]
    run = json.loads((here / "o" / "run.json").read_text())
    assert run["settings"]["rank"] == 4 and run["settings"]["lr"] == 0.01
    assert run["dtype"] == "float32" and run["adapted"][0] == "layers.0.attention.wq"
    answers = [json.loads(line) for line in (here / "o" / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 3 and set(answers[0]) == {"prompt", "expected", "before", "after"}


def test_without_out_the_next_free_directory_is_taken(here):
    for expected in ("out/data-1", "out/data-2"):
        assert finetune("--epochs", "1") == 0
        assert (here / expected / "adapter.safetensors").exists()


def test_options_reach_the_run(here, capsys):
    assert finetune(
        "--out", "o", "--targets", "w1,attention.wv", "--dropout", "0.1", "--accumulation-steps",
        "2", "--epochs", "1", "--max-length", "28", "--seed", "3",
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "apply lora on module: layers.0.attention.wv\n" in said
    assert "apply lora on module: layers.0.feed_forward.w1\n" in said
    assert "steps       4 (1 epochs)" in said and "cut at 28 tokens" in said


@pytest.mark.parametrize("options", [[], ["--use-moe"]], ids=["dense", "moe"])
def test_a_random_base(here, capsys, options):
    code = finetune("--base", "random", "--dim", "64", "--n-layers", "1", "--out", "o", *options)
    assert code == 0
    assert ("MoE" in capsys.readouterr().out) == bool(options)


def test_an_interrupted_run_resumes_to_the_same_bits(here, monkeypatch, capsys):
    options = ("--dropout", "0.2", "--log-interval", "1")
    assert finetune("--out", "whole", *options) == 0
    step = Trainer._step

    def interrupted(self, *arguments):
        if self.step == 9:
            raise KeyboardInterrupt
        return step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", interrupted)
        assert finetune("--out", "broken", *options) == 130
    assert "go on with: minimind finetune --resume broken" in capsys.readouterr().out
    assert not (here / "broken" / "adapter.safetensors").exists()
    assert main(["finetune", "--resume", "broken"]) == 0
    whole, broken = (load_file(here / d / "adapter.safetensors") for d in ("whole", "broken"))
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    rows = [
        json.loads(line) for line in (here / "broken" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [r["step"] for r in rows if "step" in r] == list(range(1, 15))
    assert sorted(p.name for p in (here / "broken").iterdir()) == RESULTS


def test_a_resume_point_is_written_on_the_way(here, monkeypatch):
    def stop(self, *arguments):
        if self.step == 8:
            raise SystemError("the machine died")
        return step(self, *arguments)

    step = Trainer._step
    with monkeypatch.context() as patch, pytest.raises(SystemError):
        patch.setattr(Trainer, "_step", stop)
        finetune("--out", "o", "--save-interval", "5")
    state = torch.load(here / "o" / "resume.pt", weights_only=True)
    assert state["trainer"]["step"] == 5
    assert main(["finetune", "--resume", "o"]) == 0


def test_sft_trains_a_whole_model_that_chat_takes(here, capsys):
    assert main(
        ["sft", "--data", "data.jsonl", "--dim", "64", "--n-layers", "1", "--epochs", "1",
         "--out", "m", "--dtype", "float32"]
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "all trained" in said and "next:  minimind chat --base m" in said
    model = load_model(here / "m")
    assert model.config.dim == 64
    stored = load_file(here / "m" / "model.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.bfloat16}
    assert main(["chat", "--base", "m", "--prompt", "hello", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("base> ")


def test_chat_with_without_and_comparing(here, capsys, monkeypatch):
    assert finetune("--out", "o", "--epochs", "8", "--lr", "0.05", "--targets", "all-linear") == 0
    capsys.readouterr()
    ask = ["--base", "base", "--prompt", "What is 3 plus 1?", "--max-new-tokens", "12"]
    lora = ["--lora", "o/adapter.safetensors"]
    assert main(["chat", *ask]) == 0
    base = capsys.readouterr().out
    assert main(["chat", *ask, *lora]) == 0
    adapted = capsys.readouterr().out
    assert base.startswith("base> ") and adapted.startswith("lora> ")
    assert base.removeprefix("base> ") != adapted.removeprefix("lora> ")
    assert main(["chat", *ask, *lora, "--compare"]) == 0
    assert capsys.readouterr().out == base + adapted
    typed = iter(["What is 3 plus 1?", "/lora", "/new", "What is 3 plus 1?", "/what", "", "/quit"])
    monkeypatch.setattr("builtins.input", lambda _: next(typed))
    assert main(["chat", "--base", "base", "--max-new-tokens", "12", *lora]) == 0
    said = capsys.readouterr().out
    assert adapted in said and base in said and "(the adapter is off)" in said
    assert said.count("/quit leaves") == 2  # the greeting, and the answer to an unknown command
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    assert main(["chat", "--base", "base"]) == 0


def test_merge_writes_the_adapted_model(here, capsys):
    assert finetune("--out", "o") == 0
    assert main(
        ["merge", "--base", "base", "--lora", "o/adapter.safetensors", "--out", "m", "--dtype",
         "float32"]
    ) == 0  # fmt: skip
    said = capsys.readouterr().out
    assert "layers.0.attention.wq: 0.00% of" in said and "minimind chat --base m" in said
    adapted = load_model(here / "base")
    load_lora(adapted, here / "o" / "adapter.safetensors")
    merged = load_model(here / "m")
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(merged.eval()(ids).logits, adapted.eval()(ids).logits)
    assert len(load_tokenizer(here / "m")) == 6400


def test_info(here, capsys):
    assert finetune("--out", "o", "--rank", "4", "--alpha", "2") == 0
    capsys.readouterr()
    assert main(["info"]) == 0
    assert "path          reference: x is on cpu" in capsys.readouterr().out
    assert main(["info", "base"]) == 0
    assert "dim 64, 1 layers, 2 heads, 1 key-value heads" in capsys.readouterr().out
    assert main(["info", "o/adapter.safetensors"]) == 0
    said = capsys.readouterr().out
    assert "1,024 parameters on 2 modules" in said
    assert "layers.0.attention.wq: rank 4, scale 0.5, float32" in said


def small_tokenizer_model(here):
    torch.manual_seed(0)
    save_model(MiniMindLM(LMConfig(**SIZES, vocab_size=100)), here / "small", torch.float32)


def other_era(here):
    names = ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight")
    torch.save({name: torch.ones(4, 4) for name in names}, here / "era.pth")


def other_run(here):
    (here / "used").mkdir()
    (here / "used" / "run.json").write_text("{}")


def bad_line(text):
    def prepare(here):
        good = (here / "data.jsonl").read_text().splitlines()[0]
        (here / "bad.jsonl").write_text(f"{good}\n{text}\n")

    return prepare


def turn(role, content):
    return json.dumps({"conversations": [{"role": role, "content": content}]})


REFUSED = {
    "a directory for data": (["--data", "./base"], None, "base cannot be read"),
    "no data": (["--data", "none.jsonl"], None, r"no data file at none.jsonl; check the path"),
    "not JSON": (["--data", "bad.jsonl"], bad_line("{oops"), "bad.jsonl:2: not JSON"),
    "no conversations": (["--data", "bad.jsonl"], bad_line('{"a": 1}'), 'bad.jsonl:2: no "conver'),
    "role": (["--data", "bad.jsonl"], bad_line(turn("robot", "x")), "bad.jsonl:2: turn 1 has role"),
    "empty answer": (["--data", "bad.jsonl"], bad_line(turn("assistant", " ")), "says nothing"),
    "no base": (["--base", "nowhere"], None, "nowhere"),
    "base of another size": (["--dim", "128"], None, "--dim 128 does not fit the base base"),
    "base of another era": (["--base", "era.pth"], other_era, "2025-04"),
    "vocabulary too small": (["--base", "small"], small_tokenizer_model, "6400 entries.*only 100"),
    "no tokenizer": (["--tokenizer", "base"], None, "no tokenizer at base"),
    "target": (["--targets", "wx"], None, "the target 'wx'; did you mean"),
    "rank": (["--rank", "0"], None, "rank must be at least 1, got 0"),
    "dropout": (["--dropout", "1"], None, "dropout must be in"),
    "epochs": (["--epochs", "0"], None, "epochs must be an integer of at least 1"),
    "rate": (["--lr", "nan"], None, "lr must be a positive number"),
    "length": (["--max-length", "1"], None, "max_length must be at least 2"),
    "nothing to learn": (["--max-length", "5"], None, "raise max_length"),
    "output used": (["--out", "used"], other_run, "used holds another run; nothing"),
    "output a file": (["--out", "data.jsonl"], None, "exists and is not empty"),
    "device": (["--device", "tpu"], None, "device must be auto, cpu or cuda"),
    "dtype": (["--dtype", "int8"], None, "dtype must be auto, float32"),
    "resume nothing": (["--resume", "base"], None, "--resume takes its settings from the run"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused_with_a_message_and_nothing_written(here, capsys, case):
    options, prepare, message = REFUSED[case]
    if prepare:
        prepare(here)
    before = {p: p.read_bytes() for p in here.rglob("*") if p.is_file()}
    assert finetune(*options) == 2
    said = capsys.readouterr()
    assert said.err.startswith("minimind finetune: ") and "Traceback" not in said.err
    assert re.search(message, said.err), said.err
    assert said.out == ""
    assert {p: p.read_bytes() for p in here.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["finetune", "--resume", "base"], "has no run.json, there is nothing to resume"),
        (["chat", "--compare"], "--compare needs an adapter"),
        (["chat", "--base", "base", "--lora", "no.pth"], "no adapter file at no.pth"),
        (["chat", "--base", "base", "--temperature", "-1"], "temperature must be at least 0"),
        (["chat", "--base", "base", "--top-p", "0"], "top_p in"),
        (["chat", "--base", "base", "--max-new-tokens", "0"], "at least 1"),
        (["merge", "--out", "m"], "merge needs an adapter"),
        (["merge", "--base", "base", "--lora", "x.pth", "--out", "base"], "not empty"),
        (["info", "nothing"], "nothing"),
        (["info", "data.jsonl"], "data.jsonl"),
    ],
)
def test_other_commands_refuse_too(here, capsys, arguments, message):
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert message in said.err and said.err.startswith(f"minimind {arguments[0]}: ")


def test_a_loss_that_is_not_finite_stops_the_run(here, capsys):
    assert finetune("--out", "o", "--lr", "1e30", "--epochs", "5", "--grad-clip", "0") == 2
    assert "lower lr" in capsys.readouterr().err
    assert not (here / "o" / "adapter.safetensors").exists()


def test_an_adapter_of_another_model_is_refused(here, capsys):
    assert finetune("--out", "o") == 0
    torch.manual_seed(0)
    save_model(MiniMindLM(LMConfig(**{**SIZES, "dim": 32})), here / "thin", torch.float32)
    capsys.readouterr()
    assert main(["chat", "--base", "thin", "--lora", "o/adapter.safetensors"]) == 2
    assert "expected [16, 32], found [16, 64]" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["finetune", "sft", "chat", "merge", "info"])
def test_help_is_there(capsys, command):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"usage: minimind {command}" in capsys.readouterr().out


def test_the_walkthroughs_options_are_all_there(capsys):
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    said = capsys.readouterr().out
    names = """data out base tokenizer epochs batch-size lr warmup-steps accumulation-steps
        grad-clip max-length rank alpha dropout targets device dtype num-workers log-interval
        save-interval seed resume dim n-layers use-moe"""
    for name in names.split():
        assert f"--{name} " in said, name


def test_lora_state_is_all_that_changes(here):
    assert finetune("--out", "o") == 0
    model = load_model(here / "base")
    before = {name: p.clone() for name, p in model.named_parameters()}
    load_lora(model, here / "o" / "adapter.safetensors")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert any(t.abs().max() > 0 for n, t in lora_state_dict(model).items() if ".B." in n)
