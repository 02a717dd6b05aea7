"""Norm, rotary positions and the mask of attention."""

from __future__ import annotations

import torch
from tiny_minimind import one_thread  # noqa: F401 - acts by itself

from minimind.model.layers import RMSNorm, attention_pattern, rotary_angles, rotate_pairs


def test_rotary_is_a_complex_product():
    positions = torch.tensor([[0, 1, 7, 500], [3, 3, 0, 47]])
    x = torch.randn(2, 4, 3, 10)
    ours = rotate_pairs(x, *rotary_angles(positions, 10, 1e4))
    for b in range(2):
        for s in range(4):
            for p in range(5):
                turn = torch.polar(
                    torch.ones((), dtype=torch.float64),
                    torch.tensor(positions[b, s].item() * 1e4 ** (-2 * p / 10)).double(),
                )
                pair = torch.view_as_complex(x[b, s, :, 2 * p : 2 * p + 2].double().contiguous())
                theirs = torch.view_as_real(pair * turn).float()
                torch.testing.assert_close(
                    ours[b, s, :, 2 * p : 2 * p + 2], theirs, atol=1e-4, rtol=0
                )


def test_later_rotary_turns_the_halves_of_a_head():
    positions, x = torch.tensor([[0, 1, 7, 500]]), torch.randn(1, 4, 3, 10)
    cos, sin = rotary_angles(positions, 10, 1e4)
    ours = rotate_pairs(x, cos, sin, interleaved=False)
    for p in range(5):
        pair = torch.stack((x[..., p], x[..., p + 5]), dim=-1)
        turned = rotate_pairs(pair, cos[..., p : p + 1], sin[..., p : p + 1])
        assert torch.equal(ours[..., [p, p + 5]], turned)


def test_rotary_angles_need_no_table_and_keep_float32():
    cos, sin = rotary_angles(torch.tensor([[9]]), 8, 1e6)
    assert cos.dtype == sin.dtype == torch.float32 and cos.shape == (1, 1, 1, 4)
    half = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)
    assert rotate_pairs(half, cos, sin).dtype == torch.bfloat16


def test_rms_norm_divides_in_float32():
    norm = RMSNorm(6, 1e-3)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    x = torch.randn(2, 3, 6)
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt() * norm.weight
    torch.testing.assert_close(norm(x), expected)
    big = torch.full((1, 6), 300.0, dtype=torch.float16)  # its square overflows float16
    torch.testing.assert_close(norm.half()(big), norm.weight[None])


def test_no_mask_is_built_where_the_causal_kernel_will_do():
    cpu = torch.device("cpu")
    assert attention_pattern(None, 5, 0, cpu) == (None, True)
    assert attention_pattern(torch.ones(2, 5), 5, 0, cpu) == (None, True)
    assert attention_pattern(torch.ones(2, 6), 1, 5, cpu) == (None, False)
    mask, is_causal = attention_pattern(None, 2, 3, cpu)
    assert not is_causal
    assert mask.tolist() == [[True] * 4 + [False], [True] * 5]
    padded, _ = attention_pattern(torch.tensor([[0, 0, 1], [0, 0, 0]]), 3, 0, cpu)
    assert padded.any(-1).all()  # softmax over an empty row is NaN on some backends
    assert padded[0, 0, 2].tolist() == [False, False, True]
