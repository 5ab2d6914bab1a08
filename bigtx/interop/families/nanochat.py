"""NanoChat: norms without a scale, also of the embeddings and of queries and keys, and rotations in the opposite
direction.

It normalizes queries and keys after rotating them, bigtx before: a rotation keeps lengths, so that without a scale
both are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.families import decoder
from bigtx.interop.families.common import usual_scale
from bigtx.interop.family import Family, SaidByConfig
from bigtx.interop.fields import Fields, differing
from bigtx.interop.maps import Link, same, spelled, swapped_halves
from bigtx.interop.rope import read_rope
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer

FIXED = decoder.FIXED | {
    "experts.num_experts": (0,),
    "norm": ("rms",),
    "norm_scale": (False,),
    "embedding_norm": (True,),
    "qk_norm": (True,),
    "attention_window": (None,),
    "positions": ("rope",),
    "mlp_bias": (False,),
}
OUTER = {"embedding": "model.embed_tokens", "head": "lm_head"}
BLOCK = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}
SOFT_CAP = 15.0
"""The default if a config.json has none; null means none."""


class NanoChat(SaidByConfig):
    """NanoChatForCausalLM."""

    model_type = "nanochat"
    architecture = "NanoChatForCausalLM"
    auto_class = decoder.AUTO_CLASS
    classifier = None

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields = Fields(values)
        hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        theta, scaling = read_rope(fields)
        biases = fields.flag("attention_bias", False)
        has_cap = values.get("final_logit_softcapping", SOFT_CAP) is not None
        config = ModelConfig(
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            num_layers=fields.size("num_hidden_layers"),
            num_heads=num_heads,
            num_kv_heads=fields.size("num_key_value_heads", num_heads),
            head_width=fields.size("head_dim", hidden_size // num_heads),
            mlp=fields.choice("hidden_act", decoder.PLAIN, "relu2"),  # type: ignore[arg-type]
            mlp_size=fields.size("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", 1e-6),
            norm_scale=False,
            embedding_norm=True,
            qk_norm=True,
            rope_theta=theta,
            rope_scaling=scaling,
            max_sequence_length=fields.size("max_position_embeddings"),
            attention_bias=biases,
            attention_output_bias=biases,
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            logit_soft_cap=fields.number("final_logit_softcapping", SOFT_CAP) if has_cap else None,
            init_std=fields.number("initializer_range", 0.02),
        )
        fields.finish()
        return config

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express."""
        allowed = FIXED | {
            "mlp": tuple(decoder.PLAIN.values()),
            "attention_output_bias": (config.attention_bias,),
            "attention_scale": usual_scale(config),
        }
        return differing(config, allowed, {"attention_output_bias": "the family has it as attention_bias"})

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems."""
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            **decoder.write_sizes(config, tokenizer),
            "attention_bias": config.attention_bias,
            "final_logit_softcapping": config.logit_soft_cap,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """Link every parameter to its foreign name; queries and keys with the halves of their heads swapped."""
        width = shape.head_width(config)
        links = []
        for name in parameter_shapes(config):
            key = spelled(name, OUTER, BLOCK, "model.layers")
            turned = ".attention.query." in name or ".attention.key." in name
            links.append(swapped_halves(name, key, width) if turned else same(name, key))
        return links

    def rename(self, key: str) -> str:
        """Return the keys of a model that was saved without its head."""
        return f"model.{key}" if key.startswith(("embed_tokens.", "layers.")) else key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the copies of tied tensors."""
        return (r"lm_head\.weight",) if config.tie_embeddings else ()


FAMILIES: tuple[Family, ...] = (NanoChat(),)
