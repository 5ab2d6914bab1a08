"""The common parts of families of all shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.tokenizer.tokenizer import Tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the special ids for config.json; several ids that end a text are a list."""
    return {
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }


def usual_scale(config: ModelConfig) -> tuple[float | None, float]:
    """Return the values of attention_scale that mean 1 / sqrt(head_width)."""
    return None, shape.head_width(config) ** -0.5


def plain_heads(config: ModelConfig) -> dict[str, Sequence[Any]]:
    """Return the fields of a config in which each head has its own keys, and all heads together are hidden_size
    wide.
    """
    return {"num_kv_heads": (None, config.num_heads), "head_width": (None, config.hidden_size // config.num_heads)}
