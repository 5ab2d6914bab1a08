"""The Transformer, top to bottom: embed, blocks, norm, head; and its three shapes.

    block     x + attention(norm x) ─▶ [ x + attention(norm x, source) ─▶ ] x + mlp(norm x)
    stack     block * num_layers ─▶ norm                          positions and masks are made once, for all blocks

    decoder             tokens ─ embed ─▶ stack, causal ─▶ head ─▶ logits or loss
    encoder             tokens ─ embed ─▶ stack, both ways ─▶ head
    encoder_decoder     tokens ─ embed ─▶ stack, both ways ─▶ source
                        target tokens ─ embed ─▶ stack, causal, with attention to source ─▶ head

An audio encoder reads features in place of tokens: features ─ convolutions ─▶ columns as of embedded tokens (embed.py).

Every parameter is used inside the forward of the module that owns it, because ZeRO-3 gathers a module's parameters
around its forward only. Shape letters: B batch, T tokens (of the target, if there is a source), S source
tokens, D hidden size, H heads, K key heads, C head width, V vocabulary, M columns whose logits are requested.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.model.attention import MIN_SPARSE_WIDTH, Attention, Mask, Side, has_sparse_kernels, make_mask
from bigtx.model.embed import Embedder, RelativeBias, Rotation, Text, rotation
from bigtx.model.experts import Experts, Routing
from bigtx.model.initial import initial_value
from bigtx.model.layers import MLP, Dropout, Norm, add_adapters, fold
from bigtx.model.logits import LogitsOnDemand, SoftTargets
from bigtx.model.loss import ClassifierHead, Head, Loss, TokenScores

if TYPE_CHECKING:
    from bigtx.model.cache import KeyValueCache, LayerCache

Recompute = Literal["none", "selective", "full"]


class View(NamedTuple):
    """The mask and the positions of the tokens of a text."""

    mask: Mask
    rotation: Rotation | None


class Surroundings(NamedTuple):
    """The values that the blocks of a stack share."""

    everything: View | None
    """The view of blocks without a window, if there are any."""
    window: View | None
    """The view of blocks with a window."""
    source_mask: Mask | None
    is_text: Tensor | None = None
    """bool [B, T]: tokens that are not padding, if this is needed."""


class Block(nn.Module):
    """A block: attention, in the decoder of an encoder-decoder also attention to the source, and a feed-forward."""

    def __init__(self, config: ModelConfig, *, layer: int, across: bool) -> None:
        """Args:
        layer: the block's number in its stack.
        across: whether it attends to a source.
        """
        super().__init__()
        self.norm_first = config.norm_placement == "pre"
        self.has_window = shape.has_window(config, layer)
        # Normalized embeddings need no other scale (ModernBERT, arXiv:2412.13663). A norm without a scale
        # is not left out: it brings small embeddings nearer to length one (NanoChat has both).
        learned = config.norm_scale or config.norm_bias
        normalized = self.norm_first and config.embedding_norm and layer == 0 and learned
        self.attention_norm = None if normalized else Norm.of(config)
        self.attention = Attention(config)
        self.cross_attention_norm = Norm.of(config) if across else None
        self.cross_attention = Attention(config) if across else None
        self.mlp_norm = Norm.of(config)
        self.mlp = Experts(config) if config.experts.num_experts else MLP(config)
        self.attention_dropout = Dropout(config.dropout, "attention")
        self.cross_attention_dropout = Dropout(config.dropout, "cross_attention")
        self.mlp_dropout = Dropout(config.dropout, "mlp")

    def forward(
        self,
        x: Tensor,
        around: Surroundings,
        source: Tensor | None = None,
        cache: LayerCache | None = None,
        recompute: Recompute = "none",
        seeds: Tensor | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Map x [B, T, D] to [B, T, D].

        Args:
            recompute: what the backward pass recomputes.
            seeds: int64 [B], the seeds of this block's dropout; None: no dropout.

        Returns:
            The new x, and the routing of the tokens if there are experts.
        """
        inputs = x, around, source, cache, seeds
        # Decided inside the block, so that torch.compile of the block includes it.
        if recompute == "none" or not torch.is_grad_enabled():
            return self._compute(*inputs)
        # Dropout depends on the seeds, so no state of a generator must be kept.
        if recompute == "full":
            return checkpoint(self._compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        contexts = functools.partial(create_selective_checkpoint_contexts, _keep_or_recompute)
        return checkpoint(self._compute, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)

    def _compute(
        self, x: Tensor, around: Surroundings, source: Tensor | None, cache: LayerCache | None, seeds: Tensor | None
    ) -> tuple[Tensor, Routing | None]:
        view = around.window if self.has_window else around.everything
        assert view is not None
        change = self.attention(self._before(self.attention_norm, x), view.mask, view.rotation, cache, seeds)
        x = self._after(self.attention_norm, x, self.attention_dropout(change, seeds))
        if self.cross_attention is not None:
            assert source is not None and around.source_mask is not None
            change = self.cross_attention.across(
                self._before(self.cross_attention_norm, x), source, around.source_mask, cache, seeds
            )
            x = self._after(self.cross_attention_norm, x, self.cross_attention_dropout(change, seeds))
        change, routing = self._feed_forward(self._before(self.mlp_norm, x), around.is_text, seeds)
        return self._after(self.mlp_norm, x, self.mlp_dropout(change, seeds)), routing

    def _feed_forward(self, x: Tensor, is_text: Tensor | None, seeds: Tensor | None) -> tuple[Tensor, Routing | None]:
        return self.mlp(x, is_text, seeds) if isinstance(self.mlp, Experts) else (self.mlp(x, seeds), None)

    def _before(self, norm: Norm | None, x: Tensor) -> Tensor:
        """Return the input of a sublayer."""
        return norm(x) if self.norm_first and norm is not None else x

    def _after(self, norm: Norm | None, x: Tensor, change: Tensor) -> Tensor:
        """Return the residual sum of a sublayer."""
        x = x + change
        return x if self.norm_first or norm is None else norm(x)


class Stack(nn.Module):
    """The blocks of an encoder or of a decoder, and the norm at their end."""

    def __init__(self, config: ModelConfig, *, causal: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        num_layers = shape.num_decoder_layers(config) if causal else shape.num_encoder_layers(config)
        across = causal and config.shape == "encoder_decoder"
        self.relative_bias = RelativeBias(config, both_ways=not causal) if config.positions == "relative" else None
        self.blocks = nn.ModuleList(Block(config, layer=layer, across=across) for layer in range(num_layers))
        self.norm = Norm.of(config) if config.norm_placement == "pre" else None

    def forward(
        self,
        text: Text,
        source: Text | None = None,
        prefix_mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
        recompute: Recompute = "none",
        seeds: Tensor | None = None,
        text_lengths: Tensor | None = None,
        sparse: bool = True,
    ) -> tuple[Tensor, Routing | None]:
        """Return the hidden states [B, T, D] of a text, and the routing of its tokens if there are experts."""
        around = self._surroundings(text, source, prefix_mask, cache, sparse)
        if text_lengths is not None and self.config.experts.num_experts:
            columns = torch.arange(text.x.shape[1], device=text.x.device)
            around = around._replace(is_text=columns < text_lengths[:, None])
        x, source_x = text.x, None if source is None else source.x
        routings = []
        for index, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache.layers[index]
            own_seeds = None if seeds is None else fold(seeds, 2 * index + self.causal)
            x, routing = block(x, around, source_x, layer_cache, recompute, own_seeds)
            if routing is not None:
                routings.append(routing)
        return x if self.norm is None else self.norm(x), Routing.of_stack(routings) if routings else None

    def _surroundings(
        self, text: Text, source: Text | None, prefix_mask: Tensor | None, cache: KeyValueCache | None, sparse: bool
    ) -> Surroundings:
        config, positions = self.config, text.positions
        if cache is None:
            key_positions = positions
            queries = keys = _side(text)
        else:
            assert text.segment_ids is None, "a cache has one text per row"
            key_positions = cache.place(positions)[None]  # 1 S
            queries, keys = Side(positions), Side(key_positions)
            if prefix_mask is not None:
                prefix_mask = F.pad(prefix_mask, (0, key_positions.shape[1] - prefix_mask.shape[1]))
        sparse = sparse and has_sparse_kernels(text.x) and shape.head_width(config) >= MIN_SPARSE_WIDTH
        sparse = sparse and not (self.training and shape.attention_dropout(config))
        mask = functools.partial(
            make_mask,
            queries,
            keys,
            causal=self.causal,
            prefix=prefix_mask,
            bias=None if self.relative_bias is None else self.relative_bias(positions, key_positions),
            in_order=cache is None,
            sparse=sparse,
        )
        views: dict[bool, View] = {}
        for local in {bool(block.has_window) for block in self.blocks}:
            turn = rotation(config, positions, local=local) if config.positions == "rope" else None
            views[local] = View(mask(window=config.attention_window if local else None), turn)
        source_mask = None if source is None else _source_mask(text, source, sparse=sparse)
        return Surroundings(views.get(False), views.get(True), source_mask)


def _side(text: Text) -> Side:
    return Side(torch.arange(text.x.shape[1], device=text.x.device)[None], text.segment_ids)


def _source_mask(text: Text, source: Text, *, sparse: bool) -> Mask:
    """Return the mask of the source for the decoder: its own segment; a side without segments has segment 0."""
    given = [side.segment_ids for side in (text, source) if side.segment_ids is not None]
    if len(given) == 1:
        text, source = (
            side._replace(segment_ids=torch.zeros(side.x.shape[:2], dtype=given[0].dtype, device=side.x.device))
            if side.segment_ids is None
            else side
            for side in (text, source)
        )
    return make_mask(_side(text), _side(source), causal=False, sparse=sparse)


class Inputs(NamedTuple):
    """The arguments of a Transformer: its input, and the kind of its output."""

    tokens: Tensor | None = None
    """int64 [B, T]; in an encoder-decoder the source [B, S], or None once the cache has its states."""
    labels: Tensor | None = None
    """int64 [B, T] or [B, M], the target of each column: for a decoder already shifted, so that labels[b, t] is the
    successor of tokens[b, t]; -100 is ignored."""
    features: Tensor | None = None
    """fp32 [B, F, M], the input of an audio encoder in place of tokens: spectrograms."""
    feature_lengths: Tensor | None = None
    """int64 [B], the number of frames of each row."""
    positions: Tensor | None = None
    """int64 [B, T] within each text; by default 0, 1, ... in every row. Needed with a cache."""
    segment_ids: Tensor | None = None
    """[B, T]; a token attends only to tokens of its own segment. int64, or bool if they separate only padding."""
    token_types: Tensor | None = None
    """int64 [B, T]; by default 0."""
    prefix_mask: Tensor | None = None
    """bool [B, T]: tokens that all tokens of their segment attend to, earlier ones too."""
    sequence_ids: Tensor | None = None
    """int64 [B], each row's number in the run: with `dropout_seed` it determines dropout in training. Without them
    torch's generator does."""
    text_lengths: Tensor | None = None
    """int64 [B], for a decoder: the tokens of each row; the padding after them is not counted for experts."""
    target_tokens: Tensor | None = None
    """int64 [B, T], the input of the decoder of an encoder-decoder; a token attends to the source tokens of its own
    segment, which is 0 by default."""
    target_positions: Tensor | None = None
    """The positions of these tokens, as above."""
    target_segment_ids: Tensor | None = None
    """The segments of these tokens, as above."""
    columns: Tensor | None = None
    """int64 [B, M], the only columns of each row whose logits are requested."""
    pool: Tensor | None = None
    """fp32 [B, T], for a model with classes: the weight of each column in the summary of its row."""
    cache: KeyValueCache | None = None
    """Keys and values of earlier tokens of the decoder, extended by this call."""
    z_loss: float = 0.0
    """The weight of the squared log-partition (PaLM, arXiv:2204.02311)."""
    label_smoothing: float = 0.0
    """The share of each label that is spread over the vocabulary (arXiv:1512.00567)."""
    score_tokens: bool = False
    """Whether to return each label's own log-probability instead of the loss."""
    soft_targets: SoftTargets | None = None
    """The soft targets of a teacher, in the order of the labels: they are a share of the loss."""
    on_demand: bool = False
    """Whether to return logits that are computed on demand, a chunk at a time."""


class Transformer(Embedder):
    """A decoder, an encoder, or both.

    Its weights are unwritten memory until `init_weights` or a checkpoint fills them; it may be built on the meta
    device. The trainer sets `activation_checkpointing` and `dropout_seed`.
    """

    activation_checkpointing: Recompute = "none"
    dropout_seed = 0

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.encoder = Stack(config, causal=False) if config.shape != "decoder" else None
        self.decoder = Stack(config, causal=True) if config.shape != "encoder" else None
        tied_to = self.embedding.weight if config.tie_embeddings and self.embedding is not None else None
        self.head = Head(config, tied_to=tied_to) if config.num_classes is None else ClassifierHead(config)
        add_adapters(self, config)

    @property
    def blocks(self) -> list[Block]:
        """Return the blocks of all stacks."""
        return [module for module in self.modules() if isinstance(module, Block)]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter with the values of (seed, name)."""
        for name, parameter in self.named_parameters():
            parameter.copy_(initial_value(name, tuple(parameter.shape), self.config, seed))

    def forward(
        self, tokens: Tensor | None = None, labels: Tensor | None = None, **others: Any
    ) -> Tensor | Loss | TokenScores | LogitsOnDemand:
        """Predict: each token's successor, or in an encoder the token itself.

        Args:
            tokens, labels, others: the fields of `Inputs`.

        Returns:
            With labels, a `Loss` or `TokenScores`; else logits, fp32 [B, T, V], or [B, M, V] with `columns`, or
            [B, classes]; or `LogitsOnDemand`, of B T or B M tokens in a row.
        """
        inputs = Inputs(tokens, labels, **others)
        seeds = self._row_seeds(inputs)
        has_source = self.encoder is not None and self.decoder is not None
        x, routing = self._read_source_and_target(inputs, seeds) if has_source else self._read_text(inputs, seeds)
        if inputs.columns is not None:
            x = x[torch.arange(x.shape[0], device=x.device)[:, None], inputs.columns]  # B M D
        if isinstance(self.head, ClassifierHead):
            assert inputs.pool is not None, "a model with classes needs `pool`"
            return self.head((inputs.pool.to(x.dtype)[:, None] @ x).squeeze(1), seeds)
        if inputs.on_demand:
            return self.head.on_demand(x)
        result = self.head(x, labels, inputs.z_loss, inputs.label_smoothing, inputs.score_tokens, inputs.soft_targets)
        return result if isinstance(result, Tensor) else result._replace(routing=routing)

    def _read_text(self, inputs: Inputs, seeds: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Return the last hidden states [B, T, D] of the only stack, and the routing of the tokens."""
        read = [] if inputs.tokens is None else [(inputs.tokens, inputs.positions, inputs.segment_ids)]
        heard = self.hear(inputs.features, inputs.feature_lengths)
        (text,) = self.embed(*read, token_types=inputs.token_types, heard=heard, cache=inputs.cache, seeds=seeds)
        shared: dict[str, Any] = {"recompute": self.activation_checkpointing, "seeds": seeds}
        if self.decoder is not None:
            of_decoder = {"prefix_mask": inputs.prefix_mask, "cache": inputs.cache, "text_lengths": inputs.text_lengths}
            return self.decoder(text, sparse=inputs.cache is None, **of_decoder, **shared)
        assert self.encoder is not None
        return self.encoder(text, **shared)

    def _read_source_and_target(self, inputs: Inputs, seeds: Tensor | None) -> tuple[Tensor, Routing | None]:
        """Return the last hidden states [B, T, D] of the decoder of an encoder-decoder, and the routing of its tokens.
        The encoder reads the source, unless the cache has its states."""
        assert self.encoder is not None and self.decoder is not None and inputs.target_tokens is not None
        target = (inputs.target_tokens, inputs.target_positions, inputs.target_segment_ids)
        # With a cache blocks run uncompiled, and FlexAttention would hold all scores.
        cache, recompute, sparse = inputs.cache, self.activation_checkpointing, inputs.cache is None
        source = None if cache is None else cache.source
        if source is None:
            read = [] if inputs.tokens is None else [(inputs.tokens, inputs.positions, inputs.segment_ids)]
            heard = self.hear(inputs.features, inputs.feature_lengths)
            source, text = self.embed(*read, target, heard=heard, cache=cache, seeds=seeds)
            source = source._replace(x=self.encoder(source, recompute=recompute, seeds=seeds, sparse=sparse)[0])
        else:
            (text,) = self.embed(target, cache=cache)
        if cache is not None:
            cache.source = source
        return self.decoder(text, source, cache=cache, recompute=recompute, seeds=seeds, sparse=sparse)

    def _row_seeds(self, inputs: Inputs) -> Tensor | None:
        """Return int64 [B], the seeds of dropout of the rows; None without dropout."""
        rates = (self.config.dropout, shape.attention_dropout(self.config), self.config.lora.dropout)
        if not self.training or not any(rates):
            return None
        sequence_ids = inputs.sequence_ids
        if sequence_ids is None:
            read = inputs.features if inputs.tokens is None else inputs.tokens
            assert read is not None
            sequence_ids = torch.randint(2**62, (len(read),), device=read.device)
        return fold(sequence_ids, self.dropout_seed)


_KEPT_OPERATIONS = {
    torch.ops.aten.mm.default,
    torch.ops.bigtx.attention_products.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten._grouped_mm.default,
    torch.ops.bigtx.expert_products.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
}
"""Matrix products and attention: almost all arithmetic of a block, with a fraction of its activations."""


def _keep_or_recompute(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT_OPERATIONS else CheckpointPolicy.PREFER_RECOMPUTE
