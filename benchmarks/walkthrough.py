"""MiniMind's fine-tuning as its LoRA walk-through has it, written out as the rival.

Every square linear's forward is replaced by one that adds ``B(A(x))``; every sample is padded to
512 tokens; the logits of all positions are computed and most of them masked away; float32 on a
CPU, bfloat16 autocast on a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from minimind import MiniMindLM
from minimind.data import SFTDataset
from minimind.training import learning_rate

MAX_LENGTH = 512


class PaddedDataset(Dataset):
    """``(X, Y, mask)``, each ``[511]``: Y is X one token on."""

    def __init__(self, samples: Sequence[tuple[Tensor, Tensor]], pad_token_id: int) -> None:
        self.samples, self.pad_token_id = samples, pad_token_id

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        ids, mask = self.samples[index]
        padding = MAX_LENGTH - len(ids)
        ids = nn.functional.pad(ids, (0, padding), value=self.pad_token_id)
        mask = nn.functional.pad(mask, (0, padding))
        return ids[:-1], ids[1:], mask[1:]


def add_branches(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Replace the forward of every square linear; returns the factors, A before B."""
    factors = []
    for module in list(model.modules()):
        if isinstance(module, nn.Linear) and module.in_features == module.out_features:
            width, device = module.in_features, module.weight.device
            a = nn.Linear(width, rank, bias=False, device=device)
            b = nn.Linear(rank, width, bias=False, device=device)
            nn.init.normal_(a.weight, std=0.02)
            nn.init.zeros_(b.weight)

            def forward(x: Tensor, a: Any = a, b: Any = b, plain: Any = module.forward) -> Tensor:
                return plain(x) + b(a(x))

            module.forward = forward  # type: ignore[method-assign]
            factors += [a.weight, b.weight]
    return factors


class WalkThrough:
    """The loop: one `run` is one epoch.

    Args:
        model: on ``device``; its square linears get branches, everything else is frozen.
        dataset: the samples.
        batch_size, rank, lr: as there.
        device: where.
    """

    def __init__(
        self,
        model: MiniMindLM,
        dataset: SFTDataset,
        batch_size: int,
        rank: int,
        lr: float,
        device: torch.device,
    ) -> None:
        model.requires_grad_(False)
        self.model, self.lr, self.device = model.train(), lr, device
        self.parameters = add_branches(model, rank)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=lr)
        padded = PaddedDataset(dataset.samples, dataset.pad_token_id)
        self.loader = DataLoader(padded, batch_size=batch_size)
        self.losses: list[float] = []

    def run(self) -> None:
        """Train an epoch, appending each step's loss to ``losses``."""
        cross_entropy = nn.CrossEntropyLoss(reduction="none")
        narrow: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if self.device.type == "cuda":
            narrow = torch.autocast("cuda", torch.bfloat16)
        total = len(self.loader)
        for step, batch in enumerate(self.loader, start=1):
            x, y, mask = (tensor.to(self.device) for tensor in batch)
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(step, total, self.lr)
            with narrow:
                result = self.model(x)
                losses = cross_entropy(result.logits.transpose(1, 2), y)
                loss = (losses * mask).sum() / mask.sum() + result.aux_loss
            loss.backward()
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(loss.item())
