"""Decoders: Llama (arXiv:2302.13971) and its group (Mistral, Qwen2, Qwen3), GPT-2, and NanoChat."""

from __future__ import annotations

from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import ENDING, decoder_classifier
from bigtx.interop.families.positions import LayerWindows, Rope, Window
from bigtx.interop.family import Family, Link, swapped_halves
from bigtx.interop.table import (
    NO_EXPERTS,
    OUTPUT_AS_INPUTS,
    PLAIN_HEADS,
    USUAL_SCALE,
    Constant,
    Entry,
    Fields,
    Row,
    fixed,
    heads_of_keys,
    refused,
    usual_scale,
    width_of_heads,
)

AUTO_CLASS = "AutoModelForCausalLM"
DECODER = fixed(
    shape="decoder",
    norm_placement="pre",
    prefix_attention=False,
    num_token_types=0,
    bigram_rows=0,
    head_bias=False,
    head_transform=False,
    logit_scale=1.0,
)

GATED = {"silu": "swiglu", "gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh"}
PLAIN = {"gelu_new": "gelu_tanh", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu", "relu2": "relu2"}
"""Feed-forwards with and without a gate by the names of their activations."""

ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
}
OUTER = {"embedding": "model.embed_tokens", "decoder.norm": "model.norm", "head": "lm_head", "head.classes": "score"}
BLOCK = ATTENTION | {
    "attention_norm": "input_layernorm",
    "attention.query_norm": "self_attn.q_norm",
    "attention.key_norm": "self_attn.k_norm",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}

PLAIN_MLP = (NO_EXPERTS, *fixed(mlp_bias=False))
NO_BIASES = fixed(attention_bias=False, attention_output_bias=False)
BOTH_BIASES = (Entry("attention_bias", "attention_bias", False), OUTPUT_AS_INPUTS)
"""The biases of all four projections, by one key."""


def sizes(*, num_kv_heads: Any = heads_of_keys, head_width: Any = width_of_heads) -> tuple[Row, ...]:
    """Return the rows of the sizes that Llama's group and NanoChat have under the same keys.

    Args:
        num_kv_heads, head_width: the defaults; those left out follow from the other fields.
    """
    return (
        Entry("vocab_size", "vocab_size"),
        Entry("hidden_size", "hidden_size"),
        Entry("intermediate_size", "mlp_size"),
        Entry("num_hidden_layers", "num_layers"),
        Entry("num_attention_heads", "num_heads"),
        Entry("num_key_value_heads", "num_kv_heads", num_kv_heads),
        Entry("head_dim", "head_width", head_width),
        Entry("max_position_embeddings", "max_sequence_length"),
        Entry("tie_word_embeddings", "tie_embeddings", False),
        Entry("initializer_range", "init_std", 0.02),
        Constant("attention_dropout", 0.0),
    )


def llama_table(
    *own: Row, norm_eps: float = 1e-6, rope_theta: float = 10_000.0, qk_norm: bool = False, **defaults: int
) -> tuple[Row, ...]:
    """Return the table of a pre-norm decoder with RMSNorm, rotary positions and a gated feed-forward.

    Args:
        own: the rows of biases and windows, and those of the family alone.
        qk_norm: whether queries and keys are normalized.
        norm_eps, rope_theta: the defaults.
        defaults: those of `sizes`.
    """
    return (
        *DECODER,
        *sizes(**defaults),
        Entry("hidden_act", "mlp", "silu", meanings=GATED),
        *fixed(norm="rms", norm_scale=True, embedding_norm=False, qk_norm=qk_norm, positions="rope"),
        Entry("rms_norm_eps", "norm_eps", norm_eps),
        USUAL_SCALE,
        Rope(rope_theta),
        *own,
        *fixed(logit_soft_cap=None),
    )


class DividedHeads(Row):
    """The rule by which transformers refuses a LlamaConfig, even one with a head_dim."""

    def problems(self, config: ModelConfig) -> list[str]:
        """Return num_heads unless it divides hidden_size."""
        if config.hidden_size % config.num_heads:
            return [f"model.num_heads={config.num_heads}: the family needs a divisor of hidden_size"]
        return []


