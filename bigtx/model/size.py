"""Parameters of a model and FLOPs per token, computed from the config. This module imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from bigtx.config import shape
from bigtx.config.schema import ModelConfig
from bigtx.config.shape import adapted_matrices


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        total: all parameters, including the padding of the vocabulary; a tied table counts once.
        embedding: tables of tokens, pairs, positions and relative distances, and the head if it is not tied.
        non_embedding: the rest: blocks, norms, and the front end of a speech encoder.
        active: the parameters that process a token: of the experts only the active ones.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int


class _Shapes(dict[str, tuple[int, ...]]):
    """The names and shapes of parameters, in the order of the modules."""

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> None:
        """Add a linear map."""
        self[f"{name}.weight"] = (outputs, inputs)
        if bias:
            self[f"{name}.bias"] = (outputs,)

    def norm(self, name: str, config: ModelConfig) -> None:
        """Add a norm of the residual stream."""
        if config.norm_scale:
            self[f"{name}.weight"] = (config.hidden_size,)
        if config.norm_bias and config.norm == "layer":
            self[f"{name}.bias"] = (config.hidden_size,)

    def attention(self, name: str, config: ModelConfig) -> None:
        """Add the projections of attention, and the norms of its queries and keys."""
        hidden, width = config.hidden_size, shape.head_width(config)
        queries, keys = config.num_heads * width, shape.num_kv_heads(config) * width
        for part, outputs in (("query", queries), ("key", keys), ("value", keys)):
            self.linear(f"{name}.{part}", hidden, outputs, bias=config.attention_bias)
        self.linear(f"{name}.output", queries, hidden, bias=config.attention_output_bias)
        if config.qk_norm and config.norm_scale:
            self[f"{name}.query_norm.weight"] = self[f"{name}.key_norm.weight"] = (width,)

    def mlp(self, name: str, config: ModelConfig, inner: int) -> None:
        """Add a feed-forward."""
        for part in _inner_parts(config):
            self.linear(f"{name}.{part}", config.hidden_size, inner, bias=config.mlp_bias)
        self.linear(f"{name}.down", inner, config.hidden_size, bias=config.mlp_bias)

    def experts(self, name: str, config: ModelConfig) -> None:
        """Add a mixture of experts."""
        experts, hidden, inner = config.experts, config.hidden_size, shape.expert_size(config)
        self.linear(f"{name}.router", hidden, experts.num_experts, bias=False)
        for part in _inner_parts(config):
            self[f"{name}.{part}"] = (experts.num_experts, inner, hidden)
        self[f"{name}.down"] = (experts.num_experts, hidden, inner)
        if experts.shared_size:
            self.mlp(f"{name}.shared", config, experts.shared_size)
        if experts.shared_size and experts.shared_gate:
            self.linear(f"{name}.shared_gate", hidden, 1, bias=False)


def _inner_parts(config: ModelConfig) -> tuple[str, ...]:
    return ("gate", "up") if config.mlp in shape.GATED else ("up",)


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter, as in the model's `named_parameters()`."""
    shapes = _Shapes()
    _add_inputs(shapes, config)
    for stack, num_layers in stacks(config).items():
        if config.positions == "relative":
            shapes[f"{stack}.relative_bias.table.weight"] = (config.relative_num_buckets, config.num_heads)
        for index in range(num_layers):
            _add_block(shapes, f"{stack}.blocks.{index}", config)
        if config.norm_placement == "pre":
            shapes.norm(f"{stack}.norm", config)
    for name in adapted_matrices(config):
        outputs, inputs = shapes[f"{name}.weight"]
        shapes |= {f"{name}.adapter.a": (config.lora.rank, inputs), f"{name}.adapter.b": (outputs, config.lora.rank)}
    _add_head(shapes, config)
    return shapes


def _add_inputs(shapes: _Shapes, config: ModelConfig) -> None:
    hidden = config.hidden_size
    if shape.has_embedding(config):
        shapes["embedding.weight"] = (shape.padded_vocab_size(config), hidden)
    if config.bigram_rows:
        shapes["bigrams.table.weight"] = (config.bigram_rows, width := shape.bigram_size(config))
        if width != hidden:
            shapes["bigrams.widen.weight"] = (hidden, width)
    # The convolutions of the front end are matrices over the frames that they cover.
    for index in range(len(config.audio.strides) if config.audio.num_mel_bins else 0):
        inputs = shape.CONVOLUTION_WIDTH * (hidden if index else config.audio.num_mel_bins)
        shapes.linear(f"audio.convolutions.{index}", inputs, hidden, bias=True)
    if config.positions == "learned":
        shapes["position_embedding.weight"] = (config.max_sequence_length + config.position_offset, hidden)
    if config.num_token_types:
        shapes["type_embedding.weight"] = (config.num_token_types, hidden)
    if config.embedding_norm:
        shapes.norm("embedding_norm", config)


def _add_block(shapes: _Shapes, name: str, config: ModelConfig) -> None:
    if not (config.embedding_norm and config.norm_placement == "pre" and name.endswith(".0")):
        shapes.norm(f"{name}.attention_norm", config)
    shapes.attention(f"{name}.attention", config)
    if name.startswith("decoder") and config.shape == "encoder_decoder":
        shapes.norm(f"{name}.cross_attention_norm", config)
        shapes.attention(f"{name}.cross_attention", config)
    shapes.norm(f"{name}.mlp_norm", config)
    if config.experts.num_experts:
        shapes.experts(f"{name}.mlp", config)
    else:
        shapes.mlp(f"{name}.mlp", config, shape.mlp_size(config))


