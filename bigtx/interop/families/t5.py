"""T5 (arXiv:1910.10683): the first release, and 1.1 with a gated feed-forward (arXiv:2002.05202) and a head of its own.

A tied head reads hidden states times 1 / sqrt(hidden_size), an untied one reads them as they are. Releases of
transformers before 5 distinguished the two by `tie_word_embeddings`; release 5 always writes true there, and
`scale_decoder_outputs` in addition.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.families.common import special_ids
from bigtx.interop.family import Family
from bigtx.interop.fields import Fields, differing
from bigtx.interop.maps import Link, same, spelled
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer

FIXED: dict[str, Sequence[Any]] = {
    "shape": ("encoder_decoder",),
    "experts.num_experts": (0,),
    "norm": ("rms",),
    "norm_placement": ("pre",),
    "embedding_norm": (False,),
    "norm_scale": (True,),
    "qk_norm": (False,),
    "attention_scale": (1.0,),
    "attention_window": (None,),
    "positions": ("relative",),
    "num_token_types": (0,),
    "bigram_rows": (0,),
    "attention_bias": (False,),
    "attention_output_bias": (False,),
    "mlp_bias": (False,),
    "head_bias": (False,),
    "head_transform": (False,),
    "logit_soft_cap": (None,),
}

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
    # The tanh approximation despite the name, as the published models were trained.
    "gated-gelu": "geglu_tanh",
    "gated-gelu_new": "geglu_tanh",
    "gated-silu": "swiglu",
}
"""The feed-forwards by the names of their projections; of two names for one, the first is written."""

HEAD = "lm_head.weight"
_TABLE = "block.0.layer.0.SelfAttention.relative_attention_bias"
OUTER = {
    "embedding": "shared",
    "encoder.relative_bias.table": f"encoder.{_TABLE}",
    "encoder.norm": "encoder.final_layer_norm",
    "decoder.relative_bias.table": f"decoder.{_TABLE}",
    "decoder.norm": "decoder.final_layer_norm",
    "head": "lm_head",
}


class T5:
    """T5ForConditionalGeneration."""

    model_type = "t5"
    architecture = "T5ForConditionalGeneration"
    auto_class = "AutoModelForSeq2SeqLM"
    classifier = None

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields = Fields(values)
        fields.expect("is_encoder_decoder", True, "makes it only a part of the model")
        begin = values.get("pad_token_id", 0)
        fields.expect("decoder_start_token_id", begin, f"is not pad_token_id={begin}, with which generation starts")
        tied = fields.flag("scale_decoder_outputs", fields.flag("tie_word_embeddings", True))
        hidden_size, num_layers = fields.size("d_model", 512), fields.size("num_layers", 6)
        config = ModelConfig(
            shape="encoder_decoder",
            vocab_size=fields.size("vocab_size", 32128),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_decoder_layers=fields.size("num_decoder_layers", num_layers),
            num_heads=fields.size("num_heads", 8),
            head_width=fields.size("d_kv", 64),
            mlp=fields.choice("feed_forward_proj", ACTIVATIONS, "relu"),  # type: ignore[arg-type]
            mlp_size=fields.size("d_ff", 2048),
            norm_eps=fields.number("layer_norm_epsilon", 1e-6),
            attention_scale=1.0,
            positions="relative",
            relative_num_buckets=fields.size("relative_attention_num_buckets", 32),
            relative_max_distance=fields.size("relative_attention_max_distance", 128),
            # The length of the published models' training; the architecture has no limit.
            max_sequence_length=fields.size("n_positions", 512),
            tie_embeddings=tied,
            logit_scale=hidden_size**-0.5 if tied else 1.0,
            dropout=fields.number("dropout_rate", 0.1),
        )
        fields.finish()
        return config

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Tie the head where the files have none: release 5 of transformers ties every new T5, and
        then does not scale the input of the head of a 1.1."""
        return config if HEAD in keys else replace(config, tie_embeddings=True)

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express, each as "model.FIELD=VALUE: why"."""
        allowed = {"num_kv_heads": (None, config.num_heads), "mlp": tuple(ACTIVATIONS.values())}
        problems = differing(config, FIXED | allowed, {})
        if config.logit_scale != 1.0 and not (config.tie_embeddings and _is_scaled(config)):
            formula = "1 or 1 / sqrt(hidden_size)" if config.tie_embeddings else "1"
            kind = "a tied" if config.tie_embeddings else "an untied"
            problems.append(f"model.logit_scale={config.logit_scale}: {kind} head of the family has {formula}")
        return problems

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems."""
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "d_model": config.hidden_size,
            "d_kv": shape.head_width(config),
            "d_ff": shape.mlp_size(config),
            "num_layers": config.num_layers,
            "num_decoder_layers": shape.num_decoder_layers(config),
            "num_heads": config.num_heads,
            "relative_attention_num_buckets": config.relative_num_buckets,
            "relative_attention_max_distance": config.relative_max_distance,
            "dropout_rate": config.dropout,
            "layer_norm_epsilon": config.norm_eps,
            "initializer_factor": 1.0,
            "feed_forward_proj": next(name for name, kind in ACTIVATIONS.items() if kind == config.mlp),
            "n_positions": config.max_sequence_length,
            "is_encoder_decoder": True,
            # transformers decides the scale by this; it finds out whether the head is tied by the files.
            "tie_word_embeddings": _is_scaled(config),
            "scale_decoder_outputs": _is_scaled(config),
            "use_cache": True,
            **{name: i for name, i in special_ids(tokenizer).items() if name != "bos_token_id"},
            "decoder_start_token_id": tokenizer.pad_id,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """Return every parameter of bigtx in exactly one link."""
        gated = config.mlp in shape.GATED
        blocks = {stack: _block(across=stack == "decoder", gated=gated) for stack in ("encoder", "decoder")}
        links = []
        for name in parameter_shapes(config):
            stack = "encoder" if name.startswith("encoder.") else "decoder"
            links.append(same(name, spelled(name, OUTER, blocks[stack], f"{stack}.block")))
        return links

    def rename(self, key: str) -> str:
        """Return the key as it is: T5 has had no other spelling."""
        return key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the copies of the shared table, and a bias of the cross attention that the first release stored and
        never read.
        """
        tied = r"(encoder|decoder)\.embed_tokens\.weight"
        unread = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
        return (tied, unread, re.escape(HEAD)) if config.tie_embeddings else (tied, unread)


def _is_scaled(config: ModelConfig) -> bool:
    """Return whether the head reads hidden states times 1 / sqrt(hidden_size)."""
    return math.isclose(config.logit_scale, config.hidden_size**-0.5, rel_tol=1e-6)


def _block(*, across: bool, gated: bool) -> dict[str, str]:
    """Return the modules of a block, which are numbered by sublayers."""
    letters = {"query": "q", "key": "k", "value": "v", "output": "o"}
    modules = {"attention_norm": "layer.0.layer_norm"}
    modules |= {f"attention.{name}": f"layer.0.SelfAttention.{letter}" for name, letter in letters.items()}
    if across:
        modules["cross_attention_norm"] = "layer.1.layer_norm"
        modules |= {f"cross_attention.{name}": f"layer.1.EncDecAttention.{letter}" for name, letter in letters.items()}
    last = "layer.2" if across else "layer.1"
    matrices = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    modules["mlp_norm"] = f"{last}.layer_norm"
    return modules | {f"mlp.{name}": f"{last}.DenseReluDense.{key}" for name, key in matrices.items()}


FAMILIES: tuple[Family, ...] = (T5(),)
