"""A mixture of experts in place of a block's feed-forward.

If torch has a kernel for all experts at once, nothing waits for the device; otherwise a loop over the experts waits.
Shape letters: B batch, T tokens, N tokens of all rows, D hidden size, E experts, k of them active, F inner width of
one, M = N k rows that are sorted by expert.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ExpertsConfig, ModelConfig
from bigtx.model.layers import ACTIVATIONS, MLP, Linear, operator


class Routing(NamedTuple):
    """The routing of the tokens of a batch: sums over tokens, so that those of several batches can be added."""

    counts: Tensor
    """fp32 [E], or [layers, E] of a stack: tokens sent to each expert."""
    probabilities: Tensor
    """fp32 like `counts`, with a gradient: the sum of the router's probabilities of each expert."""
    squares: Tensor
    """fp32 [1], or [layers, 1], with a gradient: squared log-partitions of the router."""

    @classmethod
    def of_stack(cls, layers: Sequence[Routing]) -> Routing:
        """Stack the routing of all layers."""
        return cls(*(torch.stack(parts) for parts in zip(*layers, strict=True)))

    def __add__(self, other: Routing) -> Routing:  # type: ignore[override]
        """Add the routing of the tokens of both."""
        return Routing(*(own + others for own, others in zip(self, other, strict=True)))

    def detach(self) -> Routing:
        """Return the numbers without a gradient."""
        return Routing(*(part.detach() for part in self))

    @property
    def balance(self) -> Tensor:
        """Return an fp32 scalar: 1 where the load is even (arXiv:2101.03961, equation 4), the mean over layers."""
        return imbalance(self.probabilities, shares_of(self.counts)) / self._num_tokens

    @property
    def z(self) -> Tensor:
        """Return an fp32 scalar: mean squared log-partition of the router (arXiv:2202.08906)."""
        return self.squares.mean() / self._num_tokens

    @property
    def _num_tokens(self) -> Tensor:
        """Return the number of tokens: the probabilities of a token sum to 1."""
        return self.probabilities.detach().sum(dim=-1).mean()


def shares_of(counts: Tensor) -> Tensor:
    """Return the share of the tokens that each expert had, fp32 like their counts [..., E]."""
    return counts / counts.sum(dim=-1, keepdim=True)


def imbalance(probabilities: Tensor, shares: Tensor | None) -> Tensor:
    """Return the balance times the number of tokens, from the summed probabilities [..., E] of tokens; the mean over
    layers.

    Args:
        shares: of the same shape, the share of the tokens of each expert; None: an even share.
    """
    if shares is None:
        return probabilities.sum(dim=-1).mean()
    return probabilities.shape[-1] * (shares * probabilities).sum(dim=-1).mean()


def routing_loss(routing: Routing, shares: Tensor | None, settings: ExpertsConfig) -> Tensor:
    """Return the loss of the routing of a batch, summed over its tokens.

    Args:
        shares: as in `imbalance`. With those of the batch itself, the loss of a global batch would depend on how it is
            cut: a balance is not a sum over tokens.
        settings: the weights of both losses.

    Returns:
        fp32 scalar with a gradient.
    """
    balance = imbalance(routing.probabilities, shares)
    return settings.balance_loss * balance + settings.router_z_loss * routing.squares.mean()


