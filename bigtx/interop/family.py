"""What a family of Hugging Face models must say of itself to be read and written."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from bigtx.config.schema.model import ModelConfig

if TYPE_CHECKING:
    from bigtx.interop.classes import Classifier
    from bigtx.interop.maps import Link
    from bigtx.tokenizer.tokenizer import Tokenizer


class SaidByConfig:
    """Of families whose config.json says all."""

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Return the config as it is."""
        return config


class Family(Protocol):
    """A kind of model that transformers knows, and how bigtx's fields and parameters express it.

    The vocabulary's padding is none of a family's business: links speak of embedding.weight, head.weight and head.bias,
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
        """Return its class that sorts texts; None: transformers has none, or bigtx does not write it."""
        ...

    def read_config(self, values: dict[str, Any]) -> ModelConfig:
        """Return bigtx's config of a config.json; vocab_size is set.

        Raises:
            ConfigError: it names every field whose value bigtx does not express.
        """
        ...

    def settled(self, config: ModelConfig, keys: Collection[str]) -> ModelConfig:
        """Return the config once it is known which tensors there are, where config.json does not say all of it."""
        ...

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family does not express, each as "model.FIELD=VALUE: why"."""
        ...

    def write_config(self, config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
        """Return a config.json of a config without problems, model_type and architectures included; `read_config`
        inverts it. Every field that matters is written out, so that another release's defaults change nothing.
        """
        ...

    def links(self, config: ModelConfig) -> list[Link]:
        """Return every parameter of bigtx in exactly one link, in the order in which a checkpoint is best written."""
        ...

    def rename(self, key: str) -> str:
        """Return an older spelling of a foreign key (another prefix, gamma for weight) as `links` spells it; else the
        key.
        """
        ...

    def unused(self, config: ModelConfig) -> Sequence[str]:
        """Regular expressions of whole foreign keys that may be there and are not needed: buffers, tied copies,
        poolers. Import reports them as dropped."""
        ...
