"""The keep mask: Philox by its published vectors, the kernels' bits by their torch twin."""

from __future__ import annotations

import needs_triton  # noqa: F401 - skips this file without it
import pytest
import torch
from kernel_cases import DEVICES, seed_of

from lora_kernels.kernels import dropout
from lora_kernels.kernels.dropout import (
    draw_seed,
    keep_mask,
    keep_threshold,
    pack_bits,
    philox,
    unpack_bits,
)
from lora_kernels.kernels.tuning import Config
from lora_kernels.linear.xa import compute_xa

# Known answers of Random123 (Salmon et al.) for philox4x32: rounds, seed, counter word, result.
KNOWN = [
    (7, 0, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (10, 0, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, -1, 0xFFFFFFFF, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
]


@pytest.mark.parametrize(("rounds", "seed", "word", "result"), KNOWN)
def test_philox_gives_the_published_answers(rounds, seed, word, result):
    counter = torch.full((4, 1), word, dtype=torch.int64)
    assert philox(seed_of(seed, "cpu"), counter, rounds).flatten().tolist() == result


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.99])
@pytest.mark.parametrize(("m", "k"), [(1, 1), (17, 127), (40, 256)], ids=str)
def test_the_kernel_draws_what_its_twin_draws(m, k, dropout_p, device, poisoned):
    seed = seed_of(2**62 + 12345678901, device)
    x, lora_a = torch.randn(m, k, device=device), torch.randn(3, k, device=device)
    _, bits = compute_xa(x, lora_a, seed, dropout_p, config=Config(16, 0, 64))
    keep = keep_mask(seed, m, k, dropout_p)
    assert bits.dtype == torch.uint8 and bits.shape == (m, (k + 7) // 8)
    assert torch.equal(unpack_bits(bits, k), keep)


def test_rows_columns_and_seeds_differ_and_a_seed_repeats():
    keep = keep_mask(seed_of(1, "cpu"), 64, 64, 0.5)
    assert torch.equal(keep, keep_mask(seed_of(1, "cpu"), 64, 64, 0.5))
    assert len({tuple(row) for row in keep.tolist()}) == 64
    assert len({tuple(column) for column in keep.t().tolist()}) == 64
    for seed in (2, 1 + 2**32):  # the low and the high word of the key both count
        assert not torch.equal(keep, keep_mask(seed_of(seed, "cpu"), 64, 64, 0.5))


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 0.9])
def test_the_share_kept_is_the_share_asked_for(dropout_p):
    keep = keep_mask(seed_of(3, "cpu"), 1000, 1000, dropout_p)
    # Five standard deviations of a binomial over a million.
    bound = 5 * (dropout_p * (1 - dropout_p) / 1e6) ** 0.5
    assert abs(keep.double().mean().item() - (1 - dropout_p)) < bound
    lanes = keep.view(1000, -1, 8).double().mean((0, 1))
    assert (lanes - (1 - dropout_p)).abs().max() < bound * 8**0.5


def test_the_threshold_is_never_everything():
    assert keep_threshold(0.0) == 0 and keep_threshold(0.5) == 32768
    assert keep_threshold(1 - 1e-9) == 65535


def test_packing_returns():
    keep = torch.rand(5, 19) > 0.4
    bits = pack_bits(keep)
    assert bits.shape == (5, 3) and torch.equal(unpack_bits(bits, 19), keep)
    assert bits[0, 0].item() == sum(int(b) << i for i, b in enumerate(keep[0, :8].tolist()))


@pytest.mark.parametrize("shape", [(1, 1), (3, 8), (5, 19), (4, 64)], ids=str)
@pytest.mark.parametrize("where", ["alone", "inside", "transposed"])
def test_bits_are_the_same_by_words_and_by_sums(shape, where, monkeypatch):
    """Of a mask wherever it lies: words of eight bytes begin at multiples of eight."""
    rows, cols = shape
    keep = (torch.rand(rows * cols + 3) > 0.4)[3:].view(shape)
    keep = {"alone": keep.clone(), "inside": keep, "transposed": keep.t().contiguous().t()}[where]
    bits = pack_bits(keep)
    assert torch.equal(unpack_bits(bits, cols), keep)
    monkeypatch.setattr(dropout, "_by_words", lambda tensor: False)
    assert torch.equal(pack_bits(keep), bits) and torch.equal(unpack_bits(bits, cols), keep)


def test_a_seed_follows_the_generator():
    torch.manual_seed(11)
    first, second = draw_seed(torch.device("cpu")), draw_seed(torch.device("cpu"))
    torch.manual_seed(11)
    assert torch.equal(first, draw_seed(torch.device("cpu"))) and not torch.equal(first, second)
