"""A mixture of experts in place of a block's feed-forward.

Shape letters: B batch, T tokens, D hidden size, E experts, F inner width of one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.layers import ACTIVATIONS, MLP, Linear


class Routing(NamedTuple):
    """Where the tokens of a batch went."""

    counts: Tensor
    """fp32 [E], or [layers, E] of a stack: tokens sent to each expert."""
    balance: Tensor
    """fp32 scalar with a gradient: 1 where the load is even (arXiv:2101.03961, equation 4)."""
    z: Tensor
    """fp32 scalar with a gradient: mean squared log-partition of the router (arXiv:2202.08906)."""

    @classmethod
    def of_stack(cls, layers: Sequence[Routing]) -> Routing:
        """Counts of all layers [L, E], and the means of the others."""
        counts, balance, z = (torch.stack(parts) for parts in zip(*layers, strict=True))
        return cls(counts, balance.mean(), z.mean())


class Experts(nn.Module):
    """Each token goes to `num_active` of the experts, none is dropped; all go to the shared expert, if there is one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        settings, outer, inner = config.experts, config.hidden_size, shape.expert_size(config)
        count = settings.num_experts
        self.kind, self.settings = config.mlp, settings
        self.router = Linear(outer, count, bias=False)
        self.gate = nn.Parameter(torch.empty(count, inner, outer)) if config.mlp in shape.GATED else None
        self.up = nn.Parameter(torch.empty(count, inner, outer))
        self.down = nn.Parameter(torch.empty(count, outer, inner))
        self.shared = MLP(config, settings.shared_size) if settings.shared_size else None
        self.shared_gate = Linear(outer, 1, bias=False) if settings.shared_size and settings.shared_gate else None

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """Map x [B, T, D] to [B, T, D]."""
        tokens = x.flatten(0, 1)  # N D
        scores = F.linear(tokens.float(), self.router.weight.float())  # N E
        probabilities = scores.softmax(dim=-1)
        weights, chosen = probabilities.topk(self.settings.num_active, dim=-1)  # N k
        if self.settings.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        result = torch.zeros_like(tokens)
        for expert in range(self.settings.num_experts):
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            result = result.index_add(
                0, rows, (self._expert(tokens[rows], expert) * weights[rows, places, None]).to(x.dtype)
            )
        if self.shared is not None:
            shared = self.shared(tokens)
            result = result + (shared if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * shared)
        counts = torch.bincount(chosen.flatten(), minlength=self.settings.num_experts).float()
        balance = self.settings.num_experts * (counts / counts.sum() * probabilities.mean(dim=0)).sum()
        routing = Routing(counts, balance, scores.logsumexp(dim=-1).square().mean())
        return result.view_as(x), routing

    def _expert(self, x: Tensor, expert: int) -> Tensor:
        activation, up = ACTIVATIONS[self.kind], F.linear(x, self.up[expert])
        hidden = activation(up) if self.gate is None else activation(F.linear(x, self.gate[expert])) * up
        return F.linear(hidden, self.down[expert])
