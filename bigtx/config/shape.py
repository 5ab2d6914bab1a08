"""The sizes that follow from a ModelConfig: what an empty field means, for the model and for the plan alike."""

from __future__ import annotations

from bigtx.config.schema import ModelConfig

VOCABULARY_MULTIPLE = 128
"""Rows of the embedding and of the head are a multiple of this, so that their matrix products fill whole tiles."""

GATED = ("swiglu", "geglu")
"""The feed-forwards with a gate: three matrices instead of two."""


def head_width(config: ModelConfig) -> int:
    """Width C of one attention head."""
    if config.head_width is not None:
        return config.head_width
    assert config.hidden_size % config.num_heads == 0, "num_heads does not divide hidden_size"
    return config.hidden_size // config.num_heads


def num_kv_heads(config: ModelConfig) -> int:
    """Key and value heads K."""
    heads = config.num_heads if config.num_kv_heads is None else config.num_kv_heads
    assert config.num_heads % heads == 0, "num_kv_heads does not divide num_heads"
    return heads


def mlp_size(config: ModelConfig) -> int:
    """Inner width of the feed-forward; a gated one pays for its third matrix by a width of 8/3 D (arXiv:2002.05202)."""
    if config.mlp_size is not None:
        return config.mlp_size
    if config.mlp in GATED:
        return -(-8 * config.hidden_size // (3 * 64)) * 64
    return 4 * config.hidden_size


def padded_vocab_size(config: ModelConfig) -> int:
    """Rows of the embedding table and of the head: vocab_size rounded up to a multiple of 128."""
    assert config.vocab_size is not None, "vocab_size comes from the tokenizer before a model is built"
    return -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
