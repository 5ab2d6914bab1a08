"""The parts of a block that know nothing of attention: linear maps, embeddings, norms and the feed-forward.

No module here draws its own weights: construction leaves memory unwritten (or on the meta device, or sharded), and
initial.py fills each parameter from its name. Shape letters: B batch, T tokens, D hidden size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig


class Linear(nn.Linear):
    """torch's linear map without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the weights to initial.py."""


class Embedding(nn.Embedding):
    """torch's table without its own initial values."""

    def reset_parameters(self) -> None:
        """Leave the weights to initial.py."""


class Norm(nn.Module):
    """RMSNorm (arXiv:1910.07467) or LayerNorm over the last dimension, computed in fp32 whatever the input's type."""

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
        """A norm of the residual stream."""
        return cls(config.norm, config.hidden_size, eps=config.norm_eps, scale=config.norm_scale, bias=config.norm_bias)


class MLP(nn.Module):
    """The feed-forward: down(act(gate x) * up x) for the gated kinds, down(act(up x)) for the others.

    GELU is the tanh approximation, as in GPT-2, T5 1.1 and Gemma.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind = config.mlp
        inner, outer, bias = shape.mlp_size(config), config.hidden_size, config.mlp_bias
        self.gate = Linear(outer, inner, bias=bias) if config.mlp in shape.GATED else None
        self.up = Linear(outer, inner, bias=bias)
        self.down = Linear(inner, outer, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, T, D] to [B, T, D]."""
        if self.gate is None:
            hidden = self.up(x)
            return self.down(F.relu(hidden).square() if self.kind == "relu2" else F.gelu(hidden, approximate="tanh"))
        gate = self.gate(x)
        gate = F.silu(gate) if self.kind == "swiglu" else F.gelu(gate, approximate="tanh")
        return self.down(gate * self.up(x))
