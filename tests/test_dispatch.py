"""Which path a call takes, and that asking by name never falls back."""

from __future__ import annotations

import pytest
import torch

from lora_kernels import LoRALinear, dispatch, explain, use_backend


@pytest.fixture(autouse=True)
def _no_interpreter(monkeypatch):
    """As on a machine without a GPU that does not run Triton's interpreter."""
    monkeypatch.setattr(dispatch, "_interpreting", lambda: False)


def test_the_cpu_takes_the_reference_and_says_why():
    layer = LoRALinear(4, 4)
    for subject in (layer, torch.randn(2, 4), (torch.randn(2, 4), layer.weight)):
        assert explain(subject) == "reference: x is on cpu, the kernels run on cuda"


def test_a_backend_asked_for_by_name_raises_where_it_cannot_serve():
    layer, x = LoRALinear(4, 4), torch.randn(2, 4)
    with use_backend("triton"), pytest.raises(RuntimeError, match="x is on cpu"):
        layer(x)
    with use_backend("triton"):
        assert explain(layer).startswith("none: use_backend('triton') was asked for")
    with use_backend("reference"):
        assert explain(x) == "reference: asked for by use_backend"
        with use_backend("triton"), pytest.raises(RuntimeError):
            layer(x)
        assert explain(x).endswith("use_backend")  # the outer wish is back
    layer(x)


def test_the_choice_ends_with_the_block_even_on_an_error():
    with pytest.raises(KeyError), use_backend("triton"):
        raise KeyError
    LoRALinear(4, 4)(torch.randn(2, 4))


def test_unknown_names_list_the_known():
    with (
        pytest.raises(ValueError, match="one of triton, reference; got 'cuda'"),
        use_backend("cuda"),
    ):
        pass


def test_explain_refuses_what_it_cannot_judge():
    with pytest.raises(TypeError, match="module_or_tensors must be"):
        explain("cuda")
    with pytest.raises(ValueError, match="no floating-point parameter"):
        explain(torch.nn.ReLU())
