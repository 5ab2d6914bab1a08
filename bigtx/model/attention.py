"""Grouped-query attention over torch's scaled_dot_product_attention, or FlexAttention for sparse masks; its masks.

Queries, keys and values have three matrices and three products: Muon orthogonalizes a matrix as a whole, and Hugging
Face stores them separately, so a fused one would have to be split for both. One fused product took as long as the three
(one CPU core, bf16, 256 wide: 4.1 ms and 3.9 ms). With dropout of weights, attention uses plain products: torch's
kernels draw by the place in the batch, and would drop other weights in another micro batch.

A mask (causal or in both directions, within a document, within a window, and with a visible prefix) is made once for a
stack, from the places of its tokens, and shared by its blocks. Its form depends on the kernels: no mask if plain
attention is enough; on CUDA, for documents, windows and prefixes, the sparse blocks of FlexAttention, which skip hidden
pairs; otherwise, for example for mere padding, a tensor over all pairs, which torch's fused kernels read.

Plain products (arXiv:1706.03762, equation 1) keep all weights in memory: for a CPU. torch's bf16 kernel takes several
times longer in the backward pass, up to some hundred tokens. They are an operator of their own, so that torch.compile
does not change them (its version gave NaN with torch 2.13) and selective checkpointing keeps them. Shape letters: B
batch (1 if all rows agree), T query tokens, S key tokens, D hidden size, H heads, K key heads, C head width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.embed import Rotation, rotate
from bigtx.model.layers import Dropout, Linear, Norm, operator

if TYPE_CHECKING:
    from bigtx.model.cache import LayerCache

Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(row, head, query, key) -> bool, as for FlexAttention."""


class Mask(NamedTuple):
    """The mask of attention; at most one of the tensors is set."""

    causal: bool
    """Without a tensor: whether a token attends only to itself and earlier tokens, or to all."""
    scores: Tensor | None = None
    """bool [B, 1, T, S], True is visible; or a bias that is added to the scores [B, H, T, S]."""
    blocks: BlockMask | None = None
    """The mask for FlexAttention."""


class Side(NamedTuple):
    """The queries or the keys of attention."""

    columns: Tensor
    """int64 [B, T]: the order of tokens; windows are measured by their distance."""
    segment_ids: Tensor | None = None
    """[B, T]: a token attends only to tokens of its own segment. int64: several texts; bool: a text and its padding."""

    @property
    def has_texts(self) -> bool:
        """Return whether a row may have several texts, so that most pairs of its tokens are hidden."""
        return self.segment_ids is not None and self.segment_ids.dtype != torch.bool


MAX_DENSE = 4096**2
"""The most pairs of a row for which mere padding has a mask over all pairs: 16 MiB for each row."""


MIN_SPARSE_WIDTH = 16
"""The narrowest heads for which FlexAttention has kernels on a GPU."""


def has_sparse_kernels(x: Tensor) -> bool:
    """Return whether FlexAttention has kernels for x that skip hidden pairs, forward and backward."""
    return x.is_cuda


def make_mask(
    queries: Side,
    keys: Side,
    *,
    causal: bool,
    window: int | None = None,
    prefix: Tensor | None = None,
    bias: Tensor | None = None,
    in_order: bool = True,
    sparse: bool = False,
) -> Mask:
    """Return the mask of `keys` that `queries` may attend to.

    Args:
        causal: whether a token does not attend to later ones.
        window: the most columns between a token and those that it attends to.
        prefix: bool [B, S], keys that the whole segment attends to despite `causal`.
        bias: the bias of the scores, [B, H, T, S].
        in_order: whether both sides have the columns 0, 1, 2, ...; they do not if keys come from a cache.
        sparse: whether FlexAttention may be used, which has no dropout and gets no bias from bigtx.
    """
    assert (queries.segment_ids is None) == (keys.segment_ids is None), "both sides have segments, or neither"
    plain = queries.segment_ids is None and window is None and prefix is None and in_order
    if plain and bias is None:
        return Mask(causal)
    skips = window is not None or prefix is not None or queries.has_texts or keys.has_texts
    skips = skips or queries.columns.shape[1] * keys.columns.shape[1] > MAX_DENSE
    if sparse and skips and bias is None and in_order:
        return Mask(causal, blocks=block_mask(queries, keys, causal=causal, window=window, prefix=prefix))
    if plain and not causal:
        return Mask(causal, bias)
    visible = dense_mask(queries, keys, causal=causal, window=window, prefix=prefix)[:, None]  # B 1 T S
    return Mask(causal, visible if bias is None else bias.masked_fill(~visible, float("-inf")))


def dense_mask(queries: Side, keys: Side, *, causal: bool, window: int | None, prefix: Tensor | None) -> Tensor:
    """Return bool [B, T, S]: True is visible."""
    behind = queries.columns[:, :, None] - keys.columns[:, None, :]  # B T S
    visible = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    if prefix is not None:
        visible = visible | prefix[:, None, :]
    if window is not None:
        visible = visible & (behind.abs() <= window)
    if queries.segment_ids is not None and keys.segment_ids is not None:
        visible = visible & (queries.segment_ids[:, :, None] == keys.segment_ids[:, None, :])
    return visible


