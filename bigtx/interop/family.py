"""The interface of a family of Hugging Face models that can be read and written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bigtx.config.schema.model import ModelConfig

if TYPE_CHECKING:
    from bigtx.interop.classes import Classifier
    from bigtx.interop.maps import Link
    from bigtx.tokenizer.tokenizer import Tokenizer


class SaidByConfig:
    """The base of families whose config.json is sufficient."""

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Return the config as it is."""
        return config


class Family(Protocol):
    """A kind of model of transformers, and its expression by bigtx's fields and parameters.

    Families do not handle the vocabulary's padding: links name embedding.weight, head.weight and head.bias,
    whose foreign tensors have vocab_size rows.
    """

    @property
    def model_type(self) -> str:
        """Return the family's name in config.json."""
        ...

    @property
    def architecture(self) -> str:
        """Return the class that config.json's `architectures` names."""
        ...

    @property
    def auto_class(self) -> str:
        """Return the class of transformers that loads it: AutoModelForCausalLM, ..MaskedLM or ..Seq2SeqLM."""
        ...

    @property
    def classifier(self) -> Classifier | None:
        """Return its class that classifies texts; None: transformers has none, or bigtx does not write it."""
        ...

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json; vocab_size is set.

        Raises:
            ConfigError: bigtx cannot express a value; the message names every such field.
        """
        ...

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Return the config after the names of the tensors are known, for what config.json does not contain."""
        ...

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express, each as "model.FIELD=VALUE: why"."""
        ...

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return the config.json of a config without problems, model_type and architectures included; `read_config`
        inverts it. Every relevant field is written, so that another release's defaults have no effect.
        """
        ...

    def links(self, config: ModelConfig) -> list[Link]:
        """Return links with every parameter of bigtx exactly once, in the best order for writing a checkpoint."""
        ...

    def rename(self, key: str) -> str:
        """Return an older spelling of a foreign key (another prefix, gamma for weight) as `links` spells it; else the
        key.
        """
        ...

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Return regular expressions of whole foreign keys that may exist and are not needed: buffers, tied copies,
        poolers. Import reports them as dropped."""
        ...
