"""What is said to write in place of a value that cannot be read is accepted by the setting."""

from __future__ import annotations

import re

import pytest

from bigtx.config.convert import Converter
from bigtx.config.load import load
from bigtx.config.nodes import ProblemError, read_argument
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import NAME, leaves
from bigtx.utils.errors import ConfigError

SCHEMAS = (PretrainConfig, FinetuneConfig, PrepareConfig, TokenizerTrainConfig)
KINDS = {
    (repr(own.type), own.optional, own.kind, own.units, own.minimum, own.maximum): (
        schema,
        own.key.replace(NAME, "mine"),
    )
    for schema in SCHEMAS
    for own in leaves(schema)
}
"""One setting of each kind, with its schema."""
WRONG = (
    *("apple", "5 apples", "5", "0.5", "12:30", "010", "-010", "'8'", "-99", "9" * 30, "1e999", "200 %", "apple %"),
    *("null", "yes", "", "[red]", "[5, 0.5]", "[99, 98]", "{a: 8}", "{a: red}", "TRUEE", "???", "${seed}", "!!int 5"),
)
VALUES = re.compile(
    r".*(?:e\.g\.|such as|the least is|the most is|did you mean|; write(?= (?:true|false|[-\d]))) (.*)$"
)
"""What stands after the last of these is to be written."""
SETTING = re.compile(r"[a-z_]+(?:\.[a-z_]+)+$|a number of bytes$")
PLACEHOLDERS = ("TEXT", "NAME", "VALUE", "START-END", "...")


def problems(schema: type, argument: str) -> list[tuple[str, str]]:
    """What is said of a value by itself, whatever the other settings are, and of which key."""
    converter = Converter(schema)
    try:
        converter.convert(read_argument(argument))
    except ProblemError as error:
        return [(error.problem.key, error.problem.what)]
    return [(problem.key, problem.what.partition(" (")[0]) for problem in converter.problems]


def advised(key: str, what: str) -> list[str]:
    """The arguments that a problem says to write."""
    whole = [word.strip("'") for word in re.findall(r"'[\w.]+=[^']*'|[\w.]+=[^\s,;]*", what)]
    found = VALUES.search(what)
    values = re.split(r", or |, | or ", found[1].rstrip("?")) if found else []
    if key.endswith("]"):
        key, values = key.partition("[")[0], [f"[{value}]" for value in values]
    arguments = whole or [f"{key}={value}" for value in values if not SETTING.match(value)]
    return [each for each in arguments if "=" in each and not any(word in each for word in PLACEHOLDERS)]


@pytest.mark.parametrize(("schema", "key"), KINDS.values(), ids=lambda value: getattr(value, "__name__", value))
def test_a_value_that_is_advised_can_be_read(schema: type, key: str) -> None:
    said = {each for wrong in WRONG for each in problems(schema, f"{key}={wrong}")}
    followed = {argument: what for place, what in said for argument in advised(place, what)}
    refused = [f"{what}: {argument}: {problems(schema, argument)}" for argument, what in followed.items()]
    assert not [line for line in refused if not line.endswith(": []")]


def test_most_kinds_have_advice() -> None:
    given = [(schema, key, f"{key}={wrong}") for schema, key in KINDS.values() for wrong in WRONG]
    told = {key for schema, key, argument in given for each in problems(schema, argument) if advised(*each)}
    assert len(KINDS) > 40 and len(told) > 0.7 * len(KINDS)


@pytest.mark.parametrize("schema", [PretrainConfig, FinetuneConfig])
def test_a_duration_that_is_advised_is_of_use(schema: type) -> None:
    """Some are compared with the length of the run, or may not be times or shares of it."""
    found = 0
    for setting in (setting for setting in leaves(schema) if setting.kind == "duration"):
        examples = [argument for each in problems(schema, f"{setting.key}=5 apples") for argument in advised(*each)]
        assert examples
        for argument in examples:
            found += 1
            with pytest.raises(ConfigError) as caught:
                load(schema, [argument, "train.max_steps=1M"])
            assert setting.key not in str(caught.value), (argument, str(caught.value))
    assert found > 10