class Experts(nn.Module):
    """A mixture of experts: each token is sent to `num_active` of them, and to the shared one; none is dropped."""

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

    def forward(self, x: Tensor, is_text: Tensor | None = None, seeds: Tensor | None = None) -> tuple[Tensor, Routing]:
        """Map x [B, T, D] to [B, T, D].

        Args:
            is_text: bool [B, T], the tokens that are counted in the routing; None: all.
            seeds: as in `Linear`.
        """
        tokens = x.flatten(0, 1)  # N D
        scores = self._scores(tokens)  # N E
        probabilities = scores.softmax(dim=-1)
        weights, chosen = probabilities.topk(self.settings.num_active, dim=-1)  # N k
        if self.settings.normalize_weights:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        result, counts = self._chosen(tokens, weights, chosen)
        if self.shared is not None:
            shared = self.shared(x, seeds).flatten(0, 1)
            result = result + (shared if self.shared_gate is None else self.shared_gate(tokens).sigmoid() * shared)
        squares = scores.logsumexp(dim=-1, keepdim=True).square()  # N 1
        if is_text is not None:
            counted = is_text.flatten()[:, None].float()  # N 1
            probabilities, squares = probabilities * counted, squares * counted
            # Whole numbers, whose sum is exact in any order.
            counts = torch.zeros_like(counts).index_add(0, chosen.flatten(), counted.expand_as(chosen).flatten())
        return result.view_as(x), Routing(counts, probabilities.sum(dim=0), squares.sum(dim=0))

    def _scores(self, tokens: Tensor) -> Tensor:
        """Return the router's scores of experts, fp32 [N, E]: in 16 bits, the order of close experts would change by
        rounding.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            return F.linear(tokens.float(), self.router.weight.float())

    def _chosen(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weighted sum of the outputs of each token's experts.

        Args:
            tokens: [N, D].
            weights: fp32 [N, k].
            chosen: int64 [N, k], experts.

        Returns:
            [N, D] in the tokens' type, and how many tokens each expert had, fp32 [E].
        """
        count = self.settings.num_experts
        experts, order = chosen.flatten().sort(stable=True)  # N k, tokens of one expert together
        rows = order // self.settings.num_active
        # Not by bincount, which waits for the device to know the size of its own result.
        ends = torch.searchsorted(experts, torch.arange(count, device=experts.device), right=True)
        made = self._by_expert(tokens.index_select(0, rows), ends).float() * weights.flatten()[order, None]
        # fp32, so that a sum of many experts is rounded once.
        result = torch.zeros_like(tokens, dtype=torch.float32).index_add(0, rows, made)
        return result.to(tokens.dtype), ends.diff(prepend=ends.new_zeros(1)).float()

    def _by_expert(self, x: Tensor, ends: Tensor) -> Tensor:
        """Return each expert's feed-forward of its own rows of x [M, D]; those of expert e end before row ends[e]."""
        activation = ACTIVATIONS[self.kind]
        up = expert_products(x, self.up, ends)
        hidden = activation(up) if self.gate is None else activation(expert_products(x, self.gate, ends)) * up
        return expert_products(hidden, self.down, ends)


def expert_products(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply rows by the matrix of the expert that they belong to, in the type of autocast.

    Args:
        x: [M, inputs], sorted by expert.
        weights: [E, outputs, inputs].
        ends: int64 [E], the row before which each expert's rows end; the last one is M.

    Returns:
        [M, outputs].
    """
    device = x.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
    x, weights = x.to(dtype), weights.to(dtype)
    return F.grouped_mm(x, weights.mT, offs=ends.int()) if _has_kernel(weights) else _loop(x, weights, ends)


def _has_kernel(weights: Tensor) -> bool:
    """Return whether torch multiplies all experts at once: in bf16 on CUDA from compute capability 8 on, with rows of
    whole 16 bytes. Otherwise torch would loop too, and torch.compile refuses it.
    """
    return (
        weights.is_cuda
        and weights.dtype == torch.bfloat16
        and torch.cuda.get_device_properties(weights.device).major >= 8
        and weights.shape[1] % 8 == weights.shape[2] % 8 == 0
    )


# Operators of their own, so that torch.compile and selective checkpointing see one product and not a loop whose lengths
# depend on the data.


@operator("bigtx::expert_products")
def _loop(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply as `expert_products` does, one expert after another."""
    result = x.new_empty(x.shape[0], weights.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        torch.mm(x[start:end], weights[expert].t(), out=result[start:end])
    return result


@operator("bigtx::expert_outer_products")
def _loop_backward(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    """Return the gradient [E, outputs, inputs] of the weights, from that of the products [M, outputs] and x [M,
    inputs].
    """
    result = x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])
    for expert, (start, end) in enumerate(itertools.pairwise([0, *ends.tolist()])):
        torch.mm(grad[start:end].t(), x[start:end], out=result[expert])
    return result


@torch.library.register_fake(_loop)
def _(x: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weights.shape[1])


@torch.library.register_fake(_loop_backward)
def _(grad: Tensor, x: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(ends.shape[0], grad.shape[1], x.shape[1])


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    x, weights, ends = ctx.saved_tensors
    return _loop(grad, weights.mT, ends), _loop_backward(grad, x, ends), None


torch.library.register_autograd(_loop, _gradients, setup_context=_keep)
