"""The families of models that transformers knows and bigtx reads and writes, one module for each kin.

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
"""In the order in which an export tries them: of two that express a config, the first."""


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
        ConfigError: bigtx has none of that name.
    """
    if model_type not in families():
        known = ", ".join(sorted(families()))
        raise ConfigError(f"model_type {model_type!r} is not one that bigtx reads and writes; those are {known}")
    return families()[model_type]


def choose(config: ModelConfig, name: str | None = None, *, pooling: str | None = None) -> Family:
    """Return the family to write a model as: the first that expresses it, or the one named.

    Args:
        pooling: classify.pooling of a classifier.

    Raises:
        ConfigError: none expresses the model, or not the one named; it names the fields that stand in the way.
    """
    candidates = [by_model_type(name)] if name else list(families().values())
    problems = [(family, [*family.problems(config), *class_problems(family, config, pooling)]) for family in candidates]
    for family, found in problems:
        if not found:
            return family
    if name:
        raise ConfigError(f"the family {name} does not express this model: {', '.join(problems[0][1])}")
    fewest = min(len(found) for _, found in problems)
    nearest = [f"{family.model_type}: {', '.join(found)}" for family, found in problems if len(found) == fewest]
    raise ConfigError(
        f"no family of Hugging Face models that bigtx writes expresses this model; nearest is {'; '.join(nearest)}"
    )
