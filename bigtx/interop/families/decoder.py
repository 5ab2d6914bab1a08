"""The common parts of the decoders that bigtx reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.families.common import special_ids
from bigtx.interop.rope import write_rope
from bigtx.tokenizer.tokenizer import Tokenizer

AUTO_CLASS = "AutoModelForCausalLM"

FIXED: dict[str, Sequence[Any]] = {
    "shape": ("decoder",),
    "norm_placement": ("pre",),
    "prefix_attention": (False,),
    "num_token_types": (0,),
    "bigram_rows": (0,),
    "head_bias": (False,),
    "head_transform": (False,),
    "logit_scale": (1.0,),
}
"""The values of fields that are fixed in all of these families."""

GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
"""Feed-forwards with a gate by the names of their activations; of two names for one, the first is written."""

PLAIN = {
    "gelu_new": "gelu_tanh",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}
"""Feed-forwards without a gate."""


def activation(mlp: str) -> str:
    """Return the name of a feed-forward's activation."""
    return next(name for names in (PLAIN, GATED) for name, kind in names.items() if kind == mlp)


def write_sizes(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the sizes that Llama, its group and NanoChat have under the same names in config.json."""
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": shape.mlp_size(config),
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": shape.num_kv_heads(config),
        "head_dim": shape.head_width(config),
        "hidden_act": activation(config.mlp),
        "max_position_embeddings": config.max_sequence_length,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        "initializer_range": config.init_std,
        **write_rope(config),
        **special_ids(tokenizer),
    }
