"""A mixture of experts in place of a feed-forward layer.

Shapes: B sequences, S tokens, D width, E routed experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import LMConfig
from .layers import FeedForward, at_least_float32


class MoEGate(nn.Module):
    """Choose experts for each token and say how unevenly they are used."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.top_k = config.num_experts_per_tok
        # A single score, rescaled to sum to 1, is 1: then only the balancing loss trains the gate.
        fewest = 1 if config.structure.normalises_one else 2
        self.normalises = config.norm_topk_prob and self.top_k >= fewest
        self.alpha, self.seq_aux = config.aux_loss_alpha, config.seq_aux
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Route ``x [B, S, D]``; while training, also say how unevenly.

        The balancing loss is ``alpha · E · Σ_e (share of assignments to e) · (mean score of e)``
        (Switch Transformer, arXiv 2101.03961, equation 4); with ``seq_aux`` per sequence and then
        averaged (DeepSeek-V3, arXiv 2412.19437, section 2.1.2). Padding counts as tokens do.

        Returns:
            Chosen experts ``[B, S, top_k]`` int64, their weights in the same shape in float32, and
            the loss (float32 scalar), None in eval mode or when ``alpha`` is 0.
        """
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would turn near-ties over
            logits = F.linear(at_least_float32(x), at_least_float32(self.weight))
        scores = logits.softmax(dim=-1)  # [B, S, E]
        weights, chosen = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.normalises:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if not self.training or self.alpha == 0:
            return chosen, weights, None
        n_experts, over = scores.shape[-1], (1,) if self.seq_aux else (0, 1)
        assigned = F.one_hot(chosen, n_experts).sum(dim=-2).type_as(scores)
        share = assigned.mean(dim=over) / self.top_k
        loss = self.alpha * n_experts * (share * scores.mean(dim=over)).sum(dim=-1).mean()
        return chosen, weights, loss


class MoEFeedForward(nn.Module):
    """A weighted sum of the experts that the gate chose, plus those that every token visits."""

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.n_routed_experts))
        self.gate = MoEGate(config)
        shared = [FeedForward(config) for _ in range(config.n_shared_experts)]
        self.shared_experts: nn.Module | None = None
        if shared:
            self.shared_experts = (
                nn.ModuleList(shared) if config.structure.shared_list else shared[0]
            )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Map ``x [B, S, D]`` to the same shape; also the balancing loss (or None)."""
        chosen, weights, aux_loss = self.gate(x)
        tokens, chosen, weights = x.flatten(0, 1), chosen.flatten(0, 1), weights.flatten(0, 1)
        y = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            # An expert without tokens still runs, on no rows: its gradients are zeros, not None.
            # No token meets an expert twice, so the order of this sum is fixed on every device.
            rows, slots = (chosen == index).nonzero(as_tuple=True)
            part = expert(tokens[rows]) * weights[rows, slots, None]
            y = y.index_add(0, rows, part.type_as(y))
        y = y.view_as(x)
        if isinstance(self.shared_experts, nn.ModuleList):
            for expert in self.shared_experts:
                y = y + expert(x)
        elif self.shared_experts is not None:
            y = y + self.shared_experts(x)
        return y, aux_loss
