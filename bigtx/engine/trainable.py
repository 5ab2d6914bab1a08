"""Decide which parameters a run trains. The others are frozen: no gradient, no optimizer state and no master copy.

full fine-tuning, pretraining     all but optimizer.freeze
with model.lora                   the adapters, the head of classes and optimizer.train_also, without optimizer.freeze
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from bigtx.config.schema import RunConfig
from bigtx.utils.errors import ConfigError
from bigtx.utils.units import format_names

ADAPTERS = ("*.adapter.a", "*.adapter.b")
WITH_ADAPTERS = (*ADAPTERS, "head.classes.*", "head.pooler.*")
"""Parameters that are always trained with model.lora. A base rarely has a head of classes."""


def is_adapter(name: str) -> bool:
    """Return whether a parameter is one of the two matrices of an adapter."""
    return any(fnmatchcase(name, glob) for glob in ADAPTERS)


def frozen_parameters(config: RunConfig, names: Iterable[str]) -> list[str]:
    """Return the parameters that are not trained, in their order.

    Args:
        config: the config of the run.
        names: the names of all parameters of the model.

    Raises:
        ConfigError: a glob matches no parameter, or no parameter is left to train.
    """
    names, optimizer = list(names), config.optimizer
    for key, globs in (("freeze", optimizer.freeze), ("train_also", optimizer.train_also)):
        for glob in globs:
            if not any(fnmatchcase(name, glob) for name in names):
                raise ConfigError(f"optimizer.{key}: {glob!r} matches no parameter of the model; {_near(glob, names)}")
    frozen = [name for name in names if not is_trained(config, name)]
    if len(frozen) == len(names):
        raise ConfigError(
            f"optimizer.freeze=[{', '.join(optimizer.freeze)}] matches every parameter that would be trained; "
            "leave one out"
        )
    return frozen


def is_trained(config: RunConfig, name: str, *, also: Sequence[str] = ()) -> bool:
    """Return whether a run trains a parameter.

    Args:
        config: the config of the run.
        name: the parameter's name.
        also: globs that optimizer.train_also might have in addition to its own.
    """
    trained = [*WITH_ADAPTERS, *config.optimizer.train_also, *also] if config.model.lora.rank else ["*"]
    return _matches(name, trained) and not _matches(name, config.optimizer.freeze)


def refuse_untrained(names: Iterable[str], frozen: Iterable[str], config: RunConfig) -> None:
    """Refuse to freeze parameters that begin from the seed: they would keep their random values.

    Args:
        names: the parameters that the base does not have, or has only in part.
        frozen: the names of the parameters that are not trained.
        config: the config of the run.

    Raises:
        ConfigError: there are such parameters; the message says what to write.
    """
    still = set(frozen)
    untrained = [name for name in names if name in still]
    if not untrained:
        return
    shown = format_names(untrained, 5)
    advice = (
        "name them in optimizer.train_also"
        if config.model.lora.rank and not any(_matches(name, config.optimizer.freeze) for name in untrained)
        else "leave them out of optimizer.freeze"
    )
    raise ConfigError(f"{shown}: new in this run, so they begin from the seed, but they would not be trained; {advice}")


def _matches(name: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(name, glob) for glob in globs)


def _near(glob: str, names: list[str]) -> str:
    similar = difflib.get_close_matches(glob, names, 3, 0.5)
    if similar:
        return f"did you mean {' or '.join(similar)}?"
    parts = list(dict.fromkeys(".".join(name.split(".")[:2]) + ".*" for name in names))
    return f"there are {', '.join(parts[:8])}"
