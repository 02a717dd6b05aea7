"""End to end: MiniMind trained through the kernels and through plain torch, curve on curve."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F

from lora_kernels import apply_lora, lora_parameters, mark_only_lora_as_trainable, use_backend
from minimind.model.config import LMConfig
from minimind.model.transformer import MiniMindLM


def loss_curve(backend, device, *, steps, rank, rows, autocast=None, **sizes):
    """The losses of ``steps`` LoRA steps on fixed random tokens, and the adapter at the end."""
    torch.manual_seed(0)
    model = MiniMindLM(LMConfig(n_layers=2, **sizes))
    names = apply_lora(model, rank=rank, target_modules="all-linear", verbose=False)
    assert len(names) == 14
    mark_only_lora_as_trainable(model)
    model.to(device).train()
    tokens = torch.randint(3, model.config.vocab_size, rows).to(device)
    optimizer = torch.optim.AdamW(list(lora_parameters(model)), lr=5e-3)
    context = torch.autocast(device, autocast) if autocast else contextlib.nullcontext()
    losses = []
    with use_backend(backend):
        for _ in range(steps):
            with context:
                logits = model(input_ids=tokens).logits
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
    return torch.stack(losses).cpu()


@pytest.mark.interpreted
def test_a_few_steps_in_float32():
    sizes = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 61, "multiple_of": 16}
    options = {"steps": 4, "rank": 4, "rows": (2, 9), **sizes}
    kernels = loss_curve("triton", "cpu", **options)
    plain = loss_curve("reference", "cpu", **options)
    assert plain[-1] < plain[0] - 0.01  # it learns, so the adapters matter
    torch.testing.assert_close(kernels, plain, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fifty_steps_on_a_gpu(dtype):
    options = {"steps": 50, "rank": 16, "rows": (4, 256), "dim": 512, "vocab_size": 6400}
    truth = loss_curve("reference", "cuda", **options)
    assert truth[-1] < truth[0] - 1.0
    if dtype == torch.float32:
        torch.testing.assert_close(
            loss_curve("triton", "cuda", **options), truth, rtol=1e-3, atol=0
        )
        return
    kernels = loss_curve("triton", "cuda", autocast=dtype, **options)
    plain = loss_curve("reference", "cuda", autocast=dtype, **options)
    # The error budget, on whole curves: twice plain bfloat16's distance, plus one rounding.
    budget = 2 * (plain - truth).abs().max() + truth.max() * 2.0**-8
    assert (kernels - truth).abs().max() <= budget
