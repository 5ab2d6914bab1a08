"""Attention masks: causal or in both directions, within a document, within a window, and with a visible prefix.

A mask is made once for a stack, from the places of its tokens, and shared by its blocks. Its form depends on
the kernels: no mask if plain attention is enough; on CUDA the sparse blocks of FlexAttention, which
skip hidden pairs; otherwise a tensor over all pairs. Shape letters: B batch (1 if all rows agree), T query tokens,
S key tokens, H heads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

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
    """int64 [B, T]: a token attends only to tokens of its own segment."""


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
        sparse: whether to use FlexAttention, which has no dropout and gets no bias from bigtx.
    """
    assert (queries.segment_ids is None) == (keys.segment_ids is None), "both sides have segments, or neither"
    plain = queries.segment_ids is None and window is None and prefix is None and in_order
    if plain and bias is None:
        return Mask(causal)
    if sparse and bias is None and in_order:
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
