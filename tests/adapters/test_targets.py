"""Which modules a configuration means."""

from __future__ import annotations

import pytest
from tiny_model import Model

from lora_kernels import LoRAConfig, LoRALinear, apply_lora


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
