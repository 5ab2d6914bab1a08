"""The families of transformers models that bigtx reads and writes, one module for each group.

A module here ends with `FAMILIES`, its families in the order in which an export tries them.
"""

from __future__ import annotations

import importlib
from functools import cache

from bigtx.config.schema.model import ModelConfig
from bigtx.interop.classes import class_problems
from bigtx.interop.family import Family
from bigtx.utils.errors import ConfigError

MODULES = ("llama", "gpt2", "nanochat", "experts", "bert", "modernbert", "t5")
"""The modules in the order in which an export tries them: the first that can express a config is used."""


@cache
def families() -> dict[str, Family]:
    """Return every family by its model_type."""
    found: dict[str, Family] = {}
    for name in MODULES:
        for family in importlib.import_module(f"{__name__}.{name}").FAMILIES:
            assert family.model_type not in found
            found[family.model_type] = family
    return found


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
    raise ConfigError(
        f"no family of Hugging Face models that bigtx writes can express this model; nearest is {'; '.join(nearest)}"
    )
