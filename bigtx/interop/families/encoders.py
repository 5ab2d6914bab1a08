"""Encoders with the head of masked language modelling: BERT (arXiv:1810.04805), RoBERTa (arXiv:1907.11692) and
ModernBERT (arXiv:2412.13663).

BERT and RoBERTa differ in the names of the head's tensors, in the rows of the position table before that of the first
position, and in the activation of the head, which in BERT is that of the feed-forwards and in RoBERTa always GELU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import ENDING, Classifier
from bigtx.interop.families.positions import FULL, SLIDING, layer_types, read_interval
from bigtx.interop.family import Family, Link
from bigtx.interop.table import (
    NO_EXPERTS,
    OUTPUT_AS_INPUTS,
    PLAIN_HEADS,
    USUAL_SCALE,
    Constant,
    Entry,
    Fields,
    Fixed,
    Row,
    fixed,
)
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils import log
from bigtx.utils.errors import ConfigError

AUTO_CLASS = "AutoModelForMaskedLM"
ENCODER = (
    *fixed(
        shape="encoder",
        norm="layer",
        embedding_norm=True,
        norm_scale=True,
        qk_norm=False,
        bigram_rows=0,
        head_transform=True,
        logit_scale=1.0,
        logit_soft_cap=None,
    ),
    NO_EXPERTS,
    USUAL_SCALE,
    *PLAIN_HEADS,
    Entry("hidden_size", "hidden_size", 768),
    Entry("num_attention_heads", "num_heads", 12),
    Entry("initializer_range", "init_std", 0.02),
    Entry("tie_word_embeddings", "tie_embeddings", True),
)

BERT_BLOCK = {
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
"""The modules of a block, each with a weight and a bias."""


class OffsetPositions(Row):
    """RoBERTa's table of positions, whose first one is the id of the padding token + 1."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set position_offset and max_sequence_length."""
        config.position_offset = fields.size("pad_token_id", 1, minimum=0) + 1
        rows = fields.size("max_position_embeddings", 512, minimum=config.position_offset + 1)
        config.max_sequence_length = rows - config.position_offset

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the number of rows."""
        return {"max_position_embeddings": config.max_sequence_length + config.position_offset}

    def problems(self, config: ModelConfig) -> list[str]:
        """Return an offset that no id gives."""
        if config.position_offset:
            return []
        return ["model.position_offset=0: the family has the id of the padding token + 1"]


def bert_table(*own: Row, vocab_size: int, activations: Mapping[str, str]) -> tuple[Row, ...]:
    """Return the table of BERT or RoBERTa.

    Args:
        own: the rows of positions.
        vocab_size: the default.
    """
    return (
        *ENCODER,
        Entry("vocab_size", "vocab_size", vocab_size),
        Entry("num_hidden_layers", "num_layers", 12),
        Entry("intermediate_size", "mlp_size", 3072),
        Entry("hidden_act", "mlp", "gelu", meanings=activations),
        Entry("type_vocab_size", "num_token_types", 2),
        Entry("layer_norm_eps", "norm_eps", 1e-12),
        Entry("hidden_dropout_prob", "dropout", 0.1),
        Entry("attention_probs_dropout_prob", "attention_dropout", 0.1),
        *fixed(norm_placement="post", norm_bias=True, positions="learned", attention_window=None),
        *own,
        *fixed(attention_bias=True, attention_output_bias=True, mlp_bias=True, head_bias=True),
        Constant("position_embedding_type", "absolute", "is a kind of positions that bigtx does not have"),
        Constant("is_decoder", False, "makes it a decoder, but bigtx has such models as encoders only"),
        Constant("add_cross_attention", False, "needs attention to another model"),
    )


class Bert(Family):
    """BERT and RoBERTa. The module of a tied head holds only the bias."""

    def key(self, name: str, config: ModelConfig) -> str:
        """Return the foreign key of a parameter; the matrix of an untied head has a module of its own."""
        if name == "head.weight" and not config.tie_embeddings:
            return f"{self.outer['head']}.decoder.weight"
        return super().key(name, config)

    def link(self, name: str, config: ModelConfig) -> Link | None:
        """Return the link of a parameter. transformers stores an untied head's bias twice, and reads the decoder's."""
        if name != "head.bias" or config.tie_embeddings:
            return super().link(name, config)
        keys = (f"{self.outer['head']}.decoder.bias", f"{self.outer['head']}.bias")
        return Link((name,), keys, lambda held: held[:1], lambda held: held * 2)

    def rename(self, key: str) -> str:
        """Return the keys of the first BERT releases, and of a model that was saved without its head."""
        key = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", key)
        return super().rename(re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", key))


class Roberta(Bert):
    """RoBERTa: its positions depend on the tokenizer."""

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems.

        Raises:
            ConfigError: positions are counted from the id of the padding token, and the tokenizer has a different id.
        """
        if tokenizer.pad_id != config.position_offset - 1:
            raise ConfigError(
                f"a {self.model_type} counts its positions from the id of the padding token + 1: "
                f"model.position_offset={config.position_offset} needs the id {config.position_offset - 1}, but the "
                f"tokenizer's padding token is {tokenizer.pad_id}"
            )
        return super().write_config(config, tokenizer)


