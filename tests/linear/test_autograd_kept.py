"""What `lora_linear` keeps for backward: what the gradients asked for will read, and no more."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import PATHS, Case, make

from lora_kernels import lora_linear, use_backend

NAMES = ("x", "weight", "lora_a", "lora_b", "bias")
M, N, K, R = 40, 24, 16, 4
XA, MASK, BITS = 4 * M * R, M * K, M * K // 8

# Trained tensors, and the names of those whose values are kept; "xa" and "mask" are not inputs.
KEPT = {
    ("x", "lora_a", "lora_b"): {"x", "weight", "lora_a", "lora_b", "xa", "mask"},
    ("x", "lora_b"): {"weight", "lora_a", "lora_b", "xa", "mask"},  # LoRA-FA
    ("x", "lora_a"): {"x", "weight", "lora_a", "lora_b", "mask"},  # MiCA the other way round
    ("x",): {"weight", "lora_a", "lora_b", "mask"},
    ("lora_a", "lora_b"): {"x", "lora_b", "xa", "mask"},  # the first layer of a model
    ("lora_b",): {"xa"},
    ("lora_a",): {"x", "lora_b", "mask"},
    ("bias",): set(),
    ("weight",): {"x"},
    ("weight", "lora_b"): {"x", "xa"},
}


def call(made, dropout_p=0.0):
    return lora_linear(*made[:5], dropout_p=dropout_p, training=True)


def inputs_of(device, subset):
    made = make(Case(M, N, K, R), torch.float32, device)
    for name, tensor in zip(NAMES, made[:5], strict=True):
        tensor.requires_grad_(name in subset)
    return made


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("subset", KEPT, ids="+".join)
def test_bytes_kept(subset, dropout_p, device, backend):
    made = inputs_of(device, subset)
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call(made, dropout_p)
    sizes = {n: t.numel() * t.element_size() for n, t in zip(NAMES, made[:5], strict=True)}
    sizes["xa"] = XA
    sizes["mask"] = 0 if not dropout_p else BITS if backend == "triton" else MASK
    expected = sorted(size for name in KEPT[subset] if (size := sizes[name]))
    assert sorted(seen.values()) == expected


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("subset", [s for s in KEPT if "x" not in KEPT[s]], ids="+".join)
def test_what_is_not_kept_may_change(subset, dropout_p, device, backend):
    """In place, after the forward: the gradients are those of the values that it saw."""
    results = []
    for spoil in (False, True):
        torch.manual_seed(3)
        made = inputs_of(device, subset)
        x = made.x.clone() if "x" in subset else made.x  # a leaf cannot change in place
        with use_backend(backend):
            y = lora_linear(x, *made[1:5], dropout_p=dropout_p, training=True)
            if spoil:
                with torch.no_grad():
                    x.fill_(float("nan"))
            y.square().sum().backward()
        results.append([t.grad for t in made[:5] if t.requires_grad])
    for kept, spoilt in zip(*results, strict=True):
        assert torch.equal(kept, spoilt) and kept.any()


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("subset", KEPT, ids="+".join)
def test_the_gradients_are_those_of_all(subset, dropout_p, device, backend):
    with use_backend(backend):
        results = []
        for trained in (subset, NAMES):
            torch.manual_seed(3)
            made = inputs_of(device, trained)
            torch.manual_seed(4)
            call(made, dropout_p).backward(made.dy)
            results.append({n: t.grad for n, t in zip(NAMES, made[:5], strict=True)})
    for name in subset:
        torch.testing.assert_close(results[0][name], results[1][name])
