"""Parameters of a model and FLOPs per token, computed from the config. This module imports no torch."""

from __future__ import annotations

import math
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


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every parameter, as in the model's `named_parameters()`."""
    hidden, rows = config.hidden_size, shape.padded_vocab_size(config)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (rows, hidden)} if shape.has_embedding(config) else {}
    shapes |= _bigram_shapes(config) | _audio_shapes(config)
    if config.positions == "learned":
        shapes["position_embedding.weight"] = (config.max_sequence_length + config.position_offset, hidden)
    if config.num_token_types:
        shapes["type_embedding.weight"] = (config.num_token_types, hidden)
    if config.embedding_norm:
        shapes |= _norm_shapes("embedding_norm", config)
    for stack, num_layers in stacks(config).items():
        if config.positions == "relative":
            shapes[f"{stack}.relative_bias.table.weight"] = (config.relative_num_buckets, config.num_heads)
        for index in range(num_layers):
            block = _block_shapes(config, stack, index)
            shapes |= {f"{stack}.blocks.{index}.{name}": size for name, size in block.items()}
        if config.norm_placement == "pre":
            shapes |= _norm_shapes(f"{stack}.norm", config)
    shapes |= _adapter_shapes(config, shapes)
    if shape.has_transform(config):
        shapes |= _linear_shapes("head.transform", hidden, hidden, config.mlp_bias) | _norm_shapes("head.norm", config)
    if config.num_classes is not None:
        return shapes | _class_head_shapes(config, config.num_classes)
    if not config.tie_embeddings:
        shapes["head.weight"] = (rows, hidden)
    if config.head_bias:
        shapes["head.bias"] = (rows,)
    return shapes


def _class_head_shapes(config: ModelConfig, num_classes: int) -> dict[str, tuple[int, ...]]:
    form, hidden = shape.class_head(config), config.hidden_size
    pooler = _linear_shapes("head.pooler", hidden, hidden, bias=True) if form == "pooler" else {}
    return pooler | _linear_shapes("head.classes", hidden, num_classes, bias=form != "score")


