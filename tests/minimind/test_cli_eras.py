"""The `minimind` command on the models and adapters of other eras."""

from __future__ import annotations

import re

import pytest
from places import GOLDEN, ORIGINAL
from tiny_cli import finetune, make_base

from minimind.cli import main
from minimind.data.tokenizer import load_tokenizer, save_tokenizer
from minimind.model.eras import ERAS


@pytest.fixture(params=["2025-04", "2026-03"])
def later(here, request):
    """A base of a later era with a tokenizer beside it."""
    make_base(here / "base", era=request.param)
    save_tokenizer(load_tokenizer(), here / "base")
    return request.param


@pytest.mark.parametrize("targets", [[], ["--targets", "v_proj,down_proj"]])
def test_finetune_chat_merge_and_info_take_a_later_era(here, later, targets, capsys):
    assert finetune("--out", "o", "--save-interval", "5", *targets) == 0
    said = capsys.readouterr().out
    parts = ["self_attn.v_proj", "mlp.down_proj"] if targets else ["self_attn.q_proj"]
    assert all(f"apply lora on module: model.layers.0.{part}" in said for part in parts)
    assert f"base        base ({later}, dim 64, 1 layers)" in said
    assert "tokenizer   shipped" not in said
    adapter = "o/adapter.safetensors"
    before, after = re.search(r"held-out loss +([\d.]+) -> +([\d.]+)", said).groups()
    assert float(after) < float(before)
    assert main(["info", adapter]) == 0
    assert "of a MiniMind of 2025-04 or 2026-03" in capsys.readouterr().out
    assert main(["chat", "--base", "base", "--lora", adapter, "--compare", "--prompt", "Hi"]) == 0
    assert "lora> " in capsys.readouterr().out
    assert main(["merge", "--base", "base", "--lora", adapter, "--out", "m"]) == 0
    capsys.readouterr()
    assert main(["info", "m"]) == 0
    said = capsys.readouterr().out
    assert f"MiniMind {later} model m" in said and "not in the file" not in said
    assert main(["chat", "--base", "m", "--prompt", "Hi"]) == 0


def test_a_shipped_tokenizer_that_stands_in_is_said(here, capsys):
    assert finetune("--out", "o") == 0
    said = capsys.readouterr().out
    line = "  tokenizer   shipped: none beside the base (--tokenizer names another)\n"
    assert f"(dim 64, 1 layers)\n{line}  data  " in said


def test_sft_goes_on_from_a_later_era(here, later, capsys):
    assert main(
        ["sft", "--base", "base", "--data", "data.jsonl", "--epochs", "1", "--out", "m",
         "--dtype", "float32"]
    ) == 0  # fmt: skip
    capsys.readouterr()
    assert main(["info", "m"]) == 0
    assert f"MiniMind {later} model m" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["tokenizer-2025-02", "tokenizer-2026-03"])
def test_the_originals_tokenizers_are_taken_by_name(here, name, capsys):
    if not (ORIGINAL / name).is_dir():
        pytest.skip("the original's tokenizers are not here")
    era = name.removeprefix("tokenizer-")
    make_base(here / "base", era=era)
    assert finetune("--out", "o", "--tokenizer", str(ORIGINAL / name)) == 0
    assert main(["export", "x", "--base", "base", "--tokenizer", str(ORIGINAL / name)]) == 0
    assert main(["chat", "--base", "x", "--prompt", "Hi", "--max-new-tokens", "4"]) == 0


@pytest.mark.parametrize("era", ERAS)
def test_info_says_the_era_and_what_no_file_told(era, tmp_path, capsys):
    weights = tmp_path / "a.safetensors"
    make_base(tmp_path / "made", era=era, dim=64, n_heads=8, n_kv_heads=2 if era < "2026" else 4)
    (tmp_path / "made" / "model.safetensors").rename(weights)
    assert main(["info", str(weights)]) == 0
    said = capsys.readouterr().out
    assert f"MiniMind {era} model" in said
    assumed = said.partition("not in the file, taken as usual then: ")[2]
    assert "rope_theta 1000000.0" in assumed and ("n_heads 8" in assumed) == (era < "2026")


@pytest.mark.parametrize(
    ("era", "words"), [("2025-02", "of 2025-02\n"), ("2026-03", "of 2025-04 or 2026-03\n")]
)
def test_info_says_which_models_an_adapter_may_be_for(era, words, capsys):
    assert main(["info", str(GOLDEN / f"minimind-{era}-dense.lora.pth")]) == 0
    assert f"on 4 modules of a MiniMind {words}" in capsys.readouterr().out


def test_an_adapter_of_another_era_is_refused_by_chat_and_merge(here, later, capsys):
    adapter = str(GOLDEN / "minimind-2025-02-dense.lora.pth")
    for command in (["chat", "--prompt", "Hi"], ["merge", "--out", "m"]):
        assert main([*command, "--base", "base", "--lora", adapter]) == 2
        assert f"MiniMind of 2025-02, the base is of {later}" in capsys.readouterr().err
    assert not (here / "m").exists()
