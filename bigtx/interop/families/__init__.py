"""The families of transformers models that bigtx reads and writes, and the choice of one for an export, which is known
from a run's config and tokenizer before training.

A module here ends with `FAMILIES`, its families in the order in which an export tries them.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from bigtx.config.schema import ModelConfig, RunConfig
from bigtx.interop.classes import class_problems, pooling_of, refuse_ambiguous_end, write_classes
from bigtx.interop.family import Family
from bigtx.tokenizer.tokenizer import Tokenizer
from bigtx.utils.errors import ConfigError


@cache
def families() -> dict[str, Family]:
    """Return every family by its model_type, in the order in which an export tries them: the first that can express a
    config is used.
    """
    from bigtx.interop.families import decoders, encoders, experts, t5

    every = [family for module in (decoders, experts, encoders, t5) for family in module.FAMILIES]
    return {family.model_type: family for family in every}


def by_model_type(model_type: str) -> Family:
    """Return the family of a name.

    Raises:
        ConfigError: bigtx has no family of that name.
    """
    if model_type not in families():
        known = ", ".join(sorted(families()))
        raise ConfigError(f"model_type {model_type!r} is not one that bigtx reads and writes, which are {known}")
    return families()[model_type]


def choose(config: ModelConfig, name: str | None = None, *, pooling: str | None = None) -> Family:
    """Return the family for the export of a model: the first that can express it, or the named one.

    Args:
        pooling: the classify.pooling of a classifier.

    Raises:
        ConfigError: no family, or not the named one, can express the model; the message names the fields that differ.
    """
    candidates = [by_model_type(name)] if name else list(families().values())
    problems = [(family, [*family.problems(config), *class_problems(family, config, pooling)]) for family in candidates]
    for family, found in problems:
        if not found:
            return family
    if name:
        raise ConfigError(f"the family {name} cannot express this model: {', '.join(problems[0][1])}")
    fewest = min(len(found) for _, found in problems)
    nearest = [f"{family.model_type}: {', '.join(found)}" for family, found in problems if len(found) == fewest]
    what = f"no family of Hugging Face models that bigtx writes can express this model; nearest is {'; '.join(nearest)}"
    raise ConfigError(what)


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
    advice = "train with a tokenizer that has a separate padding token"
    refuse_ambiguous_end(pooling_of(run), tokenizer, tokenizer.pad_id, advice=advice)
    return family, family.write_config(run.model, tokenizer) | write_classes(family, run)