def _add_head(shapes: _Shapes, config: ModelConfig) -> None:
    hidden, rows, form = config.hidden_size, shape.padded_vocab_size(config), shape.class_head(config)
    if shape.has_transform(config):
        shapes.linear("head.transform", hidden, hidden, bias=config.mlp_bias)
        shapes.norm("head.norm", config)
    if config.num_classes is not None:
        if form == "pooler":
            shapes.linear("head.pooler", hidden, hidden, bias=True)
        shapes.linear("head.classes", hidden, config.num_classes, bias=form != "score")
        return
    if not config.tie_embeddings:
        shapes["head.weight"] = (rows, hidden)
    if config.head_bias:
        shapes["head.bias"] = (rows,)


def stacks(config: ModelConfig) -> dict[str, int]:
    """Return the stacks of a model and their numbers of blocks."""
    layers = {"encoder": shape.num_encoder_layers(config), "decoder": shape.num_decoder_layers(config)}
    return {name: count for name, count in layers.items() if count}


def largest_block(config: ModelConfig) -> int:
    """Count the parameters of the largest block."""
    sizes: Counter[str] = Counter()
    for name, dimensions in parameter_shapes(config).items():
        stack, in_block, rest = name.partition(".blocks.")
        if in_block:
            sizes[f"{stack}.{rest.split('.')[0]}"] += math.prod(dimensions)
    return max(sizes.values())


def count_parameters(config: ModelConfig) -> Counts:
    """Count the parameters of a model whose vocab_size is set."""
    sizes = {name: math.prod(size) for name, size in parameter_shapes(config).items()}
    front_end = sum(size for name, size in sizes.items() if name.startswith("audio."))
    others = sum(size for name, size in sizes.items() if _is_of_stack(name)) + front_end
    idle = sum(size for name, size in sizes.items() if name.endswith(_OF_EXPERTS)) * _idle_share(config)
    total = sum(sizes.values())
    return Counts(total=total, embedding=total - others, non_embedding=others, active=total - round(idle))


def _is_of_stack(name: str) -> bool:
    """Return whether a parameter is in a block, or in the norm after a stack."""
    return name.startswith(("encoder.", "decoder.")) and ".relative_bias." not in name


_OF_EXPERTS = (".mlp.gate", ".mlp.up", ".mlp.down")
"""Ends of the names of parameters that hold all experts of a block."""


def _idle_share(config: ModelConfig) -> float:
    """Return the share of the experts that do not process a token."""
    experts = config.experts
    return 1.0 - experts.num_active / experts.num_experts if experts.num_experts else 0.0


def flops_per_row(config: ModelConfig, *, source: int, target: int, predicted: int) -> int:
    """Count the floating-point operations of a training step per row, forward and backward, without recomputation.

    This counts 6 for each parameter that processes a token in the blocks and the head (table look-ups count nothing), 4
    if adapters are trained instead of the parameter, so that it needs no gradient, and 12 (H C) for each pair of tokens
    in each block's attention, over the full square, as is the convention (PaLM, arXiv:2204.02311, appendix B).

    Args:
        config: the model.
        source: the number of tokens, or of columns of a recording, that the encoder reads; 0 without an encoder.
        target: the number of tokens that the decoder reads; 0 without a decoder.
        predicted: the number of columns whose logits are computed.
    """
    arithmetic, frames = 0.0, source * shape.frames_per_column(config)
    for name, size in parameter_shapes(config).items():
        if name == "bigrams.widen.weight":
            arithmetic += 6 * math.prod(size) * (source + target)
        elif name.startswith("audio.") and name.endswith(".weight"):
            frames //= config.audio.strides[int(name.split(".")[2])]
            arithmetic += 6 * math.prod(size) * frames
        if not _is_of_stack(name):
            continue
        used = math.prod(size) * (1.0 - _idle_share(config) if name.endswith(_OF_EXPERTS) else 1.0)
        # Keys and values of the cross attention are computed from the source.
        reads_source = (
            name.startswith("encoder.") or ".cross_attention.key." in name or ".cross_attention.value." in name
        )
        per_weight = 4 if config.lora.rank and ".adapter." not in name else 6
        arithmetic += per_weight * used * (source if reads_source else target)
    head = (shape.padded_vocab_size(config) + config.head_transform * config.hidden_size) * config.hidden_size
    counts = stacks(config)
    pairs = counts.get("encoder", 0) * source**2 + counts.get("decoder", 0) * target**2
    if config.shape == "encoder_decoder":
        pairs += counts["decoder"] * source * target
    attention = 12 * config.num_heads * shape.head_width(config) * pairs
    return round(arithmetic) + 6 * head * predicted + attention


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Count the FLOPs per token, as `flops_per_row` does, for a row that one stack reads and predicts completely."""
    source, target = {"encoder": (sequence_length, 0), "decoder": (0, sequence_length)}[config.shape]
    return flops_per_row(config, source=source, target=target, predicted=sequence_length) // sequence_length
