"""The keep mask of the LoRA branch's dropout.

Its randomness comes from torch's generator of the device, so `torch.manual_seed` fixes it and
activation checkpointing, which restores that generator, replays it. The plain path draws the mask
itself from the generator; the kernels draw one seed and make the mask from it with Philox4x32-7
while they read x, packed eight to a byte. `keep_mask` is the torch twin of what they draw, bit for
bit.

Source: Philox, Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.compiler import is_compiling

ROUNDS = 7
# Elements from which on drawing four at a time, which takes a few calls more, pays on a CPU.
_MANY = 4096


def draw_keep_mask(x: Tensor, dropout_p: float) -> Tensor:
    """Boolean of x's shape: true with probability ``1 - dropout_p``, independently per element.

    On a CPU the probability is taken to within 2⁻¹⁷ for all but few elements, as by the kernels.
    """
    if x.is_cpu and not is_compiling() and x.numel() >= _MANY:
        # Four elements of each number drawn: a quarter of the time of bernoulli_, which draws one
        # for each and is most of what dropout costs.
        words = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        lanes = words.view(torch.int16)[: x.numel()].view(x.shape)
        return lanes >= keep_threshold(dropout_p) - 2**15
    if x.device.type == "mps":  # of booleans it may have no bernoulli_
        return torch.rand(x.shape, device=x.device) >= dropout_p
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout_p)


def draw_seed(device: torch.device) -> Tensor:
    """One int64 ``[1]`` from torch's generator; it stays on the device, nothing waits for it."""
    return torch.randint(0, 2**63 - 1, (1,), dtype=torch.int64, device=device)


def keep_threshold(dropout_p: float) -> int:
    """The 16-bit number below which an element is dropped: ``dropout_p`` to within 2⁻¹⁷."""
    return min(round(dropout_p * 65536), 65535)


def keep_mask(seed: Tensor, rows: int, cols: int, dropout_p: float) -> Tensor:
    """The mask ``[rows, cols]`` that the kernels draw from ``seed``, boolean, on seed's device.

    Element ``8·j + i`` of row m is kept where the i-th 16-bit lane of ``philox(seed, (j, m, 0,
    0))`` is at least `keep_threshold`.
    """
    num_bytes = (cols + 7) // 8
    counter = torch.zeros(4, rows, num_bytes, dtype=torch.int64, device=seed.device)
    counter[0] = torch.arange(num_bytes, device=seed.device)
    counter[1] = torch.arange(rows, device=seed.device)[:, None]
    words = philox(seed, counter)  # [4, rows, num_bytes]
    lanes = torch.stack((words & 0xFFFF, words >> 16), dim=1)  # [4, 2, rows, num_bytes]
    keep = lanes.permute(2, 3, 0, 1).reshape(rows, 8 * num_bytes) >= keep_threshold(dropout_p)
    return keep[:, :cols]


def philox(seed: Tensor, counter: Tensor, rounds: int = ROUNDS) -> Tensor:
    """Philox4x32 of int64 ``counter [4, ...]`` of 32-bit words under a 64-bit ``seed [1]``."""
    mask = 0xFFFFFFFF
    key0, key1 = seed & mask, (seed >> 32) & mask
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        low0, high0 = _multiply(c0, 0xD2511F53)
        low2, high2 = _multiply(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ key0, low2, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + 0x9E3779B9) & mask, (key1 + 0xBB67AE85) & mask
    return torch.stack((c0, c1, c2, c3))


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """Low and high word of a 32×32-bit product, without leaving int64's positive range."""
    by_low, by_high = a * (constant & 0xFFFF), a * (constant >> 16)
    total_high = (by_low >> 16) + by_high  # of the product over 2¹⁶
    low = ((total_high & 0xFFFF) << 16) | (by_low & 0xFFFF)
    return low, total_high >> 16


def pack_bits(keep: Tensor) -> Tensor:
    """Boolean ``[M, K]`` to bytes ``[M, ceil(K / 8)]``, bit i of byte j being element 8·j + i."""
    rows, cols = keep.shape
    if cols % 8:
        keep = torch.nn.functional.pad(keep, (0, -cols % 8))
    if _by_words(keep):
        keep = keep.contiguous() if keep.storage_offset() % 8 == 0 else keep.clone().contiguous()
        # A product gathers the eight bytes' lowest bits in the highest byte; a twentieth of the
        # time that the sum below takes on a CPU, and an eighth of its memory.
        words = keep.view(torch.int64) * 0x0102040810204080
        return words.bitwise_right_shift_(56).to(torch.uint8)
    weights = 2 ** torch.arange(8, device=keep.device)
    return (keep.reshape(rows, -1, 8) * weights).sum(-1).to(torch.uint8)


def unpack_bits(bits: Tensor, cols: int) -> Tensor:
    """Bytes ``[M, ceil(cols / 8)]`` to boolean ``[M, cols]``."""
    if _by_words(bits):
        # Each byte eight times in a word, of which byte i keeps bit i and passes it to its lowest.
        words = (bits.to(torch.int64) * 0x0101010101010101).bitwise_and_(_DIAGONAL)
        words.add_(0x7F7F7F7F7F7F7F7F).bitwise_right_shift_(7).bitwise_and_(0x0101010101010101)
        return words.view(torch.bool)[:, :cols]
    lanes = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return ((bits[:, :, None] >> lanes) & 1).bool().flatten(1)[:, :cols]


_DIAGONAL = 0x8040201008040201 - 2**64  # bit i of byte i, as a signed number


def _by_words(tensor: Tensor) -> bool:
    """Whether eight bytes may be taken as one number, the first of them lowest."""
    return tensor.is_cpu and sys.byteorder == "little" and not is_compiling()
