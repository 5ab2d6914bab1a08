"""Grouped-query self-attention over torch's scaled_dot_product_attention.

Queries, keys and values are three matrices and three products: Muon orthogonalizes a matrix as a whole, and Hugging
Face keeps them apart, so a fused one would have to be cut for both. One fused product took as long as the three (one
CPU core, bf16, 256 wide: 4.1 ms and 3.9 ms). Shape letters: B batch, T query tokens, S key tokens, D hidden size,
H heads, K key heads, C head width.
"""

from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.layers import Linear, Norm
from bigtx.model.positions import Rotation, rotate


class LayerCache(Protocol):
    """Where a layer keeps the keys and values of the tokens that were read before."""

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Take in keys and values [B, K, T, C] and return those of all tokens so far [B, K, S, C]."""
        ...


class Attention(nn.Module):
    """Causal self-attention; K key and value heads serve H query heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, shape.num_kv_heads(config)
        self.width = shape.head_width(config)
        self.dropout = config.dropout
        size, queries, keys = config.hidden_size, self.num_heads * self.width, self.num_kv_heads * self.width
        self.query = Linear(size, queries, bias=config.attention_bias)
        self.key = Linear(size, keys, bias=config.attention_bias)
        self.value = Linear(size, keys, bias=config.attention_bias)
        self.output = Linear(queries, size, bias=config.attention_output_bias)
        self.query_norm = self._head_norm(config) if config.qk_norm else None
        self.key_norm = self._head_norm(config) if config.qk_norm else None

    def _head_norm(self, config: ModelConfig) -> Norm:
        return Norm("rms", self.width, eps=config.norm_eps, scale=config.norm_scale)

    def forward(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        """Attend.

        Args:
            x: [B, T, D].
            rotation: the rotary angles, or None for other kinds of positions.
            mask: bool [B or 1, 1, T, S] (True may be seen) or a bias on the scores [B or 1, H, T, S]; None is causal.
            cache: keys and values of earlier tokens; needs a mask.

        Returns:
            [B, T, D].
        """
        queries = self._heads(self.query(x), self.num_heads)  # B H T C
        keys = self._heads(self.key(x), self.num_kv_heads)  # B K T C
        values = self._heads(self.value(x), self.num_kv_heads)  # B K T C
        if self.query_norm is not None and self.key_norm is not None:
            queries, keys = self.query_norm(queries), self.key_norm(keys)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        attended = self._attend(queries, keys, values, mask)  # B H T C
        return self.output(attended.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.view(*x.shape[:2], num_heads, self.width).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if mask is None:
            return F.scaled_dot_product_attention(
                queries, keys, values, dropout_p=dropout, is_causal=True, enable_gqa=self.num_kv_heads != self.num_heads
            )
        if mask.is_floating_point():
            mask = mask.to(queries.dtype)
        # No CUDA kernel takes a mask and grouped heads at once, and the fallback holds all scores in memory.
        repeats = self.num_heads // self.num_kv_heads
        keys, values = keys.repeat_interleave(repeats, dim=1), values.repeat_interleave(repeats, dim=1)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout)
