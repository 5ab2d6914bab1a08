"""The Transformer, top to bottom: embed, blocks, norm, head.

    tokens ── embedding ──▶ [ x + attention(norm x) ─▶ x + mlp(norm x) ] * num_layers ── norm ── head ──▶ logits or loss
                 ▲                      ▲
              positions         rotation, mask: made once, shared by all blocks

Every parameter is used inside the forward of the module that owns it, because ZeRO-3 gathers a module's parameters
around its forward and nowhere else. Shape letters: B batch, T query tokens, S key tokens, D hidden size, H heads,
K key heads, C head width, V vocabulary.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.attention import Attention, LayerCache
from bigtx.model.initial import initial_value
from bigtx.model.layers import MLP, Embedding, Norm
from bigtx.model.loss import Head, Loss
from bigtx.model.positions import RelativeBias, Rotation, rotation, sinusoids

Recompute = Literal["none", "selective", "full"]


class Cache(Protocol):
    """The keys and values of tokens that were read before; decode.py has the one that generation uses.

    Columns of the cache are positions of the text: a token at position p of its row lies in column p.
    """

    @property
    def layers(self) -> Sequence[LayerCache]:
        """One for each block."""
        ...

    def place(self, positions: Tensor) -> Tensor:
        """Say where the next T tokens go, [B, T]; returns the positions [S] of the columns that layers will give."""
        ...


class Block(nn.Module):
    """Attention and a feed-forward, each with its norm and residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.dropout = config.dropout
        self.attention_norm = Norm.of(config)
        self.attention = Attention(config)
        self.mlp_norm = Norm.of(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rotation: Rotation | None = None,
        mask: Tensor | None = None,
        cache: LayerCache | None = None,
        recompute: Recompute = "none",
    ) -> Tensor:
        """Map x [B, T, D] to [B, T, D]; `recompute` says what the backward pass makes again instead of keeping."""
        # Decided inside the block, so that torch.compile of the block sees it and plans for it.
        if recompute == "none" or not torch.is_grad_enabled():
            return self._compute(x, rotation, mask, cache)
        if recompute == "full":
            return checkpoint(self._compute, x, rotation, mask, cache, use_reentrant=False)
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_or_recompute)
        return checkpoint(self._compute, x, rotation, mask, cache, use_reentrant=False, context_fn=contexts)

    def _compute(self, x: Tensor, rotation: Rotation | None, mask: Tensor | None, cache: LayerCache | None) -> Tensor:
        if self.norm_first:
            x = x + self._drop(self.attention(self.attention_norm(x), rotation, mask, cache))
            return x + self._drop(self.mlp(self.mlp_norm(x)))
        x = self.attention_norm(x + self._drop(self.attention(x, rotation, mask, cache)))
        return self.mlp_norm(x + self._drop(self.mlp(x)))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Transformer(nn.Module):
    """A decoder that predicts the next token.

    Its weights are unwritten memory until `init_weights` or a checkpoint fills them; it may be built on the meta
    device. `activation_checkpointing` is set by whoever trains it.
    """

    activation_checkpointing: Recompute = "none"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = Embedding(shape.padded_vocab_size(config), config.hidden_size)
        self.position_embedding = (
            Embedding(config.max_sequence_length, config.hidden_size) if config.positions == "learned" else None
        )
        self.relative_bias = RelativeBias(config) if config.positions == "relative" else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = Norm.of(config) if config.norm_placement == "pre" else None
        self.head = Head(config, tied_to=self.embedding.weight if config.tie_embeddings else None)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with the value that (seed, name) gives it."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), self.config, seed))

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        segment_ids: Tensor | None = None,
        cache: Cache | None = None,
        z_loss: float = 0.0,
        logits_at: Tensor | None = None,
    ) -> Tensor | Loss:
        """Predict each token's successor.

        Args:
            tokens: int64 [B, T].
            labels: int64 [B, T], already shifted: labels[b, t] is the successor of tokens[b, t]; -100 is ignored.
            positions: int64 [B, T] within each text; by default 0, 1, ... in every row. Needed with a cache.
            segment_ids: int64 [B, T]; a token sees only tokens of its own segment.
            cache: keys and values of earlier tokens, extended by this call.
            z_loss: weight of the squared log-partition (PaLM, arXiv:2204.02311).
            logits_at: int64 [B], the only column of each row whose logits are wanted.

        Returns:
            With labels, a `Loss`; else logits, fp32 [B, T, V], or [B, 1, V] with `logits_at`.
        """
        if positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)[None]  # 1 T
        x = self._embed(tokens, positions)  # B T D
        angles = rotation(self.config, positions) if self.config.positions == "rope" else None
        mask = self._mask(positions, segment_ids, cache)
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            x = block(x, angles, mask, layer_cache, self.activation_checkpointing)
        if logits_at is not None:
            x = x[torch.arange(x.shape[0], device=x.device), logits_at][:, None]  # B 1 D
        if self.norm is not None:
            x = self.norm(x)
        return self.head(x, labels, z_loss)

    def _embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if self.position_embedding is not None:
            x = x + self.position_embedding(positions)
        if self.config.positions == "sinusoidal":
            # Scaled, so that waves of amplitude one do not drown the embeddings (arXiv:1706.03762, section 3.4).
            x = x * math.sqrt(self.config.hidden_size) + sinusoids(positions, self.config.hidden_size).to(x.dtype)
        return F.dropout(x, self.config.dropout, self.training)

    def _mask(self, positions: Tensor, segment_ids: Tensor | None, cache: Cache | None) -> Tensor | None:
        """What each token may see: None is causal, bool [B, 1, T, S], or with a relative bias [B, H, T, S]."""
        if cache is not None:
            assert segment_ids is None, "a cache holds one text per row"
            key_positions = cache.place(positions)[None]  # 1 S
            visible = key_positions[:, None, :] <= positions[:, :, None]  # B T S
        elif segment_ids is None and self.relative_bias is None:
            return None
        else:
            columns = torch.arange(positions.shape[1], device=positions.device)
            key_positions, visible = positions, (columns <= columns[:, None])[None]  # 1 T T
            if segment_ids is not None:
                visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
        if self.relative_bias is None:
            return visible[:, None]
        bias = self.relative_bias(positions, key_positions)  # B H T S
        return bias.masked_fill(~visible[:, None], float("-inf"))


_KEPT_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
"""Matrix products and attention: nearly all the arithmetic of a block in a fraction of its activations."""


def _keep_or_recompute(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
