"""What `lora_feed_forward` keeps for backward, and what it holds at most."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from feed_forwards import SCALES, FeedForward
from kernel_cases import PATHS

from benchmarks.measure import peak_bytes
from lora_kernels import lora_feed_forward, lora_linear, use_backend
from lora_kernels.group import feed_forward_reference

M, K, HIDDEN, N = 40, 16, 72, 24
WIDE = 4 * M * HIDDEN
BITS = M * HIDDEN // 8


def kept_by(made, backend, dropout_p):
    """Bytes of what is kept besides x and the projections' tensors, of every storage once."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        made.ours(dropout_p=dropout_p)
    for tensor in made.inputs:
        seen.pop(tensor.untyped_storage().data_ptr(), None)
    return sorted(seen.values())


@pytest.mark.parametrize(("device", "backend"), PATHS)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_gate_and_up_and_nothing_else_of_their_width(dropout_p, device, backend):
    made = (
        FeedForward("all three", M, K, HIDDEN, N, torch.float32).to(torch.float32, device).train()
    )
    masks = [M * K // 8, BITS] if dropout_p else []
    thin = [4 * M * (2 + 3), 4 * M * 2]  # xa of gate and up, ha of down
    assert kept_by(made, backend, dropout_p) == sorted([*masks, *thin, WIDE, WIDE])


@pytest.mark.parametrize(("device", "backend"), PATHS)
def test_neither_for_the_last_factor_alone(device, backend):
    made = FeedForward("all three", M, K, HIDDEN, N, torch.float32).to(torch.float32, device)
    assert kept_by(made.train("lora_b2", "bias2"), backend, 0.0) == [4 * M * 2]


class Work:
    """Forward and backward of a feed-forward, to be measured."""

    def __init__(self, call, made):
        self.call, self.made = call, made

    def prepare(self):
        pass

    def context(self):
        return contextlib.nullcontext()

    def run(self):
        y = self.call(self.made)
        return y, torch.autograd.grad(y, self.trained(), torch.ones_like(y))

    def trained(self):
        return [t for t in self.made.inputs if t.requires_grad]


def three(made):
    weights, lora_as, lora_bs, _ = made.kinds()
    gate, up = (
        lora_linear(made.inputs[0], weights[i], lora_as[i], lora_bs[i], scale=SCALES[i])
        for i in (0, 1)
    )
    h = F.silu(gate) * up
    return lora_linear(h, weights[2], lora_as[2], lora_bs[2], scale=SCALES[2])


def whole(made):
    return lora_feed_forward(made.inputs[0], *made.kinds()[:3], scales=SCALES)


def test_the_peak_on_a_cpu_is_three_fifths_of_three_linears():
    """At the proportions of MiniMind's layers."""
    made = FeedForward("all three", 4096, 64, 176, 64, torch.float32)
    made.train(*(name for name in made.names if name == "x" or "lora" in name))
    device = torch.device("cpu")
    assert peak_bytes(Work(whole, made), device) < 0.6 * peak_bytes(Work(three, made), device)


def test_without_gradients_no_matrix_of_its_width_is_made_whole():
    made = FeedForward("all three", 8192, 8, 64, 8, torch.float32)
    with torch.no_grad():

        class Forward(Work):
            def run(self):
                return self.call(self.made)

        peak = peak_bytes(Forward(whole, made), torch.device("cpu"))
    assert peak < 0.6 * 4 * 8192 * 64


def test_pieces_are_of_nearly_equal_size(monkeypatch):
    monkeypatch.setattr(feed_forward_reference, "MOST_ROWS", 10)
    for rows in (0, 1, 10, 11, 20, 21, 99):
        slices = list(feed_forward_reference.pieces_of(rows))
        sizes = [len(range(rows)[one]) for one in slices]
        assert sum(sizes) == rows and max(sizes) <= 10 and max(sizes) - min(sizes) < len(sizes) + 1
