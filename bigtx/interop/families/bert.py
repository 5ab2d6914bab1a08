"""BERT (arXiv:1810.04805) and RoBERTa (arXiv:1907.11692) with the head of masked language modelling.

They differ in the names of the head's tensors, in the rows of the position table before that of the first position,
and in the activation of the head, which in BERT is that of the feed-forwards and in RoBERTa always GELU.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import ENDING, Classifier
from bigtx.interop.families.common import plain_heads, special_ids, usual_scale
from bigtx.interop.family import Family, SaidByConfig
from bigtx.interop.fields import Fields, differing
from bigtx.interop.maps import Link, same, spelled
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError

FIXED: dict[str, Sequence[Any]] = {
    "shape": ("encoder",),
    "experts.num_experts": (0,),
    "bigram_rows": (0,),
    "norm": ("layer",),
    "norm_placement": ("post",),
    "embedding_norm": (True,),
    "norm_scale": (True,),
    "norm_bias": (True,),
    "qk_norm": (False,),
    "attention_window": (None,),
    "positions": ("learned",),
    "attention_bias": (True,),
    "attention_output_bias": (True,),
    "mlp_bias": (True,),
    "head_bias": (True,),
    "head_transform": (True,),
    "logit_scale": (1.0,),
    "logit_soft_cap": (None,),
}

BLOCK = {
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


@dataclass(kw_only=True)
class Bert(SaidByConfig):
    """A family of this group.

    Attributes:
        vocab_size: transformers' default if a config.json has none.
        activations: bigtx's feed-forwards by the names of their activations; of two names for one, the first is
            written.
        head_key: the module of the head, which holds only the bias if the head is tied.
        transform_key, norm_key: modules in the head.
        pooler_key, classes_key: modules of the classifier.
        pad_id: the default token id of padding in a config.json, if positions are counted from it.
    """

    model_type: str
    architecture: str
    vocab_size: int
    activations: dict[str, str]
    head_key: str
    transform_key: str
    norm_key: str
    pooler_key: str
    classes_key: str
    pad_id: int | None = None
    auto_class: str = "AutoModelForMaskedLM"

    @property
    def classifier(self) -> Classifier:
        """Return the form of the classifier: it reads the first token."""
        return Classifier(self.architecture.replace("ForMaskedLM", ENDING), "pooler", {"first": {}})

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields = Fields(values)
        fields.expect("position_embedding_type", "absolute", "is a kind of positions that bigtx does not have")
        fields.expect("is_decoder", False, "makes it a decoder, but bigtx has such models as encoders only")
        fields.expect("add_cross_attention", False, "needs attention to another model")
        offset = 0 if self.pad_id is None else fields.size("pad_token_id", self.pad_id, minimum=0) + 1
        config = ModelConfig(
            shape="encoder",
            vocab_size=fields.size("vocab_size", self.vocab_size),
            hidden_size=fields.size("hidden_size", 768),
            num_layers=fields.size("num_hidden_layers", 12),
            num_heads=fields.size("num_attention_heads", 12),
            mlp=fields.choice("hidden_act", self.activations, "gelu"),  # type: ignore[arg-type]
            mlp_size=fields.size("intermediate_size", 3072),
            norm="layer",
            norm_placement="post",
            embedding_norm=True,
            norm_eps=fields.number("layer_norm_eps", 1e-12),
            norm_bias=True,
            positions="learned",
            position_offset=offset,
            max_sequence_length=fields.size("max_position_embeddings", 512, minimum=offset + 1) - offset,
            num_token_types=fields.size("type_vocab_size", 2),
            attention_bias=True,
            attention_output_bias=True,
            mlp_bias=True,
            tie_embeddings=fields.flag("tie_word_embeddings", True),
            head_bias=True,
            head_transform=True,
            dropout=fields.number("hidden_dropout_prob", 0.1),
            attention_dropout=fields.number("attention_probs_dropout_prob", 0.1),
            init_std=fields.number("initializer_range", 0.02),
        )
        fields.finish()
        return config

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express, each as "model.FIELD=VALUE: why"."""
        allowed = {
            **plain_heads(config),
            "attention_scale": usual_scale(config),
            "mlp": tuple(self.activations.values()),
        }
        problems = differing(config, FIXED | allowed, {})
        if config.num_token_types == 0:
            problems.append(f"model.num_token_types=0: {self.model_type} has at least one row")
        if self.pad_id is None and config.position_offset:
            problems.append(f"model.position_offset={config.position_offset}: {self.model_type} has no offset")
        elif self.pad_id is not None and not config.position_offset:
            problems.append(f"model.position_offset=0: {self.model_type} has the id of the padding token + 1")
        return problems

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems.

        Raises:
            ConfigError: positions are counted from the id of the padding token, and the tokenizer has a different id.
        """
        if self.pad_id is not None and tokenizer.pad_id != config.position_offset - 1:
            raise ConfigError(
                f"a {self.model_type} counts its positions from the id of the padding token + 1: "
                f"model.position_offset={config.position_offset} needs the id {config.position_offset - 1}, but the "
                f"tokenizer's padding token is {tokenizer.pad_id}"
            )
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "intermediate_size": shape.mlp_size(config),
            "hidden_act": next(name for name, kind in self.activations.items() if kind == config.mlp),
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": shape.attention_dropout(config),
            "max_position_embeddings": config.max_sequence_length + config.position_offset,
            "position_embedding_type": "absolute",
            "type_vocab_size": config.num_token_types,
            "initializer_range": config.init_std,
            "layer_norm_eps": config.norm_eps,
            "tie_word_embeddings": config.tie_embeddings,
            "is_decoder": False,
            "add_cross_attention": False,
            **special_ids(tokenizer),
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """Return every parameter of bigtx in exactly one link."""
        embeddings = f"{self.model_type}.embeddings"
        outer = {
            "embedding": f"{embeddings}.word_embeddings",
            "position_embedding": f"{embeddings}.position_embeddings",
            "type_embedding": f"{embeddings}.token_type_embeddings",
            "embedding_norm": f"{embeddings}.LayerNorm",
            "head.transform": f"{self.head_key}.{self.transform_key}",
            "head.norm": f"{self.head_key}.{self.norm_key}",
            "head.pooler": self.pooler_key,
            "head.classes": self.classes_key,
            "head": self.head_key if config.tie_embeddings else f"{self.head_key}.decoder",
        }
        layers = f"{self.model_type}.encoder.layer"
        doubled = () if config.tie_embeddings or config.num_classes is not None else ("head.bias",)
        names = [name for name in parameter_shapes(config) if name not in doubled]
        # transformers stores an untied head's bias twice, and reads that of the decoder.
        keys = (f"{self.head_key}.decoder.bias", f"{self.head_key}.bias")
        return [
            *(same(name, spelled(name, outer, BLOCK, layers)) for name in names),
            *(Link((name,), keys, lambda held: held[:1], lambda held: held * 2) for name in doubled),
        ]

    def rename(self, key: str) -> str:
        """Return the keys of the first BERT releases, and of a model that was saved without its head."""
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            if key.endswith(old):
                key = key.removesuffix(old) + new
        return f"{self.model_type}.{key}" if key.startswith(("embeddings.", "encoder.", "pooler.")) else key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the pooler, the prediction of the next sentence, position numbers, and copies of tied tensors."""
        body, head = self.model_type, re.escape(self.head_key)
        beside = (rf"{body}\.pooler\..*", r"cls\.seq_relationship\..*", rf"{body}\.embeddings\.position_ids")
        return (*beside, rf"{head}\.decoder\.(weight|bias)") if config.tie_embeddings else beside


FAMILIES: tuple[Family, ...] = (
    Bert(
        model_type="bert",
        architecture="BertForMaskedLM",
        vocab_size=30522,
        # Its head has the activation of the feed-forwards, but bigtx's head has GELU.
        activations={"gelu": "gelu"},
        head_key="cls.predictions",
        transform_key="transform.dense",
        norm_key="transform.LayerNorm",
        pooler_key="bert.pooler.dense",
        classes_key="classifier",
    ),
    Bert(
        model_type="roberta",
        architecture="RobertaForMaskedLM",
        vocab_size=50265,
        activations={"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"},
        head_key="lm_head",
        transform_key="dense",
        norm_key="layer_norm",
        pooler_key="classifier.dense",
        classes_key="classifier.out_proj",
        pad_id=1,
    ),
)