def bert(
    model_type: str, architecture: str, table: tuple[Row, ...], outer: Mapping[str, str], kind: type[Bert] = Bert
) -> Family:
    """Return BERT or RoBERTa.

    Args:
        outer: the names of the modules of the heads.
    """
    embeddings = f"{model_type}.embeddings"
    # The pooler, the prediction of the next sentence, and position numbers.
    unneeded = (rf"{model_type}\.pooler\..*", r"cls\.seq_relationship\..*", rf"{model_type}\.embeddings\.position_ids")
    return kind(
        model_type=model_type,
        architecture=architecture,
        auto_class=AUTO_CLASS,
        table=table,
        # The classifier reads the first token.
        classifier=Classifier(architecture.replace("ForMaskedLM", ENDING), "pooler", {"first": {}}),
        outer={
            "embedding": f"{embeddings}.word_embeddings",
            "position_embedding": f"{embeddings}.position_embeddings",
            "type_embedding": f"{embeddings}.token_type_embeddings",
            "embedding_norm": f"{embeddings}.LayerNorm",
            **outer,
        },
        block=BERT_BLOCK,
        layers=f"{model_type}.encoder.layer",
        prefix=model_type,
        bare=("embeddings.", "encoder.", "pooler."),
        unneeded=unneeded,
        copies=(rf"{re.escape(outer['head'])}\.decoder\.(weight|bias)",),
    )


