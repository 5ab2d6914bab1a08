"""Attention by its formula (arXiv:1706.03762, equation 1), with all weights in memory: for a CPU.

torch's bf16 kernel takes several times longer in the backward pass than these products, up to some hundred tokens. They
are an operator of their own, so that torch.compile does not change them (its version gave NaN with torch 2.13) and
selective checkpointing keeps them. Shape letters: B batch, T query tokens, S key tokens, H heads, C head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bigtx.model.operator import operator

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
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor | None,
    weights: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys, values and scores [B, H, T, S]."""
    of_values = _dropped(weights, kept).transpose(-2, -1) @ grad
    of_weights = _dropped(grad @ values.transpose(-2, -1), kept)
    of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
    return (of_scores @ keys) * scale, of_scores.transpose(-2, -1) @ (queries * scale), of_values, of_scores


@torch.library.register_fake(_attend_backward)
def _(
    grad: Tensor,
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    kept: Tensor | None,
    weights: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        queries.new_empty(queries.shape),
        keys.new_empty(keys.shape),
        values.new_empty(values.shape),
        weights.new_empty(weights.shape),
    )


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
