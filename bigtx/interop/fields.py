"""The reader of a config.json, field by field: all problems are collected and reported together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, TypeVar

from bigtx.config import shape
from bigtx.utils.errors import ConfigError

T = TypeVar("T")


class Fields:
    """The values of a config.json, and the problems of those that bigtx cannot express.

    A field that is missing or null has its default; without a default that is a problem too. Fields that are not
    read are ignored, as in transformers.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        """Args: prefix: the prefix of the keys in problems, e.g. `rope_parameters.`."""
        self.values = values
        self.prefix = prefix
        self.problems: list[str] = []

    def size(self, key: str, default: int | None = None, *, minimum: int = 1) -> int:
        """Return a whole number of at least `minimum`."""
        value = self._given(key, default)
        if isinstance(value, int) and not isinstance(value, bool) and value >= minimum:
            return value
        if value is not None:
            self.problem(key, f"is not a whole number of at least {minimum}")
        return minimum

    def number(self, key: str, default: float | None = None) -> float:
        """Return a field that is a number."""
        value = self._given(key, default)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if value is not None:
            self.problem(key, "is not a number")
        return 1.0

    def flag(self, key: str, default: bool) -> bool:
        """Return a field that is true or false."""
        value = self._given(key, default)
        if not isinstance(value, bool):
            self.problem(key, "is not true or false")
        return value is True

    def choice(self, key: str, meanings: Mapping[str, T], default: str) -> T:
        """Return the meaning of a name."""
        value = self._given(key, default)
        if isinstance(value, str) and value in meanings:
            return meanings[value]
        self.problem(key, f"is not one of the values that bigtx has: {', '.join(meanings)}")
        return next(iter(meanings.values()))

    def expect(self, key: str, allowed: Any, why: str) -> None:
        """Add a problem if a field is given, is not null, and differs from the only value that bigtx has."""
        value = self.values.get(key)
        if value is not None and value != allowed:
            self.problem(key, why)

    def problem(self, key: str, why: str) -> None:
        """Add the problem of a field whose value cannot be used."""
        self.problems.append(f"{self.prefix}{key}={self.values.get(key)!r} {why}")

    def finish(self) -> None:
        """Raise an error if there are problems.

        Raises:
            ConfigError: there are problems; the message names all of them.
        """
        if self.problems:
            raise ConfigError(
                f"config.json has fields that bigtx cannot express: {'; '.join(dict.fromkeys(self.problems))}"
            )

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.problems.append(f"{self.prefix}{key} is missing")
            return default
        return value


def differing(config: Any, allowed: Mapping[str, Sequence[Any]], why: Mapping[str, str]) -> list[str]:
    """Return the fields of a bigtx config whose values a family cannot express.

    Args:
        config: a ModelConfig.
        allowed: the values by field, e.g. `experts.num_experts` for a field in a section.
        why: the reason by field; the default is the family's value.

    Returns:
        "model.FIELD=VALUE: why" for each.
    """
    found, idle = [], _idle_fields(config)
    for name, values in allowed.items():
        if name in idle:
            continue
        value = attrgetter(name)(config)
        if value not in values:
            has = " or ".join(dict.fromkeys("none" if one is None else _plain(one) for one in values))
            found.append(f"model.{name}={_plain(value)}: {why.get(name, f'the family has {has}')}")
    return found


def _idle_fields(config: Any) -> Sequence[str]:
    """Return the fields of the head of tokens, which have no effect in a classifier."""
    if config.num_classes is None:
        return ()
    idle = ("head_bias", "logit_scale", "logit_soft_cap")
    return idle if shape.class_head(config) == "transform" else (*idle, "head_transform")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
