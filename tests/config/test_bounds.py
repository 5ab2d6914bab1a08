"""Every number of every schema has bounds, and nothing beyond them or that is not finite comes in."""

from __future__ import annotations

import dataclasses
import math
import re
import typing
from typing import Any

import pytest

from bigtx.config import schema
from bigtx.config.load import from_dict, load
from bigtx.config.schema import FinetuneConfig, PrepareConfig, PretrainConfig, TokenizerTrainConfig
from bigtx.config.settings import NAME, Setting, example_list, leaves, members
from bigtx.utils.errors import ConfigError

TOPS = (PretrainConfig, FinetuneConfig, PrepareConfig, TokenizerTrainConfig)
SECTIONS = [section for name, section in vars(schema).items() if name.endswith("Config")]


def is_number(annotation: Any) -> bool:
    """Whether int or float is somewhere in an annotation, e.g. of Optional[list[int]]."""
    return annotation in (int, float) or any(is_number(inner) for inner in typing.get_args(annotation))


def numbers(section: type) -> list[tuple[Setting, bool]]:
    """The settings of one section that are numbers, and whether the schema itself gives them a least value."""
    hints, own = typing.get_type_hints(section), {field.name: field for field in dataclasses.fields(section)}
    return [
        (setting, "minimum" in own[name].metadata)
        for name, setting in members(section).items()
        if is_number(hints[name])
    ]


def test_every_number_declares_its_bounds() -> None:
    assert {setting.key for top in TOPS for setting in leaves(top)} >= {"model.norm_eps", "optimizer.eps"}
    found = [(section, *number) for section in SECTIONS for number in numbers(section)]
    assert len(found) > 100
    for section, setting, is_declared in found:
        where = f"{section.__name__}.{setting.key}"
        assert setting.number is not None, f"{where}: the loader does not know that it is a number"
        assert is_declared and setting.maximum is not None, f"{where} has no bounds"
        assert math.isfinite(setting.minimum or 0) and math.isfinite(setting.maximum), where


def every_number() -> list[tuple[type, Setting]]:
    """Each number once, with a schema that has it."""
    return [
        (top, dataclasses.replace(setting, key=setting.key.replace(NAME, "a")))
        for top in TOPS
        for setting in leaves(top)
        if setting.number
    ]


def groups() -> list[tuple[type, list[Setting]]]:
    """The numbers of each schema, few enough at a time for one message about all of them."""
    found = every_number()
    return [
        (top, own[start : start + 15])
        for top in TOPS
        for own in [[setting for schema, setting in found if schema is top]]
        for start in range(0, len(own), 15)
    ]


def written(setting: Setting, number: object) -> str:
    """How a number is given to a setting on the command line."""
    form = {list: "[{}]", dict: "{{a: {}}}"}.get(typing.get_origin(setting.type), "{}")
    return f"{setting.key}={form.format(number)}"


@pytest.mark.parametrize("text", ["nan", ".nan", "inf", "-inf", ".inf", "1e999"])
def test_what_is_not_finite_is_refused_everywhere(text: str) -> None:
    for top, settings in groups():
        with pytest.raises(ConfigError) as caught:
            load(top, [written(setting, text) for setting in settings], check=False)
        for setting in settings:
            assert setting.key in str(caught.value)
    with pytest.raises(ConfigError, match=r"deepspeed\.a\.b"):
        load(PretrainConfig, [f"deepspeed.a.b={text}"], check=False)


def beyond(setting: Setting) -> tuple[float, float]:
    """A number below a setting's bounds, and one above them."""
    assert setting.minimum is not None and setting.maximum is not None
    if setting.number is int:
        return int(setting.minimum) - 1, int(setting.maximum) + 1
    below = setting.minimum - 1e-21
    return below if below != setting.minimum else setting.minimum - abs(setting.minimum) / 2, 2 * setting.maximum


def test_numbers_beyond_their_bounds_are_refused() -> None:
    for top, settings in groups():
        for side in range(2):
            with pytest.raises(ConfigError) as caught:
                load(top, [written(setting, beyond(setting)[side]) for setting in settings], check=False)
            lines = str(caught.value).splitlines()
            for setting in settings:
                # A setting of a dict is named with its key.
                found = [line for line in lines if re.match(rf"\W*{re.escape(setting.key)}(\.a|\[0\])?=", line)]
                assert len(found) == 1 and re.search(r"is too (small|large)|is not a", found[0]), (setting.key, lines)
        for bound in ("minimum", "maximum"):
            load(top, [written(setting, repr(getattr(setting, bound))) for setting in settings], check=False)


def test_the_example_of_a_list_of_numbers_is_accepted() -> None:
    lists = [(top, setting) for top, setting in every_number() if typing.get_origin(setting.type) is list]
    assert len(lists) > 2
    for top, setting in lists:
        load(top, [f"{setting.key}={example_list(setting)}"], check=False)


def test_values_of_python_are_bounded_too() -> None:
    for values in (
        {"optimizer": {"eps": 0}},
        {"model": {"norm_eps": -1.0}},
        {"optimizer": {"learning_rate": math.nan}},
    ):
        with pytest.raises(ConfigError, match=r"too small|not a number"):
            from_dict(PretrainConfig, values)


@pytest.mark.parametrize("text", ["0 s", "0.5 s", "1e15 s", "31 days"])
def test_a_time_out_that_nothing_can_wait_for(text: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.timeout=.*between 1 s and 30 days"):
        load(PretrainConfig, [f"engine.timeout={text}"])


@pytest.mark.parametrize("text", ["9" * 400 + " steps", "9" * 400 + " s", "1e99 tokens"])
def test_a_duration_that_no_number_holds(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.log_every=.*is too large"):
        load(PretrainConfig, [f"train.log_every={text}"], check=False)
