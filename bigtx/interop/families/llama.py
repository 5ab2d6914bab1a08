"""Llama (arXiv:2302.13971) and its group: Mistral, Qwen2 and Qwen3. They differ in biases, windows and norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import ENDING, Classifier, decoder_classifier
from bigtx.interop.families import decoder
from bigtx.interop.families.common import usual_scale
from bigtx.interop.family import Family, SaidByConfig
from bigtx.interop.fields import Fields, differing
from bigtx.interop.maps import Link, same, spelled
from bigtx.interop.rope import read_rope
from bigtx.interop.windows import (
    Window,
    read_layer_windows,
    read_window,
    window_problems,
    write_layer_windows,
    write_window,
)
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer

OUTER = {"embedding": "model.embed_tokens", "decoder.norm": "model.norm", "head": "lm_head", "head.classes": "score"}
BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}


@dataclass(frozen=True)
class LlamaKin(SaidByConfig):
    """A pre-norm decoder with RMSNorm, rotary positions and a gated feed-forward.

    Attributes:
        biases: the biases of attention: none; for all four projections, by `attention_bias`; always, or by
            `qkv_bias`, for queries, keys and values.
        windows: none; for all blocks (`sliding_window`), or where `use_sliding_window` switches it on; by block
            (`layer_types`).
        qk_norm: whether queries and keys are normalized.
        mlp_bias: whether there is a field for biases of the feed-forward.
        norm_eps, rope_theta, num_kv_heads, head_width, window: the defaults if a config.json does not have them; for
            heads, None means the value that follows from the other fields.
    """

    model_type: str
    architecture: str
    biases: Literal["none", "attention_bias", "inputs", "qkv_bias"] = "none"
    windows: Literal["none", "all", "switch", "layers"] = "none"
    qk_norm: bool = False
    mlp_bias: bool = False
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    num_kv_heads: int | None = None
    head_width: int | None = None
    window: int | None = None

    auto_class: ClassVar[str] = decoder.AUTO_CLASS

    @property
    def classifier(self) -> Classifier:
        """Return the form of the classifier: it reads the last token."""
        return decoder_classifier(self.architecture.replace("ForCausalLM", ENDING))

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields = Fields(values)
        config = self.read(fields)
        fields.finish()
        return config

    def read(self, fields: Fields) -> ModelConfig:
        """Return bigtx's config, and add problems to `fields`."""
        hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
        num_layers = fields.size("num_hidden_layers")
        theta, scaling = read_rope(fields, self.rope_theta)
        window, every = self._read_windows(fields, num_layers)
        inputs, output = self._read_biases(fields)
        return ModelConfig(
            vocab_size=fields.size("vocab_size"),
            hidden_size=hidden_size,
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=fields.size("num_key_value_heads", self.num_kv_heads or num_heads),
            head_width=fields.size("head_dim", self.head_width or hidden_size // num_heads),
            mlp=fields.choice("hidden_act", decoder.GATED, "silu"),  # type: ignore[arg-type]
            mlp_size=fields.size("intermediate_size"),
            norm_eps=fields.number("rms_norm_eps", self.norm_eps),
            qk_norm=self.qk_norm,
            attention_window=window,
            global_attention_every=every,
            rope_theta=theta,
            rope_scaling=scaling,
            max_sequence_length=fields.size("max_position_embeddings"),
            attention_bias=inputs,
            attention_output_bias=output,
            mlp_bias=self.mlp_bias and fields.flag("mlp_bias", False),
            tie_embeddings=fields.flag("tie_word_embeddings", False),
            init_std=fields.number("initializer_range", 0.02),
        )

    def _read_windows(self, fields: Fields, num_layers: int) -> Window:
        if self.windows == "all":
            return read_window(fields, self.window)
        if self.windows == "switch":
            used = fields.flag("use_sliding_window", False)
            return read_window(fields, 4096) if used else (None, None)
        if self.windows == "layers":
            return read_layer_windows(fields, self.layer_types(fields, num_layers))
        return None, None

    def layer_types(self, fields: Fields, num_layers: int) -> list[str]:
        """Return which blocks have a window if `layer_types` is missing: those from `max_window_layers` on."""
        if not fields.flag("use_sliding_window", False):
            return ["full_attention"] * num_layers
        first = fields.size("max_window_layers", 28, minimum=0)
        return ["sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)]

    def _read_biases(self, fields: Fields) -> tuple[bool, bool]:
        """Return whether queries, keys and values have a bias, and whether the output projection has one."""
        if self.biases == "attention_bias":
            both = fields.flag("attention_bias", False)
            return both, both
        if self.biases == "qkv_bias":
            return fields.flag("qkv_bias", True), False
        return self.biases == "inputs", False

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express."""
        found = differing(config, self.allowed(config), {"attention_output_bias": "the family has another rule"})
        # transformers refuses such a LlamaConfig even if it has a head_dim.
        if self.model_type == "llama" and config.hidden_size % config.num_heads:
            found.append(f"model.num_heads={config.num_heads}: the family needs a divisor of hidden_size")
        return found + window_problems(config, allowed=self.windows != "none", by_layer=self.windows == "layers")

    def allowed(self, config: ModelConfig) -> dict[str, Sequence[Any]]:
        """Return the values of the fields that are fixed in the family."""
        inputs: dict[str, tuple[bool, ...]] = {"none": (False,), "inputs": (True,)}
        return decoder.FIXED | {
            "experts.num_experts": (0,),
            "mlp": tuple(decoder.GATED.values()),
            "norm": ("rms",),
            "norm_scale": (True,),
            "embedding_norm": (False,),
            "qk_norm": (self.qk_norm,),
            "positions": ("rope",),
            "attention_scale": usual_scale(config),
            "attention_bias": inputs.get(self.biases, (True, False)),
            "attention_output_bias": (self.biases == "attention_bias" and config.attention_bias,),
            "mlp_bias": (True, False) if self.mlp_bias else (False,),
            "logit_soft_cap": (None,),
        }

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems."""
        values = {
            "model_type": self.model_type,
            "architectures": [self.architecture],
            **decoder.write_sizes(config, tokenizer),
        }
        if self.biases in ("attention_bias", "qkv_bias"):
            values[self.biases] = config.attention_bias
        if self.mlp_bias:
            values["mlp_bias"] = config.mlp_bias
        if self.windows == "layers":
            values |= write_layer_windows(config)
        elif self.windows != "none":
            values |= write_window(config)
        if self.windows == "switch":
            values["use_sliding_window"] = config.attention_window is not None
        return values

    def links(self, config: ModelConfig) -> list[Link]:
        """Link every parameter to its foreign name."""
        return [same(name, spelled(name, OUTER, BLOCK, "model.layers")) for name in parameter_shapes(config)]

    def rename(self, key: str) -> str:
        """Return the keys of a model that was saved without its head."""
        return f"model.{key}" if key.startswith(("embed_tokens.", "layers.", "norm.")) else key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the frequencies that old releases saved, and copies of tied tensors."""
        frequencies = r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq"
        return (frequencies, r"lm_head\.weight") if config.tie_embeddings else (frequencies,)


FAMILIES: Sequence[Family] = (
    LlamaKin("llama", "LlamaForCausalLM", biases="attention_bias", mlp_bias=True),
    LlamaKin("mistral", "MistralForCausalLM", windows="all", window=4096, num_kv_heads=8),
    LlamaKin("qwen2", "Qwen2ForCausalLM", biases="inputs", windows="layers"),
    LlamaKin("qwen3", "Qwen3ForCausalLM", biases="attention_bias", windows="layers", qk_norm=True, head_width=128),
)