def llama_kin(
    model_type: str, architecture: str, table: tuple[Row, ...], kind: type[Family] = Family, **more: Any
) -> Family:
    """Return a family with the names of Llama's tensors.

    Args:
        more: further attributes of the kind.
    """
    return kind(
        model_type=model_type,
        architecture=architecture,
        auto_class=AUTO_CLASS,
        table=table,
        classifier=decoder_classifier(architecture.replace("ForCausalLM", ENDING)),
        outer=OUTER,
        block=BLOCK,
        bare=("embed_tokens.", "layers.", "norm."),
        unneeded=(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",),
        **more,
    )


class OptionalScale(Row):
    """GPT-2's `scale_attn_weights`: products of queries and keys with the usual factor, or with none."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set attention_scale."""
        config.attention_scale = None if fields.flag("scale_attn_weights", True) else 1.0

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return whether they have the usual factor."""
        return {"scale_attn_weights": config.attention_scale != 1.0 or shape.head_width(config) == 1}

    def problems(self, config: ModelConfig) -> list[str]:
        """Return a factor that is neither."""
        return refused(config, "attention_scale", (None, usual_scale(config), 1.0))


class Dropouts(Row):
    """GPT-2's two rates for residual sums and embeddings. bigtx has one for both."""

    KEYS = ("resid_pdrop", "embd_pdrop")

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set dropout; two rates that differ become 0."""
        rates = {fields.number(key, 0.1) for key in self.KEYS}
        config.dropout = rates.pop() if len(rates) == 1 else 0.0

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the rate for both."""
        return dict.fromkeys(self.KEYS, config.dropout)


GPT2_TABLE = (
    *DECODER,
    NO_EXPERTS,
    *fixed(norm="layer", norm_scale=True, norm_bias=True, embedding_norm=False, qk_norm=False, attention_window=None),
    Entry("vocab_size", "vocab_size"),
    Entry("n_embd", "hidden_size", 768),
    Entry("n_layer", "num_layers", 12),
    Entry("n_head", "num_heads", 12),
    *PLAIN_HEADS,
    Entry("activation_function", "mlp", "gelu_new", meanings=PLAIN),
    Entry("n_inner", "mlp_size", lambda config: 4 * config.hidden_size),
    Entry("layer_norm_epsilon", "norm_eps", 1e-5),
    OptionalScale(),
    Constant("scale_attn_by_inverse_layer_idx", False, "scales attention differently in each block"),
    Constant("add_cross_attention", False, "needs attention to a source"),
    *fixed(positions="learned", position_offset=0, attention_bias=True, attention_output_bias=True, mlp_bias=True),
    Entry("n_positions", "max_sequence_length", 1024),
    Entry("tie_word_embeddings", "tie_embeddings", True),
    Dropouts(),
    Entry("attn_pdrop", "attention_dropout", 0.1),
    Entry("initializer_range", "init_std", 0.02),
    *fixed(logit_soft_cap=None),
)


class SoftCap(Row):
    """NanoChat's `final_logit_softcapping`: 15 if config.json has none; null means no cap."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set logit_soft_cap."""
        key = "final_logit_softcapping"
        has_cap = fields.values.get(key, 15.0) is not None
        config.logit_soft_cap = fields.number(key, 15.0) if has_cap else None

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the cap or null."""
        return {"final_logit_softcapping": config.logit_soft_cap}


NANOCHAT_TABLE = (
    *DECODER,
    NO_EXPERTS,
    *fixed(norm="rms", norm_scale=False, embedding_norm=True, qk_norm=True, attention_window=None, positions="rope"),
    *sizes(),
    Entry("hidden_act", "mlp", "relu2", meanings=PLAIN),
    Entry("rms_norm_eps", "norm_eps", 1e-6),
    Rope(),
    *BOTH_BIASES,
    *fixed(mlp_bias=False),
    USUAL_SCALE,
    SoftCap(),
)


class NanoChat(Family):
    """Norms without a scale, also of the embeddings and of queries and keys, and rotations in the opposite direction.

    It normalizes queries and keys after rotating them, bigtx before: a rotation keeps lengths, so that without a scale
    both are the same.
    """

    def link(self, name: str, config: ModelConfig) -> Link | None:
        """Return the link of a parameter; queries and keys have the halves of their heads swapped."""
        if ".attention.query." in name or ".attention.key." in name:
            return swapped_halves(name, self.key(name, config), shape.head_width(config))
        return super().link(name, config)


FAMILIES: tuple[Family, ...] = (
    llama_kin(
        "llama",
        "LlamaForCausalLM",
        llama_table(
            NO_EXPERTS,
            *BOTH_BIASES,
            Entry("mlp_bias", "mlp_bias", False),
            *fixed(attention_window=None),
            DividedHeads(),
        ),
    ),
    llama_kin("mistral", "MistralForCausalLM", llama_table(*PLAIN_MLP, *NO_BIASES, Window(), num_kv_heads=8)),
    llama_kin(
        "qwen2",
        "Qwen2ForCausalLM",
        llama_table(*PLAIN_MLP, *fixed(attention_bias=True, attention_output_bias=False), LayerWindows()),
    ),
    llama_kin(
        "qwen3", "Qwen3ForCausalLM", llama_table(*PLAIN_MLP, *BOTH_BIASES, LayerWindows(), qk_norm=True, head_width=128)
    ),
    Family(
        model_type="gpt2",
        architecture="GPT2LMHeadModel",
        auto_class=AUTO_CLASS,
        table=GPT2_TABLE,
        classifier=decoder_classifier("GPT2ForSequenceClassification"),
        outer={
            "embedding": "transformer.wte",
            "position_embedding": "transformer.wpe",
            "decoder.norm": "transformer.ln_f",
            "head": "lm_head",
            "head.classes": "score",
        },
        block={
            "attention_norm": "ln_1",
            "attention.query": "attn.c_attn",
            "attention.output": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        layers="transformer.h",
        fused=(("attention.query", "attention.key", "attention.value"),),
        transposed=(".attention.", ".mlp."),
        prefix="transformer",
        bare=("wte.", "wpe.", "h.", "ln_f."),
        # The causal masks that old releases saved.
        unneeded=(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",),
    ),
    NanoChat(
        model_type="nanochat",
        architecture="NanoChatForCausalLM",
        auto_class=AUTO_CLASS,
        table=NANOCHAT_TABLE,
        outer={"embedding": "model.embed_tokens", "head": "lm_head"},
        block=ATTENTION | {"mlp.up": "mlp.fc1", "mlp.down": "mlp.fc2"},
        bare=("embed_tokens.", "layers."),
    ),
)
