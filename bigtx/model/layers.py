"""The parts of a block besides attention: linear maps, embeddings, norms and the feed-forward.

No module here initializes its own weights: construction leaves memory unwritten (or on the meta device, or sharded),
and initial.py fills each parameter from its name. Shape letters: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig


class Linear(nn.Linear):
    """torch's linear map without its own initial values.

    Attributes:
        adapter: the adapter that adds to its product, if any (see lora.py).
    """

    def __init__(self, num_inputs: int, num_outputs: int, *, bias: bool = True) -> None:
        super().__init__(num_inputs, num_outputs, bias=bias)
        self.adapter: nn.Module | None = None

    def reset_parameters(self) -> None:
        """Leave the weights to initial.py."""

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Map x [..., inputs] to [..., outputs].

        Args:
            seeds: int64 [B] of the rows of x, the seeds of an adapter's dropout; None: no dropout.
        """
        product = super().forward(x)
        return product if self.adapter is None else product + self.adapter(x, seeds)


class Embedding(nn.Embedding):
    """torch's table without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the weights to initial.py."""


class Bigrams(nn.Module):
    """Embeddings of pairs of adjacent tokens (over-encoding, arXiv:2501.16975).

    Attributes:
        table: rows that are shared by all pairs with the same hash.
        widen: the map from the rows to the width of the embeddings, if they are narrower.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        size = shape.bigram_size(config)
        self.table = Embedding(config.bigram_rows, size)
        self.widen = None if size == config.hidden_size else Linear(size, config.hidden_size, bias=False)

    def forward(self, tokens: Tensor, before: Tensor) -> Tensor:
        """Return the embeddings [B, T, D] of int64 tokens [B, T] and the previous tokens, -1 where a text begins."""
        x = self.table(hashed_pairs(before, tokens, self.table.num_embeddings))
        return x if self.widen is None else self.widen(x)


def hashed_pairs(before: Tensor, tokens: Tensor, num_rows: int) -> Tensor:
    """Hash pairs of ids to rows. Each id is at least -1 and below 2**24: multiplicative hashing (Knuth, TAOCP 3,
    section 6.4).
    """
    mixed = (before + 1) * 0x9E3779B1 + tokens * 0x85EBCA77
    return (mixed & 0xFFFFFFFF) * num_rows >> 32


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension, computed in fp32 for any type of input."""

    def __init__(self, kind: str, size: int, *, eps: float, scale: bool, bias: bool = False) -> None:
        super().__init__()
        self.kind = kind
        self.shape = (size,)
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(size)) if scale else None
        self.bias = nn.Parameter(torch.empty(size)) if bias and kind == "layer" else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalize x [..., size]; the result has x's type."""
        weight = None if self.weight is None else self.weight.float()
        if self.kind == "rms":
            return F.rms_norm(x.float(), self.shape, weight, self.eps).to(x.dtype)
        bias = None if self.bias is None else self.bias.float()
        return F.layer_norm(x.float(), self.shape, weight, bias, self.eps).to(x.dtype)

    @classmethod
    def of(cls, config: ModelConfig) -> Norm:
        """Return a norm of the residual stream."""
        return cls(config.norm, config.hidden_size, eps=config.norm_eps, scale=config.norm_scale, bias=config.norm_bias)


_tanh_gelu = functools.partial(F.gelu, approximate="tanh")


def squared_relu(x: Tensor) -> Tensor:
    """Return max(x, 0) ** 2 (arXiv:2109.08668)."""
    return F.relu(x).square()


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": _tanh_gelu,
    "gelu": F.gelu,
    "gelu_tanh": _tanh_gelu,
    "relu": F.relu,
    "relu2": squared_relu,
}
"""The activation of each kind of feed-forward; in a gated one it is applied to the gate."""


class MLP(nn.Module):
    """The feed-forward: down(act(gate x) * up x) for the gated kinds, down(act(up x)) for the others."""

    def __init__(self, config: ModelConfig, size: int | None = None) -> None:
        """Args: size: the inner width, if it differs from that of the config."""
        super().__init__()
        self.kind = config.mlp
        inner, outer, bias = size or shape.mlp_size(config), config.hidden_size, config.mlp_bias
        self.gate = Linear(outer, inner, bias=bias) if config.mlp in shape.GATED else None
        self.up = Linear(outer, inner, bias=bias)
        self.down = Linear(inner, outer, bias=bias)

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Map x [B, T, D] to [B, T, D]; `seeds` as in `Linear`."""
        activation = ACTIVATIONS[self.kind]
        if self.gate is None:
            return self.down(activation(self.up(x, seeds)), seeds)
        return self.down(activation(self.gate(x, seeds)) * self.up(x, seeds), seeds)
