"""ModernBERT (arXiv:2412.13663) with the head of masked language modelling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import Classifier
from bigtx.interop.families.common import plain_heads, special_ids, usual_scale
from bigtx.interop.family import Family, SaidByConfig
from bigtx.interop.fields import Fields, differing
from bigtx.interop.maps import Link, same, spelled, split_rows
from bigtx.interop.windows import FULL, SLIDING, layer_types, read_interval
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils import log

FIXED: dict[str, Sequence[Any]] = {
    "shape": ("encoder",),
    "experts.num_experts": (0,),
    "norm": ("layer",),
    "norm_placement": ("pre",),
    "embedding_norm": (True,),
    "norm_scale": (True,),
    "qk_norm": (False,),
    "positions": ("rope",),
    "rope_scaling.method": ("none",),
    "num_token_types": (0,),
    "bigram_rows": (0,),
    "head_transform": (True,),
    "logit_scale": (1.0,),
    "logit_soft_cap": (None,),
}

ACTIVATIONS = {"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "silu": "swiglu"}
"""The feed-forwards by the names of their activations; of two names for one, the first is written."""

OUTER = {
    "embedding": "model.embeddings.tok_embeddings",
    "embedding_norm": "model.embeddings.norm",
    "encoder.norm": "model.final_norm",
    "head.transform": "head.dense",
    "head.norm": "head.norm",
    "head": "decoder",
    "head.classes": "classifier",
}
BLOCK = {
    "attention_norm": "attn_norm",
    "attention.query": "attn.Wqkv",
    "attention.output": "attn.Wo",
    "mlp_norm": "mlp_norm",
    "mlp.gate": "mlp.Wi",
    "mlp.down": "mlp.Wo",
}
FUSED = {
    "attention.query": ("attention.query", "attention.key", "attention.value"),
    # Its "input" goes through the activation, and its "gate" does not.
    "mlp.gate": ("mlp.gate", "mlp.up"),
}
"""Modules that are one module there, under the first of their names."""


class ModernBert(SaidByConfig):
    """ModernBertForMaskedLM."""

    model_type = "modernbert"
    architecture = "ModernBertForMaskedLM"
    auto_class = "AutoModelForMaskedLM"
    classifier = Classifier(
        "ModernBertForSequenceClassification",
        "transform",
        {"first": {"classifier_pooling": "cls"}, "mean": {"classifier_pooling": "mean"}},
    )

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields = Fields(values)
        num_layers = fields.size("num_hidden_layers", 22)
        windowed, every = _windows(fields, num_layers)
        theta, local_theta = _rope(fields)
        mlp_bias = fields.flag("mlp_bias", False)
        if fields.flag("classifier_bias", False) != mlp_bias:
            fields.problem("classifier_bias", "differs from mlp_bias, but bigtx has one setting for both")
        fields.choice("classifier_activation", {"gelu": True}, "gelu")
        attention_bias = fields.flag("attention_bias", False)
        dropouts = {name: fields.number(f"{name}_dropout", 0.0) for name in ("embedding", "attention", "mlp")}
        config = ModelConfig(
            shape="encoder",
            vocab_size=fields.size("vocab_size", 50368),
            hidden_size=fields.size("hidden_size", 768),
            num_layers=num_layers,
            num_heads=fields.size("num_attention_heads", 12),
            mlp=fields.choice("hidden_activation", ACTIVATIONS, "gelu"),  # type: ignore[arg-type]
            mlp_size=fields.size("intermediate_size", 1152),
            norm="layer",
            embedding_norm=True,
            norm_eps=fields.number("norm_eps", 1e-5),
            norm_bias=fields.flag("norm_bias", False),
            attention_window=fields.size("local_attention", 128, minimum=2) // 2 if windowed else None,
            global_attention_every=every if windowed else None,
            rope_theta=theta,
            local_rope_theta=local_theta if windowed else None,
            max_sequence_length=fields.size("max_position_embeddings", 8192),
            attention_bias=attention_bias,
            attention_output_bias=attention_bias,
            mlp_bias=mlp_bias,
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            head_bias=fields.flag("decoder_bias", True),
            head_transform=True,
            dropout=dropouts["embedding"],
            attention_dropout=dropouts["attention"],
            init_std=fields.number("initializer_range", 0.02),
        )
        fields.finish()
        if dropouts["mlp"] != config.dropout:
            log.say(f"embedding_dropout={config.dropout} is used for mlp_dropout={dropouts['mlp']} too")
        return config

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express, each as "model.FIELD=VALUE: why"."""
        allowed = {
            **plain_heads(config),
            "attention_scale": usual_scale(config),
            "mlp": tuple(ACTIVATIONS.values()),
            "attention_output_bias": (config.attention_bias,),
        }
        return differing(config, FIXED | allowed, {"attention_output_bias": "the family has it as attention_bias"})

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems."""
        window, every = config.attention_window, config.global_attention_every
        local_theta = config.local_rope_theta or config.rope_theta
        values = {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": shape.mlp_size(config),
            "hidden_activation": next(name for name, kind in ACTIVATIONS.items() if kind == config.mlp),
            "max_position_embeddings": config.max_sequence_length,
            "initializer_range": config.init_std,
            "norm_eps": config.norm_eps,
            "norm_bias": config.norm_bias,
            "attention_bias": config.attention_bias,
            "mlp_bias": config.mlp_bias,
            "decoder_bias": config.head_bias,
            "classifier_bias": config.mlp_bias,
            "classifier_activation": "gelu",
            "classifier_dropout": config.dropout,
            "attention_dropout": shape.attention_dropout(config),
            "embedding_dropout": config.dropout,
            "mlp_dropout": config.dropout,
            "layer_types": layer_types(config),
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": config.rope_theta},
                SLIDING: {"rope_type": "default", "rope_theta": local_theta},
            },
            # Releases of transformers before 5 have these in place of the two above.
            "global_rope_theta": config.rope_theta,
            "local_rope_theta": local_theta,
            "tie_word_embeddings": config.tie_embeddings,
            **special_ids(tokenizer),
            "cls_token_id": tokenizer.begin_id,
            "sep_token_id": tokenizer.end_id,
        }
        if window is not None:
            values["local_attention"] = 2 * window
        if window is None or every is not None:
            values["global_attn_every_n_layers"] = 1 if window is None else every
        return values

    def links(self, config: ModelConfig) -> list[Link]:
        """Return every parameter of bigtx in exactly one link."""
        return [link for name in parameter_shapes(config) if (link := _link(name))]

    def rename(self, key: str) -> str:
        """Return the keys of a model that was saved without its head."""
        return f"model.{key}" if key.startswith(("embeddings.", "layers.", "final_norm.")) else key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the copy of a tied table."""
        return (r"decoder\.weight",) if config.tie_embeddings else ()


