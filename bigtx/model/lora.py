"""Low-rank adapters (arXiv:2106.09685): y = W x + alpha / rank * B A x, where A and B are trained and W is fixed.

B is initialized with zeros, so new adapters do not change the output of a model. Which matrices have one depends on
the config only (see bigtx.config.shape), so an adapted model is built, saved and opened like any other. The adapter of
decoder.blocks.3.attention.query has the parameters ...query.adapter.a and ...query.adapter.b.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config.schema import LoraConfig, ModelConfig
from bigtx.config.shape import adapted_matrices, in_block
from bigtx.model.dropout import Dropout
from bigtx.model.layers import Linear


class Adapter(nn.Module):
    """The term that is added to a matrix's product: alpha / rank * B A x."""

    def __init__(self, config: LoraConfig, num_inputs: int, num_outputs: int, name: str) -> None:
        """Args: name: the name of the matrix within its block."""
        super().__init__()
        self.scale, self.dropout = config.alpha / config.rank, Dropout(config.dropout, f"adapter of {name}")
        self.a = nn.Parameter(torch.empty(config.rank, num_inputs))
        self.b = nn.Parameter(torch.empty(num_outputs, config.rank))

    def forward(self, x: Tensor, seeds: Tensor | None = None) -> Tensor:
        """Map x [..., inputs] to [..., outputs]; `seeds` as in `Linear`."""
        return F.linear(F.linear(self.dropout(x, seeds), self.a), self.b) * self.scale


def add_adapters(model: nn.Module, config: ModelConfig) -> None:
    """Add adapters to the matrices that the config names."""
    for name in adapted_matrices(config):
        matrix = model.get_submodule(name)
        assert isinstance(matrix, Linear), name
        matrix.adapter = Adapter(config.lora, matrix.in_features, matrix.out_features, in_block(name))
