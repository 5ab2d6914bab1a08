"""What the decoders that bigtx reads and writes have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.tokenizer.tokenizer import Tokenizer

AUTO_CLASS = "AutoModelForCausalLM"

FIXED: dict[str, Sequence[Any]] = {
    "shape": ("decoder",),
    "norm_placement": ("pre",),
    "prefix_attention": (False,),
    "num_token_types": (0,),
    "head_bias": (False,),
    "head_transform": (False,),
    "logit_scale": (1.0,),
}
"""Values of fields that none of these families leaves open."""

GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
"""Feed-forwards with a gate by the name of their activation; of two names for one, the first is written."""

PLAIN = {
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Those without."""


def activation(mlp: str) -> str:
    """The name of a feed-forward's activation."""
    return next(name for names in (PLAIN, GATED) for name, kind in names.items() if kind == mlp)


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """The ids that config.json names."""
    return {
        "bos_token_id": tokenizer.begin_id,
        "eos_token_id": tokenizer.end_id,
        "pad_token_id": tokenizer.pad_id,
    }


def usual_scale(config: ModelConfig) -> tuple[float | None, float]:
    """The values of attention_scale that mean 1 / sqrt(head_width)."""
    return None, shape.head_width(config) ** -0.5
