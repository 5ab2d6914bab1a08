"""The export format of a run's model, which is known from its config and tokenizer before training."""

from __future__ import annotations

from typing import Any

from bigtx.config.schema import RunConfig
from bigtx.interop.classes import pooling_of, refuse_ambiguous_end, write_classes
from bigtx.interop.families import choose
from bigtx.interop.family import Family
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError


def family_of(run: RunConfig, name: str | None = None) -> Family:
    """Return the family of a run's model, by its config only.

    Args:
        name: the model_type to use; None uses the first that can express the model.

    Raises:
        ConfigError: the model does not read tokens, or no family can express it.
    """
    if run.model.audio.num_mel_bins:
        raise ConfigError(
            "the model reads audio (model.audio), but only models of tokens can be exported; use it by `bigtx predict`"
        )
    return choose(run.model, name, pooling=pooling_of(run))


def describe(run: RunConfig, tokenizer: Tokenizer, name: str | None = None) -> tuple[Family, dict[str, Any]]:
    """Return the family of a run's model, and the config.json of its export.

    Args:
        run: the run's config, with model.vocab_size set.
        name: as in `family_of`.

    Raises:
        ConfigError: the model cannot be exported.
    """
    family = family_of(run, name)
    refuse_ambiguous_end(pooling_of(run), tokenizer, tokenizer.pad_id)
    return family, family.write_config(run.model, tokenizer) | write_classes(family, run)


def export_note(run: RunConfig, tokenizer: Tokenizer) -> str | None:
    """Return a note for users before a training whose model cannot be exported; None if it can."""
    try:
        describe(run, tokenizer)
    except ConfigError as error:
        return f"note: this model cannot be exported to transformers: {error}; everything else works"
    return None