def _adapter_shapes(config: ModelConfig, shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    adapters: dict[str, tuple[int, ...]] = {}
    for name in adapted_matrices(config):
        outputs, inputs = shapes[f"{name}.weight"]
        adapters |= {f"{name}.adapter.a": (config.lora.rank, inputs), f"{name}.adapter.b": (outputs, config.lora.rank)}
    return adapters


def stacks(config: ModelConfig) -> dict[str, int]:
    """Return the stacks of a model and their numbers of blocks."""
    layers = {"encoder": shape.num_encoder_layers(config), "decoder": shape.num_decoder_layers(config)}
    return {name: count for name, count in layers.items() if count}


def _bigram_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = config.hidden_size, shape.bigram_size(config)
    shapes: dict[str, tuple[int, ...]] = {}
    if config.bigram_rows:
        shapes["bigrams.table.weight"] = (config.bigram_rows, width)
        if width != hidden:
            shapes["bigrams.widen.weight"] = (hidden, width)
    return shapes


def _audio_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the convolutions of the front end, as matrices over the frames that they cover."""
    shapes: dict[str, tuple[int, ...]] = {}
    for index in range(len(config.audio.strides) if config.audio.num_mel_bins else 0):
        inputs = config.hidden_size if index else config.audio.num_mel_bins
        name = f"audio.convolutions.{index}"
        shapes |= _linear_shapes(name, shape.CONVOLUTION_WIDTH * inputs, config.hidden_size, bias=True)
    return shapes


def _block_shapes(config: ModelConfig, stack: str, index: int) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if not (config.embedding_norm and config.norm_placement == "pre" and index == 0):
        shapes |= _norm_shapes("attention_norm", config)
    shapes |= _attention_shapes("attention", config)
    if stack == "decoder" and config.shape == "encoder_decoder":
        shapes |= _norm_shapes("cross_attention_norm", config) | _attention_shapes("cross_attention", config)
    shapes |= _norm_shapes("mlp_norm", config)
    if config.experts.num_experts:
        return shapes | _expert_shapes(config)
    return shapes | _mlp_shapes("mlp", config, shape.mlp_size(config))


def _attention_shapes(name: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, width = config.hidden_size, shape.head_width(config)
    queries, keys = config.num_heads * width, shape.num_kv_heads(config) * width
    shapes: dict[str, tuple[int, ...]] = {}
    for part, outputs in (("query", queries), ("key", keys), ("value", keys)):
        shapes |= _linear_shapes(f"{name}.{part}", hidden, outputs, config.attention_bias)
    shapes |= _linear_shapes(f"{name}.output", queries, hidden, config.attention_output_bias)
    if config.qk_norm and config.norm_scale:
        shapes |= {f"{name}.query_norm.weight": (width,), f"{name}.key_norm.weight": (width,)}
    return shapes


def _mlp_shapes(name: str, config: ModelConfig, inner: int) -> dict[str, tuple[int, ...]]:
    hidden, bias = config.hidden_size, config.mlp_bias
    shapes: dict[str, tuple[int, ...]] = {}
    for part in ("gate", "up") if config.mlp in shape.GATED else ("up",):
        shapes |= _linear_shapes(f"{name}.{part}", hidden, inner, bias)
    return shapes | _linear_shapes(f"{name}.down", inner, hidden, bias)


def _expert_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    experts, hidden, inner = config.experts, config.hidden_size, shape.expert_size(config)
    shapes = _linear_shapes("mlp.router", hidden, experts.num_experts, bias=False)
    for part in ("gate", "up") if config.mlp in shape.GATED else ("up",):
        shapes[f"mlp.{part}"] = (experts.num_experts, inner, hidden)
    shapes["mlp.down"] = (experts.num_experts, hidden, inner)
    if experts.shared_size:
        shapes |= _mlp_shapes("mlp.shared", config, experts.shared_size)
    if experts.shared_size and experts.shared_gate:
        shapes |= _linear_shapes("mlp.shared_gate", hidden, 1, bias=False)
    return shapes


def _linear_shapes(name: str, inputs: int, outputs: int, bias: bool) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": (outputs, inputs)}
    if bias:
        shapes[f"{name}.bias"] = (outputs,)
    return shapes


def _norm_shapes(name: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    if config.norm_scale:
        shapes[f"{name}.weight"] = (config.hidden_size,)
    if config.norm_bias and config.norm == "layer":
        shapes[f"{name}.bias"] = (config.hidden_size,)
    return shapes


def count_parameters(config: ModelConfig) -> Counts:
    """Count the parameters of a model whose vocab_size is set."""
    total = sum(math.prod(size) for size in parameter_shapes(config).values())
    sizes = _of_stacks(config)
    blocks = sum(sizes.values())
    idle = sum(size for name, size in sizes.items() if name.endswith(_OF_EXPERTS)) * _idle_share(config)
    front_end = sum(math.prod(size) for size in _audio_shapes(config).values())
    return Counts(
        total=total,
        embedding=total - blocks - front_end,
        non_embedding=blocks + front_end,
        active=total - round(idle),
    )


def _of_stacks(config: ModelConfig) -> dict[str, int]:
    """Return the sizes of the parameters of the blocks and of the norms after the stacks."""
    shapes = {
        name: size for name, size in parameter_shapes(config).items() if name.startswith(("encoder.", "decoder."))
    }
    return {name: math.prod(size) for name, size in shapes.items() if ".relative_bias." not in name}


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
    arithmetic = 0.0
    for name, size in _of_stacks(config).items():
        used = size * (1.0 - _idle_share(config)) if name.endswith(_OF_EXPERTS) else size
        # Keys and values of the cross attention are computed from the source.
        reads_source = (
            name.startswith("encoder.") or ".cross_attention.key." in name or ".cross_attention.value." in name
        )
        per_weight = 4 if config.lora.rank and ".adapter." not in name else 6
        arithmetic += per_weight * used * (source if reads_source else target)
    arithmetic += 6 * math.prod(_bigram_shapes(config).get("bigrams.widen.weight", (0,))) * (source + target)
    frames = source * shape.frames_per_column(config)
    for name, convolution in _audio_shapes(config).items():
        if name.endswith(".weight"):
            frames //= config.audio.strides[int(name.split(".")[2])]
            arithmetic += 6 * math.prod(convolution) * frames
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
