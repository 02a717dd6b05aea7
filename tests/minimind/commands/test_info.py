"""`minimind info`."""

from __future__ import annotations

from tiny_cli import finetune

from minimind.cli import main


def test_info(here, capsys):
    assert finetune("--out", "o", "--rank", "4", "--alpha", "2") == 0
    capsys.readouterr()
    assert main(["info"]) == 0
    assert "path          reference: x is on cpu" in capsys.readouterr().out
    assert main(["info", "base"]) == 0
    assert "dim 64, 1 layers, 2 heads, 1 key-value heads" in capsys.readouterr().out
    for path in ("o/adapter.safetensors", "o"):
        assert main(["info", path]) == 0
        said = capsys.readouterr().out
        assert "LoRA adapter o/adapter.safetensors: 1,024 parameters on 2 modules" in said
        assert "layers.0.attention.wq: rank 4, scale 0.5, float32" in said
