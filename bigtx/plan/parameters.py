"""How many parameters a model has and how much arithmetic a token costs, from its config alone. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bigtx.config import shape
from bigtx.config.schema import ModelConfig


@dataclass(frozen=True)
class Counts:
    """Numbers of parameters.

    Attributes:
        total: all of them, padding of the vocabulary included, a tied table once.
        embedding: tables of tokens, positions and relative distances, and the head where it is not tied.
        non_embedding: the rest: blocks and norms.
        active: those that a token meets; here all.
    """

    total: int
    embedding: int
    non_embedding: int
    active: int


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter, as in the model's `named_parameters()`."""
    hidden, rows = config.hidden_size, shape.padded_vocab_size(config)
    shapes: dict[str, tuple[int, ...]] = {"embedding.weight": (rows, hidden)}
    if config.positions == "learned":
        shapes["position_embedding.weight"] = (config.max_sequence_length, hidden)
    if config.positions == "relative":
        shapes["relative_bias.table.weight"] = (config.relative_num_buckets, config.num_heads)
    for index in range(config.num_layers):
        shapes |= {f"blocks.{index}.{name}": size for name, size in _block_shapes(config).items()}
    if config.norm_placement == "pre":
        shapes |= _norm_shapes("norm", config)
    if not config.tie_embeddings:
        shapes["head.weight"] = (rows, hidden)
    return shapes


def _block_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    hidden, inner, width = config.hidden_size, shape.mlp_size(config), shape.head_width(config)
    queries, keys = config.num_heads * width, shape.num_kv_heads(config) * width
    shapes = _norm_shapes("attention_norm", config) | _norm_shapes("mlp_norm", config)
    for name, outputs in (("query", queries), ("key", keys), ("value", keys)):
        shapes |= _linear_shapes(f"attention.{name}", hidden, outputs, config.attention_bias)
    shapes |= _linear_shapes("attention.output", queries, hidden, config.attention_output_bias)
    if config.qk_norm and config.norm_scale:
        shapes |= {"attention.query_norm.weight": (width,), "attention.key_norm.weight": (width,)}
    for name in ("gate", "up") if config.mlp in shape.GATED else ("up",):
        shapes |= _linear_shapes(f"mlp.{name}", hidden, inner, config.mlp_bias)
    return shapes | _linear_shapes("mlp.down", inner, hidden, config.mlp_bias)


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
    sizes = {name: math.prod(size) for name, size in parameter_shapes(config).items()}
    total = sum(sizes.values())
    blocks = sum(size for name, size in sizes.items() if name.startswith(("blocks.", "norm.")))
    return Counts(total=total, embedding=total - blocks, non_embedding=blocks, active=total)


def flops_per_token(config: ModelConfig, sequence_length: int) -> int:
    """Floating-point operations of a training step per token, forward and backward, recomputation left out.

    6 for each parameter of the blocks and the head (looked-up tables do no arithmetic), and 12 L (H C) T for attention
    over the full square, the usual convention (PaLM, arXiv:2204.02311, appendix B).
    """
    head = shape.padded_vocab_size(config) * config.hidden_size
    matrices = count_parameters(config).non_embedding + head
    attention_size = config.num_heads * shape.head_width(config)
    return 6 * matrices + 12 * config.num_layers * attention_size * sequence_length
