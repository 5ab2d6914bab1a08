"""The table of a family: the fields of bigtx's ModelConfig, the keys of config.json, and the defaults.

One row says three things: how a field is read from config.json, how it is written there, and which of its values the
family cannot express.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from bigtx.config import shape
from bigtx.config.schema.model import ModelConfig
from bigtx.utils.errors import ConfigError

SIZES: dict[str, Callable[[Any], Any]] = {
    "num_kv_heads": shape.num_kv_heads,
    "head_width": shape.head_width,
    "mlp_size": shape.mlp_size,
    "num_decoder_layers": shape.num_decoder_layers,
    "attention_dropout": shape.attention_dropout,
    "experts.expert_size": shape.expert_size,
}
"""The values of fields that may be empty."""


class Fields:
    """The values of a config.json, and the problems of those that bigtx cannot express.

    A key that is missing or null has its default; without a default that is a problem too. Keys that are not read are
    ignored, as in transformers.
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

    def choice(self, key: str, meanings: Mapping[str, Any], default: str) -> Any:
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
            what = f"config.json has fields that bigtx cannot express: {'; '.join(dict.fromkeys(self.problems))}"
            raise ConfigError(what)

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is None:
            if default is None:
                self.problems.append(f"{self.prefix}{key} is missing")
            return default
        return value


class Row:
    """A row of the table. Rows are read in order, so that a default may depend on fields of earlier rows."""

    def read(self, fields: Fields, config: Any) -> None:
        """Set fields of a config from config.json, and add problems to `fields`."""

    def write(self, config: Any) -> dict[str, Any]:
        """Return the entries of config.json for a config without problems."""
        return {}

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the fields that the family cannot express, each as "model.FIELD=VALUE: why"."""
        return []


@dataclass(frozen=True)
class Entry(Row):
    """A key of config.json and the field with the same value.

    Attributes:
        field: the name of the field, e.g. `experts.num_experts` for one in a section.
        default: the value if config.json does not have the key; a function of the config gives one that depends on
            earlier rows. None: the key is needed.
        meanings: the values of the field by their names in config.json; of two names for one, the first is written.
        kind: bool, float, or int for a size of at least 1: by default the type of the default, else int.
    """

    key: str
    field: str
    default: Any = None
    meanings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    kind: type | None = None

    def read(self, fields: Fields, config: Any) -> None:
        """Set the field."""
        default = self.default(config) if callable(self.default) else self.default
        kinds: dict[type, Callable[..., Any]] = {bool: fields.flag, float: fields.number, int: fields.size}
        read = functools.partial(fields.choice, meanings=self.meanings) if self.meanings else kinds[self._kind()]
        put(config, self.field, read(self.key, default=default))

    def _kind(self) -> type:
        return self.kind or (type(self.default) if isinstance(self.default, bool | float) else int)

    def write(self, config: Any) -> dict[str, Any]:
        """Return the key with its value."""
        value = SIZES.get(self.field, attrgetter(self.field))(config)
        names = [name for name, meaning in self.meanings.items() if meaning == value]
        return {self.key: names[0] if self.meanings else value}

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the field if no value of the key means the same."""
        if self.meanings:
            return refused(config, self.field, tuple(self.meanings.values()))
        value = attrgetter(self.field)(config)
        return [f"model.{self.field}=0: the family has at least 1"] if value == 0 and self._kind() is int else []


@dataclass(frozen=True)
class Fixed(Row):
    """A field without a key.

    Attributes:
        values: its values in the family, or functions of the config; the first one is read.
        why: the reason for a refusal; the default names the values.
    """

    field: str
    values: tuple[Any, ...]
    why: str = ""

    def read(self, fields: Fields, config: Any) -> None:
        """Set the field."""
        put(config, self.field, self._values(config)[0])

    def problems(self, config: ModelConfig) -> list[str]:
        """Return the field if it has another value."""
        return refused(config, self.field, self._values(config), self.why)

    def _values(self, config: ModelConfig) -> tuple[Any, ...]:
        return tuple(value(config) if callable(value) else value for value in self.values)


@dataclass(frozen=True)
class Constant(Row):
    """A key with one value.

    Attributes:
        why: the reason for a refusal of other values; "": they make no difference to bigtx.
    """

    key: str
    value: Any
    why: str = ""

    def read(self, fields: Fields, config: Any) -> None:
        """Add a problem if the value is another one."""
        if self.why:
            fields.expect(self.key, self.value, self.why)

    def write(self, config: Any) -> dict[str, Any]:
        """Return the key with its value."""
        return {self.key: self.value}


def fixed(**values: Any) -> tuple[Row, ...]:
    """Return a row for each field that has one value in the family."""
    return tuple(Fixed(name, (value,)) for name, value in values.items())


def usual_scale(config: ModelConfig) -> float:
    """Return the factor on the products of queries and keys that an empty attention_scale means."""
    return float(shape.head_width(config) ** -0.5)


def heads_of_keys(config: ModelConfig) -> int:
    """Return the num_kv_heads with which each head has its own keys."""
    return config.num_heads


def width_of_heads(config: ModelConfig) -> int:
    """Return the head_width with which all heads together are hidden_size wide."""
    return config.hidden_size // config.num_heads


NO_EXPERTS = Fixed("experts.num_experts", (0,))
USUAL_SCALE = Fixed("attention_scale", (None, usual_scale))
KEYS_OF_EACH_HEAD = Fixed("num_kv_heads", (None, heads_of_keys))
PLAIN_HEADS = (KEYS_OF_EACH_HEAD, Fixed("head_width", (None, width_of_heads)))
OUTPUT_AS_INPUTS = Fixed(
    "attention_output_bias", (lambda config: config.attention_bias,), "the family has it as attention_bias"
)


def put(config: Any, name: str, value: Any) -> None:
    """Set a field of a config, or of one of its sections."""
    section, _, last = name.rpartition(".")
    setattr(attrgetter(section)(config) if section else config, last, value)


def refused(config: ModelConfig, name: str, values: Sequence[Any], why: str = "") -> list[str]:
    """Return "model.FIELD=VALUE: why" if a field has none of some values, and has an effect."""
    value = attrgetter(name)(config)
    if value in values or name in _idle_fields(config):
        return []
    has = " or ".join(dict.fromkeys("none" if one is None else _plain(one) for one in values))
    return [f"model.{name}={_plain(value)}: {why or f'the family has {has}'}"]


def _idle_fields(config: ModelConfig) -> Sequence[str]:
    """Return the fields of the head of tokens, which have no effect in a classifier."""
    if config.num_classes is None:
        return ()
    idle = ("head_bias", "logit_scale", "logit_soft_cap")
    return idle if shape.class_head(config) == "transform" else (*idle, "head_transform")


def _plain(value: Any) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)