def _link(name: str) -> Link | None:
    for first, modules in FUSED.items():
        if any(f".{module}." in name for module in modules[1:]):
            return None  # It is part of the link of the first.
        if f".{first}." in name:
            names = [name.replace(first, module) for module in modules]
            return split_rows(names, spelled(name, OUTER, BLOCK, "model.layers"))
    return same(name, spelled(name, OUTER, BLOCK, "model.layers"))


def _windows(fields: Fields, num_layers: int) -> tuple[bool, int | None]:
    """Return whether any layer has a window, and n if every n-th layer, from the first on, has none."""
    kinds = fields.values.get("layer_types")
    if kinds is None:
        # transformers before 5 wrote the rule, and later releases list the layers.
        every = fields.size("global_attn_every_n_layers", 3)
        return every > 1 and num_layers > 1, every
    interval = read_interval(fields, kinds)
    if len(kinds) != num_layers:
        fields.problem("layer_types", f"does not name each of the {num_layers} layers once")
    return any(kind != FULL for kind in kinds), interval


def _rope(fields: Fields) -> tuple[float, float]:
    """Return the bases of the frequencies of layers without a window, and of those with one."""
    theta = fields.number("global_rope_theta", 160_000.0)
    # If missing it has its own default; if null it is the other one in transformers before 5.
    local_theta = fields.number("local_rope_theta", theta if "local_rope_theta" in fields.values else 10_000.0)
    fields.expect("rope_scaling", {}, "scales rotary positions, which bigtx cannot do by kinds of layers")
    thetas = []
    for name, default in ((FULL, theta), (SLIDING, local_theta)):
        rope = Fields((fields.values.get("rope_parameters") or {}).get(name) or {}, f"rope_parameters.{name}.")
        rope.choice("rope_type", {"default": True}, "default")
        thetas.append(rope.number("rope_theta", default))
        fields.problems += rope.problems
    return thetas[0], thetas[1]


FAMILIES: tuple[Family, ...] = (ModernBert(),)