def block_mask(queries: Side, keys: Side, *, causal: bool, window: int | None, prefix: Tensor | None) -> BlockMask:
    """Return the mask for FlexAttention, if both sides have the columns 0, 1, 2, ..."""
    rules: list[Visible] = []
    query_segments, key_segments = queries.segment_ids, keys.segment_ids
    if causal and prefix is not None:
        rules.append(lambda row, head, query, key: (query >= key) | prefix[row, key])
    elif causal:
        rules.append(lambda row, head, query, key: query >= key)
    if window is not None:
        rules.append(lambda row, head, query, key: (query - key).abs() <= window)
    if query_segments is not None and key_segments is not None:
        rules.append(lambda row, head, query, key: query_segments[row, query] == key_segments[row, key])

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = query >= 0
        for rule in rules:
            seen = seen & rule(row, head, query, key)
        return seen

    (num_queries, num_keys), device = (queries.columns.shape[1], keys.columns.shape[1]), queries.columns.device
    rows = next((len(part) for part in (query_segments, prefix) if part is not None), 1)
    return create_block_mask(visible, rows, None, num_queries, num_keys, device=str(device))


MAX_SCORES = 512**2
"""The number of scores of a head up to which products are faster: three times as fast with 128 tokens, and as fast
with 512 (two AMX cores)."""


def products_are_faster(queries: Tensor, keys: Tensor) -> bool:
    """Return whether torch's kernel would take longer, including the backward pass."""
    recorded = torch.is_grad_enabled() and queries.dtype == torch.bfloat16 and queries.device.type == "cpu"
    return recorded and queries.shape[2] * keys.shape[2] <= MAX_SCORES


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    scores: Tensor | None,
    *,
    causal: bool,
    scale: float,
    kept: Tensor | None = None,
) -> Tensor:
    """Return attention [B, H, T, C].

    Args:
        queries: [B, H, T, C].
        keys, values: [B, H, S, C].
        scores: a bias of the scores, [1 or B, 1 or H, T, S], or a mask of that shape, where True is visible.
        causal: without `scores`, whether a token attends only to itself and earlier ones.
        kept: [B, H, T, S], the factors of dropout on the weights.
    """
    # Not minus infinity, even with a bias added: a token that attends to nothing (only padding) must not become NaN.
    least = torch.finfo(queries.dtype).min / 2
    if scores is None and causal:
        scores = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=queries.device).tril()[None, None]
    if scores is None:
        added = None
    elif scores.is_floating_point():
        added = scores.to(queries.dtype).clamp(min=least)
    else:
        added = torch.zeros_like(scores, dtype=queries.dtype).masked_fill(~scores, least)
    return _attend(queries, keys, values, added, kept, scale)[0]


@operator("bigtx::attention_products")
def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, kept: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attention [B, H, T, C], and the weights [B, H, T, S] before the multiplication by `kept`."""
    scores = (queries * scale) @ keys.transpose(-2, -1)
    if added is not None:
        scores += added
    weights = scores.softmax(dim=-1)
    return _dropped(weights, kept) @ values, weights


def _dropped(weights: Tensor, kept: Tensor | None) -> Tensor:
    return weights if kept is None else weights * kept


@torch.library.register_fake(_attend)
def _(
    queries: Tensor, keys: Tensor, values: Tensor, added: Tensor | None, kept: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    shape = (*queries.shape[:3], keys.shape[2])
    return queries.new_empty((*queries.shape[:3], values.shape[3])), queries.new_empty(shape)


@operator("bigtx::attention_products_backward")
def _attend_backward(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor | None, weights: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys, values and scores [B, H, T, S]."""
    of_values = _dropped(weights, kept).transpose(-2, -1) @ grad
    of_weights = _dropped(grad @ values.transpose(-2, -1), kept)
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    return (of_scores @ keys) * scale, of_scores.transpose(-2, -1) @ (queries * scale), of_values, of_scores


@torch.library.register_fake(_attend_backward)
def _(
    grad: Tensor, queries: Tensor, keys: Tensor, values: Tensor, kept: Tensor | None, weights: Tensor, scale: float
) -> tuple[Tensor, ...]:
    return tuple(part.new_empty(part.shape) for part in (queries, keys, values, weights))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    queries, keys, values, added, kept, scale = inputs
    ctx.save_for_backward(queries, keys, values, kept, output[1])
    ctx.scale, ctx.added = scale, None if added is None else added.shape
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor, of_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    assert of_weights is None, "the weights are not used outside"
    of_queries, of_keys, of_values, of_scores = _attend_backward(grad, *ctx.saved_tensors, ctx.scale)
    of_added = of_scores.sum_to_size(ctx.added) if ctx.needs_input_grad[3] else None
    return of_queries, of_keys, of_values, of_added, None, None


torch.library.register_autograd(_attend, _gradients, setup_context=_keep)


class Attention(nn.Module):
    """Attention to the own text or to a source; H query heads share K key and value heads (arXiv:2305.13245)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_heads, shape.num_kv_heads(config)
        self.width = shape.head_width(config)
        self.scale = config.attention_scale
        self.dropout = Dropout(shape.attention_dropout(config), "weights of attention")
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
            is_program = torch.compiler.is_compiling() or not has_sparse_kernels(queries)
            flex = flex_attention if is_program else _compiled_flex_attention()
            return flex(queries, keys, values, block_mask=mask.blocks, scale=self.scale, enable_gqa=grouped)
        if kept is not None or products_are_faster(queries, keys):
            scale = self.width**-0.5 if self.scale is None else self.scale
            keys, values = self._repeated(keys), self._repeated(values)
            return attend(queries, keys, values, mask.scores, causal=mask.causal, scale=scale, kept=kept)
        if mask.scores is None:
            return F.scaled_dot_product_attention(
                queries, keys, values, is_causal=mask.causal, scale=self.scale, enable_gqa=grouped
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
    """Compile FlexAttention for blocks that are not compiled: otherwise all scores would be in memory."""
    from bigtx.model.compiled import program

    return program(flex_attention)
