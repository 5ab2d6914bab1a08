"""Grouped-query attention over torch's scaled_dot_product_attention, or FlexAttention where a mask is sparse.

Queries, keys and values have three matrices and three products: Muon orthogonalizes a matrix as a whole, and Hugging
Face stores them separately, so a fused one would have to be split for both. One fused product took as long as the three
(one CPU core, bf16, 256 wide: 4.1 ms and 3.9 ms). With dropout of weights, attention uses plain products (products.py):
torch's kernels draw by the place in the batch, and would drop other weights in another micro batch. Shape letters: B
batch, T query tokens, S key tokens, D hidden size, H heads, K key heads, C head width.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.cache import LayerCache
from bigtx.model.dropout import Dropout
from bigtx.model.layers import Linear, Norm
from bigtx.model.mask import Mask
from bigtx.model.positions import Rotation, rotate
from bigtx.model.products import attend, products_are_faster


class Attention(nn.Module):
    """Attention to the own text or to a source; H query heads share K key and value heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig, name: str = "attention") -> None:
        """Args: name: of the module within its block."""
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, shape.num_kv_heads(config)
        self.width = shape.head_width(config)
        self.scale = config.attention_scale
        self.dropout = Dropout(shape.attention_dropout(config), f"weights of {name}")
        size, queries, keys = config.hidden_size, self.num_heads * self.width, self.num_kv_heads * self.width
        self.query = Linear(size, queries, bias=config.attention_bias)
        self.key = Linear(size, keys, bias=config.attention_bias)
        self.value = Linear(size, keys, bias=config.attention_bias)
        self.output = Linear(queries, size, bias=config.attention_output_bias)
        self.query_norm = self._head_norm(config) if config.qk_norm else None
        self.key_norm = self._head_norm(config) if config.qk_norm else None

    def _head_norm(self, config: ModelConfig) -> Norm:
        return Norm("rms", self.width, eps=config.norm_eps, scale=config.norm_scale)

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        rotation: Rotation | None = None,
        cache: LayerCache | None = None,
        seeds: Tensor | None = None,
    ) -> Tensor:
        """Attend to the text itself.

        Args:
            x: [B, T, D].
            mask: which tokens each token attends to.
            rotation: the rotary angles, or None for other kinds of positions.
            cache: keys and values of earlier tokens.
            seeds: int64 [B], the seeds of dropout; None: no dropout.

        Returns:
            [B, T, D].
        """
        queries, (keys, values) = self._queries(x, seeds), self._keys_and_values(x, seeds)
        if rotation is not None:
            queries, keys = rotate(queries, rotation), rotate(keys, rotation)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        return self._attend(queries, keys, values, mask, seeds)

    def across(
        self, x: Tensor, source: Tensor, mask: Mask, cache: LayerCache | None = None, seeds: Tensor | None = None
    ) -> Tensor:
        """Attend from x [B, T, D] to the source [B, S, D]; return [B, T, D]."""
        queries = self._queries(x, seeds)
        if cache is None:
            return self._attend(queries, *self._keys_and_values(source, seeds), mask, seeds)
        if cache.source is None:
            cache.source = self._keys_and_values(source, seeds)
        return self._attend(queries, *cache.source, mask, seeds)

    def _queries(self, x: Tensor, seeds: Tensor | None) -> Tensor:
        queries = self._heads(self.query(x, seeds), self.num_heads)  # B H T C
        return queries if self.query_norm is None else self.query_norm(queries)

    def _keys_and_values(self, x: Tensor, seeds: Tensor | None) -> tuple[Tensor, Tensor]:
        keys = self._heads(self.key(x, seeds), self.num_kv_heads)  # B K S C
        values = self._heads(self.value(x, seeds), self.num_kv_heads)  # B K S C
        return keys if self.key_norm is None else self.key_norm(keys), values

    def _heads(self, x: Tensor, num_heads: int) -> Tensor:
        return x.view(*x.shape[:2], num_heads, self.width).transpose(1, 2)

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, seeds: Tensor | None) -> Tensor:
        kept = self.dropout.mask((*queries.shape[:3], keys.shape[2]), seeds, queries.dtype)
        attended = self._weigh(queries, keys, values, mask, kept)  # B H T C
        return self.output(attended.transpose(1, 2).flatten(2), seeds)

    def _weigh(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask, kept: Tensor | None) -> Tensor:
        grouped = self.num_kv_heads != self.num_heads
        if mask.blocks is not None:
            flex = _compiled_flex_attention() if queries.is_cuda else flex_attention
            return flex(queries, keys, values, block_mask=mask.blocks, scale=self.scale, enable_gqa=grouped)
        if kept is not None or products_are_faster(queries, keys):
            scale = self.width**-0.5 if self.scale is None else self.scale
            keys, values = self._repeated(keys), self._repeated(values)
            return attend(queries, keys, values, mask.scores, causal=mask.causal, scale=scale, kept=kept)
        if mask.scores is None:
            return F.scaled_dot_product_attention(
                queries,
                keys,
                values,
                is_causal=mask.causal,
                scale=self.scale,
                enable_gqa=grouped,
            )
        scores = mask.scores.to(queries.dtype) if mask.scores.is_floating_point() else mask.scores
        # No CUDA kernel supports a mask and grouped heads together, and the fallback keeps all scores in memory.
        keys, values = self._repeated(keys), self._repeated(values)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=scores, scale=self.scale)

    def _repeated(self, x: Tensor) -> Tensor:
        """Repeat keys or values [B, K, S, C] for each of the query heads [B, H, S, C]."""
        repeats = self.num_heads // self.num_kv_heads
        return x if repeats == 1 else x.repeat_interleave(repeats, dim=1)


@functools.cache
def _compiled_flex_attention() -> Any:
    """Compile FlexAttention, even if the blocks are not compiled: without it, all scores are in memory."""
    return torch.compile(flex_attention, dynamic=False)