class LayerKinds(Row):
    """ModernBERT's windows of blocks, and the two bases of their rotary frequencies."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set attention_window, global_attention_every, rope_theta and local_rope_theta."""
        windowed, every = self._windows(fields, config.num_layers)
        config.rope_theta, local_theta = self._thetas(fields)
        if windowed:
            config.attention_window = fields.size("local_attention", 128, minimum=2) // 2
            config.global_attention_every, config.local_rope_theta = every, local_theta

    def _windows(self, fields: Fields, num_layers: int) -> tuple[bool, int | None]:
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

    def _thetas(self, fields: Fields) -> tuple[float, float]:
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

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys in both spellings: releases of transformers before 5 have two keys for the bases."""
        window, every = config.attention_window, config.global_attention_every
        thetas = {FULL: config.rope_theta, SLIDING: config.local_rope_theta or config.rope_theta}
        values = {
            "layer_types": layer_types(config),
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in thetas.items()},
            "global_rope_theta": thetas[FULL],
            "local_rope_theta": thetas[SLIDING],
        }
        if window is not None:
            values["local_attention"] = 2 * window
        if window is None or every is not None:
            values["global_attn_every_n_layers"] = 1 if window is None else every
        return values


class ClassifierBias(Row):
    """ModernBERT's `classifier_bias`, which bigtx has as mlp_bias."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Add a problem if the two differ."""
        if fields.flag("classifier_bias", False) != config.mlp_bias:
            fields.problem("classifier_bias", "differs from mlp_bias, but bigtx has one setting for both")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the same as for mlp_bias."""
        return {"classifier_bias": config.mlp_bias}


class Dropouts(Row):
    """ModernBERT's rates for embeddings and feed-forwards. bigtx has one for both."""

    def read(self, fields: Fields, config: ModelConfig) -> None:
        """Set dropout to the rate of the embeddings."""
        config.dropout, other = (fields.number(f"{name}_dropout", 0.0) for name in ("embedding", "mlp"))
        if other != config.dropout:
            log.say(f"embedding_dropout={config.dropout} is used for mlp_dropout={other} too")

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the rate for all, and for classifiers."""
        return {f"{name}_dropout": config.dropout for name in ("embedding", "mlp", "classifier")}


MODERNBERT_TABLE = (
    *ENCODER,
    Entry("vocab_size", "vocab_size", 50368),
    Entry("num_hidden_layers", "num_layers", 22),
    Entry("intermediate_size", "mlp_size", 1152),
    Entry(
        "hidden_activation",
        "mlp",
        "gelu",
        meanings={"gelu": "geglu", "gelu_pytorch_tanh": "geglu_tanh", "gelu_new": "geglu_tanh", "silu": "swiglu"},
    ),
    *fixed(norm_placement="pre", num_token_types=0, positions="rope"),
    Fixed("rope_scaling.method", ("none",)),
    Entry("max_position_embeddings", "max_sequence_length", 8192),
    LayerKinds(),
    Entry("norm_eps", "norm_eps", 1e-5),
    Entry("norm_bias", "norm_bias", False),
    Entry("attention_bias", "attention_bias", False),
    OUTPUT_AS_INPUTS,
    Entry("mlp_bias", "mlp_bias", False),
    Entry("decoder_bias", "head_bias", True),
    ClassifierBias(),
    Constant("classifier_activation", "gelu", "is not one of the values that bigtx has: gelu"),
    Dropouts(),
    Entry("attention_dropout", "attention_dropout", 0.0),
)


class ModernBert(Family):
    """ModernBERT: its config.json names two special ids twice."""

    def special_ids(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the special ids for config.json."""
        return super().special_ids(tokenizer) | {"cls_token_id": tokenizer.begin_id, "sep_token_id": tokenizer.end_id}


FAMILIES: tuple[Family, ...] = (
    bert(
        "bert",
        "BertForMaskedLM",
        bert_table(
            *fixed(position_offset=0),
            Entry("max_position_embeddings", "max_sequence_length", 512),
            vocab_size=30522,
            # Its head has the activation of the feed-forwards, but bigtx's head has GELU.
            activations={"gelu": "gelu"},
        ),
        {
            "head.transform": "cls.predictions.transform.dense",
            "head.norm": "cls.predictions.transform.LayerNorm",
            "head.pooler": "bert.pooler.dense",
            "head.classes": "classifier",
            "head": "cls.predictions",
        },
    ),
    bert(
        "roberta",
        "RobertaForMaskedLM",
        bert_table(
            OffsetPositions(),
            vocab_size=50265,
            activations={"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
        ),
        {
            "head.transform": "lm_head.dense",
            "head.norm": "lm_head.layer_norm",
            "head.pooler": "classifier.dense",
            "head.classes": "classifier.out_proj",
            "head": "lm_head",
        },
        Roberta,
    ),
    ModernBert(
        model_type="modernbert",
        architecture="ModernBertForMaskedLM",
        auto_class=AUTO_CLASS,
        table=MODERNBERT_TABLE,
        classifier=Classifier(
            "ModernBertForSequenceClassification",
            "transform",
            {"first": {"classifier_pooling": "cls"}, "mean": {"classifier_pooling": "mean"}},
        ),
        outer={
            "embedding": "model.embeddings.tok_embeddings",
            "embedding_norm": "model.embeddings.norm",
            "encoder.norm": "model.final_norm",
            "head.transform": "head.dense",
            "head.norm": "head.norm",
            "head": "decoder",
            "head.classes": "classifier",
        },
        block={
            "attention_norm": "attn_norm",
            "attention.query": "attn.Wqkv",
            "attention.output": "attn.Wo",
            "mlp_norm": "mlp_norm",
            "mlp.gate": "mlp.Wi",
            "mlp.down": "mlp.Wo",
        },
        # The "input" of Wi goes through the activation, and its "gate" does not.
        fused=(("attention.query", "attention.key", "attention.value"), ("mlp.gate", "mlp.up")),
        bare=("embeddings.", "layers.", "final_norm."),
        copies=(r"decoder\.weight",),
    ),
)
