"""T5 (arXiv:1910.10683): the first release, and 1.1 with a gated feed-forward (arXiv:2002.05202) and a head of its own.

A tied head reads hidden states times 1 / sqrt(hidden_size), an untied one reads them as they are. Releases of
transformers before 5 distinguished the two by `tie_word_embeddings`; release 5 always writes true there, and
`scale_decoder_outputs` in addition.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.family import Family, spelled
from bigtx.interop.table import KEYS_OF_EACH_HEAD, NO_EXPERTS, Constant, Entry, Fields, Row, fixed
from bigtx.tokenizer.tokenizer import Tokenizer

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
"""The feed-forwards by the names of their projections."""

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


class StartId(Row):
    """The id with which generation starts: bigtx has that of padding."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Add a problem if it is another one."""
        begin = fields.values.get("pad_token_id", 0)
        fields.expect("decoder_start_token_id", begin, f"is not pad_token_id={begin}, with which generation starts")


class Head(Row):
    """The head: a tied one reads hidden states times 1 / sqrt(hidden_size)."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set tie_embeddings and logit_scale."""
        tied = fields.flag("scale_decoder_outputs", fields.flag("tie_word_embeddings", True))
        config.tie_embeddings, config.logit_scale = tied, config.hidden_size**-0.5 if tied else 1.0

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return whether the input is scaled: transformers finds out by the files whether the head is tied."""
        return dict.fromkeys(("tie_word_embeddings", "scale_decoder_outputs"), _is_scaled(config))

    def problems(self, config: ModelConfig) -> list[str]:
        """Return a factor that the family does not have."""
        if config.logit_scale == 1.0 or (config.tie_embeddings and _is_scaled(config)):
            return []
        formula = "1 or 1 / sqrt(hidden_size)" if config.tie_embeddings else "1"
        kind = "a tied" if config.tie_embeddings else "an untied"
        return [f"model.logit_scale={config.logit_scale}: {kind} head of the family has {formula}"]


def _is_scaled(config: ModelConfig) -> bool:
    """Return whether the head reads hidden states times 1 / sqrt(hidden_size)."""
    return math.isclose(config.logit_scale, config.hidden_size**-0.5, rel_tol=1e-6)


TABLE = (
    *fixed(shape="encoder_decoder"),
    NO_EXPERTS,
    *fixed(norm="rms", norm_placement="pre", embedding_norm=False, norm_scale=True, qk_norm=False),
    Constant("is_encoder_decoder", True, "makes it only a part of the model"),
    StartId(),
    Entry("vocab_size", "vocab_size", 32128),
    Entry("d_model", "hidden_size", 512),
    Entry("num_layers", "num_layers", 6),
    Entry("num_decoder_layers", "num_decoder_layers", lambda config: config.num_layers),
    Entry("num_heads", "num_heads", 8),
    KEYS_OF_EACH_HEAD,
    Entry("d_kv", "head_width", 64),
    Entry("d_ff", "mlp_size", 2048),
    Entry("feed_forward_proj", "mlp", "relu", meanings=ACTIVATIONS),
    Entry("layer_norm_epsilon", "norm_eps", 1e-6),
    *fixed(attention_scale=1.0, attention_window=None, positions="relative", num_token_types=0, bigram_rows=0),
    Entry("relative_attention_num_buckets", "relative_num_buckets", 32),
    Entry("relative_attention_max_distance", "relative_max_distance", 128),
    # The length of the published models' training; the architecture has no limit.
    Entry("n_positions", "max_sequence_length", 512),
    *fixed(attention_bias=False, attention_output_bias=False, mlp_bias=False),
    *fixed(head_bias=False, head_transform=False, logit_soft_cap=None),
    Head(),
    Entry("dropout_rate", "dropout", 0.1),
    Constant("initializer_factor", 1.0),
    Constant("use_cache", True),
)


class T5(Family):
    """T5ForConditionalGeneration."""

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Tie the head where the files have none: release 5 of transformers ties every new T5, and
        then does not scale the input of the head of a 1.1."""
        return config if HEAD in keys else replace(config, tie_embeddings=True)

    def special_ids(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the special ids for config.json: no text has a begin id."""
        ids = super().special_ids(tokenizer) | {"decoder_start_token_id": tokenizer.pad_id}
        return {name: i for name, i in ids.items() if name != "bos_token_id"}

    def key(self, name: str, config: ModelConfig) -> str:
        """Return the foreign key of a parameter: the stacks number the sublayers of a block differently."""
        stack = "encoder" if name.startswith("encoder.") else "decoder"
        block = _block(across=stack == "decoder", gated=config.mlp in shape.GATED)
        return spelled(name, self.outer, block, f"{stack}.block")


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


FAMILIES: tuple[Family, ...] = (
    T5(
        model_type="t5",
        architecture="T5ForConditionalGeneration",
        auto_class="AutoModelForSeq2SeqLM",
        table=TABLE,
        outer=OUTER,
        # Copies of the shared table, and a bias of the cross attention that the first release stored and never read.
        unneeded=(
            r"(encoder|decoder)\.embed_tokens\.weight",
            r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",
        ),
    ),
)
