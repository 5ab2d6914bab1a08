"""GPT-2: LayerNorm, learned positions, biases everywhere, and matrices that are stored as [inputs, outputs]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import decoder_classifier
from bigtx.interop.families import decoder
from bigtx.interop.families.common import plain_heads, special_ids, usual_scale
from bigtx.interop.family import Family, SaidByConfig
from bigtx.interop.fields import Fields, differing
from bigtx.interop.maps import Link, same, spelled, split_rows, transposed
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer

FIXED = decoder.FIXED | {
    "experts.num_experts": (0,),
    "norm": ("layer",),
    "norm_scale": (True,),
    "norm_bias": (True,),
    "embedding_norm": (False,),
    "qk_norm": (False,),
    "attention_window": (None,),
    "positions": ("learned",),
    "position_offset": (0,),
    "attention_bias": (True,),
    "attention_output_bias": (True,),
    "mlp_bias": (True,),
    "logit_soft_cap": (None,),
}
OUTER = {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "decoder.norm": "transformer.ln_f",
    "head": "lm_head",
    "head.classes": "score",
}
BLOCK = {
    "attention_norm": "ln_1",
    "attention.query": "attn.c_attn",
    "attention.output": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


class GPT2(SaidByConfig):
    """GPT2LMHeadModel."""

    model_type = "gpt2"
    architecture = "GPT2LMHeadModel"
    auto_class = decoder.AUTO_CLASS
    classifier = decoder_classifier("GPT2ForSequenceClassification")

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields = Fields(values)
        hidden_size = fields.size("n_embd", 768)
        fields.expect("scale_attn_by_inverse_layer_idx", False, "scales attention differently in each block")
        fields.expect("add_cross_attention", False, "needs attention to a source")
        dropouts = {fields.number(key, 0.1) for key in ("resid_pdrop", "embd_pdrop")}
        config = ModelConfig(
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            num_layers=fields.size("n_layer", 12),
            num_heads=fields.size("n_head", 12),
            mlp=fields.choice("activation_function", decoder.PLAIN, "gelu_new"),  # type: ignore[arg-type]
            mlp_size=fields.size("n_inner", 4 * hidden_size),
            norm="layer",
            norm_eps=fields.number("layer_norm_epsilon", 1e-5),
            norm_bias=True,
            attention_scale=None if fields.flag("scale_attn_weights", True) else 1.0,
            positions="learned",
            max_sequence_length=fields.size("n_positions", 1024),
            attention_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            # bigtx has one rate for both places.
            dropout=dropouts.pop() if len(dropouts) == 1 else 0.0,
            attention_dropout=fields.number("attn_pdrop", 0.1),
            init_std=fields.number("initializer_range", 0.02),
        )
        fields.finish()
        return config

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express."""
        allowed = FIXED | {
            "mlp": tuple(decoder.PLAIN.values()),
            "attention_scale": (*usual_scale(config), 1.0),
        }
        return differing(config, allowed | plain_heads(config), {})

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems."""
        return {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            "vocab_size": config.vocab_size,
            "n_embd": config.hidden_size,
            "n_layer": config.num_layers,
            "n_head": config.num_heads,
            "n_inner": shape.mlp_size(config),
            "n_positions": config.max_sequence_length,
            "activation_function": decoder.activation(config.mlp),
            "layer_norm_epsilon": config.norm_eps,
            "scale_attn_weights": not self._unscaled(config),
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
            "tie_word_embeddings": config.tie_embeddings,
            **dict.fromkeys(("resid_pdrop", "embd_pdrop"), config.dropout),
            "attn_pdrop": shape.attention_dropout(config),
            "initializer_range": config.init_std,
            **special_ids(tokenizer),
        }

    def _unscaled(self, config: ModelConfig) -> bool:
        return config.attention_scale == 1.0 and shape.head_width(config) != 1

    def links(self, config: ModelConfig) -> list[Link]:
        """Link the queries, keys and values to the one tensor that holds them there."""
        return [link for name in parameter_shapes(config) if (link := self._link(name))]

    def _link(self, name: str) -> Link | None:
        if ".attention.key." in name or ".attention.value." in name:
            return None  # It is part of the link of the queries.
        key = spelled(name, OUTER, BLOCK, "transformer.h")
        is_matrix = name.endswith(".weight") and (".attention." in name or ".mlp." in name)
        if ".attention.query." in name:
            names = [name.replace(".query.", f".{part}.") for part in ("query", "key", "value")]
            return split_rows(names, key, transpose=is_matrix)
        return transposed(name, key) if is_matrix else same(name, key)

    def rename(self, key: str) -> str:
        """Return the keys of a model that was saved without its head, as OpenAI's weights were."""
        return f"transformer.{key}" if key.startswith(("wte.", "wpe.", "h.", "ln_f.")) else key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the causal masks that old releases saved, and copies of tied tensors."""
        masks = r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"
        return (masks, r"lm_head\.weight") if config.tie_embeddings else (masks,)


FAMILIES: tuple[Family, ...] = (GPT2(),)
