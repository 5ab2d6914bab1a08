"""A family of Hugging Face models that can be read and written: its table, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import Classifier
from bigtx.interop.links import Link, same, spelled, split_rows, transposed
from bigtx.interop.table import Fields, Row
from bigtx.model.size import parameter_shapes
from bigtx.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model of transformers, and its expression by bigtx's fields and parameters.

    Families do not handle the vocabulary's padding: links name embedding.weight, head.weight and head.bias,
    whose foreign tensors have vocab_size rows.

    Attributes:
        model_type: the family's name in config.json.
        architecture: the class that config.json's `architectures` names.
        auto_class: the class of transformers that loads it: AutoModelForCausalLM, ..MaskedLM or ..Seq2SeqLM.
        table: the fields of the config.
        classifier: its class that classifies texts; None: transformers has none, or bigtx does not write it.
        outer, block: the foreign names of bigtx's modules, outside of blocks and in a block.
        layers: the foreign name of the list of blocks.
        fused: modules of a block that are one module there, under the name of the first.
        bare: the beginnings of the keys of a model that was saved without its head, which lack `prefix`.
        unneeded: regular expressions of whole foreign keys that may exist and are not needed: buffers, poolers. Import
            reports them as dropped.
        copies: the same for the copies of tied tensors.
    """

    model_type: str
    architecture: str
    auto_class: str
    table: tuple[Row, ...]
    classifier: Classifier | None = None
    outer: Mapping[str, str]
    block: Mapping[str, str] = field(default_factory=dict)
    layers: str = "model.layers"
    fused: tuple[tuple[str, ...], ...] = ()
    prefix: str = "model"
    bare: tuple[str, ...] = ()
    unneeded: tuple[str, ...] = ()
    copies: tuple[str, ...] = (r"lm_head\.weight",)

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json; vocab_size is set.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        fields, config = Fields(values), ModelConfig()
        for row in self.table:
            row.read(fields, config)
        fields.finish()
        return config

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Return the config after the names of the tensors are known, for what config.json does not contain."""
        return config

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express, each as "model.FIELD=VALUE: why"."""
        return [problem for row in self.table for problem in row.problems(config)]

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems, model_type and architectures included; `read_config`
        inverts it. Every relevant field is written, so that another release's defaults have no effect.

        Raises:
            ConfigError: the tokenizer does not fit.
        """
        values: dict[str, Any] = {"model_type": self.model_type, "architectures": [self.architecture]}
        for row in self.table:
            values |= row.write(config)
        return values | self.special_ids(tokenizer)

    def special_ids(self, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the special ids for config.json; several ids that end a text are a list."""
        return {
            "bos_token_id": tokenizer.begin_id,
            "eos_token_id": tokenizer.end_ids if len(tokenizer.end_ids) > 1 else tokenizer.end_id,
            "pad_token_id": tokenizer.pad_id,
        }

    def links(self, config: ModelConfig) -> list[Link]:
        """Return links with every parameter of bigtx exactly once, in the best order for writing a checkpoint."""
        return [link for name in parameter_shapes(config) if (link := self.link(name, config)) is not None]

    def link(self, name: str, config: ModelConfig) -> Link | None:
        """Return the link of a parameter; None if it is part of another link."""
        transpose = self.transposes(name)
        for first, *others in self.fused:
            if any(f".{module}." in name for module in others):
                return None
            if f".{first}." in name:
                names = [name, *(name.replace(first, module) for module in others)]
                return split_rows(names, self.key(name, config), transpose=transpose)
        key = self.key(name, config)
        return transposed(name, key) if transpose else same(name, key)

    def key(self, name: str, config: ModelConfig) -> str:
        """Return the foreign key of a parameter."""
        return spelled(name, self.outer, self.block, self.layers)

    def transposes(self, name: str) -> bool:
        """Return whether the other side stores a parameter as [inputs, outputs]."""
        return False

    def rename(self, key: str) -> str:
        """Return an older spelling of a foreign key (another prefix, gamma for weight) as `links` spells it; else the
        key.
        """
        return f"{self.prefix}.{key}" if key.startswith(self.bare) else key

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return the regular expressions of keys that are not needed for a config."""
        return (*self.unneeded, *self.copies) if config.tie_embeddings else self.unneeded
