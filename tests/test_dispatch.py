"""Which path a call takes, and that asking by name never falls back."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

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


# A GPU as the policy sees it: tensors that say cuda, and a capability.
@pytest.fixture
def gpu(monkeypatch):
    def of(capability=(9, 0), hip=None, triton=True):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _=None: capability)
        dispatch.capability_of.cache_clear()
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(dispatch, "TRITON_INSTALLED", triton)

    of()
    with FakeTensorMode():
        yield of
    dispatch.capability_of.cache_clear()


def on_gpu(rank=4, **dtypes):
    shapes = {"x": (2, 16), "weight": (8, 16), "lora_a": (rank, 16), "lora_b": (8, rank)}
    return [
        torch.empty(shape, device="cuda", dtype=dtypes.get(name, torch.bfloat16))
        for name, shape in shapes.items()
    ]


def test_a_gpu_takes_triton(gpu):
    assert explain(on_gpu()) == "triton: the kernels serve torch.bfloat16 on cuda:0"
    wide = on_gpu(lora_a=torch.float32, lora_b=torch.float32)
    assert dispatch.choose(*wide).backend == "triton"
    with use_backend("reference"):
        assert dispatch.choose(*wide).backend == "reference"


@pytest.mark.parametrize(
    ("machine", "tensors", "reason"),
    [
        ({"capability": (7, 5)}, {}, "the GPU's compute capability is 7.5, the kernels need 8.0"),
        ({"hip": "6.4"}, {}, "this torch is built for ROCm"),
        ({"triton": False}, {}, "triton is not installed"),
        ({}, {"x": torch.float64}, "a tensor is torch.float64"),
        ({}, {"lora_b": torch.float64}, "a tensor is torch.float64"),
        ({}, {"rank": 513}, "the rank is 513, the kernels take up to 512"),
    ],
)
def test_what_triton_does_not_serve_goes_to_the_reference_and_says_why(
    gpu, machine, tensors, reason
):
    gpu(**machine)
    call = on_gpu(**tensors)
    assert dispatch.choose(*call).backend == "reference"
    assert reason in explain(call)
    with use_backend("triton"), pytest.raises(RuntimeError, match="Triton cannot serve this call"):
        dispatch.choose(*call)


def test_a_subclass_with_storage_of_its_own_goes_to_the_reference():
    tensor = TwoTensor(torch.randn(2, 2), torch.randn(2, 2))
    assert "TwoTensor, the kernels take plain" in dispatch._tensor_refusal([tensor], 1)
