"""Numbers that a user gives to a command or to its counterpart in Python, and what they may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from typing import Any, NamedTuple

from bigtx.utils.errors import ConfigError


class Option(NamedTuple):
    """What a number may be that a user gives.

    Attributes:
        rule: in words.
        optional: whether None is a value.
    """

    kind: type
    fits: Callable[[Any], bool]
    rule: str
    optional: bool = False


SAMPLING = {
    "max_new_tokens": Option(Integral, lambda value: value >= 1, "a whole number, at least 1"),
    "temperature": Option(Real, lambda value: 0.0 <= value < math.inf, "a number, 0 or more"),
    "top_k": Option(Integral, lambda value: value >= 1, "a whole number, at least 1", optional=True),
    "top_p": Option(Real, lambda value: 0.0 < value <= 1.0, "a number above 0, at most 1", optional=True),
    "seed": Option(Integral, lambda value: True, "a whole number"),
}
OPTIONS = SAMPLING | {
    "batch_size": Option(Integral, lambda value: value >= 1, "a whole number, at least 1", optional=True)
}


def check_options(given: Mapping[str, Any], *, command_line: bool = False) -> None:
    """Refuse numbers that are out of range, from Python or the command line.

    Args:
        given: by the names of `OPTIONS`.

    Raises:
        ConfigError: names them all.
    """
    problems = []
    for name, option in OPTIONS.items():
        if name not in given:
            continue
        value = given[name]
        if value is None and option.optional:
            continue
        is_number = isinstance(value, option.kind) and not isinstance(value, bool)
        if not is_number or not option.fits(value):
            shown = f"--{name.replace('_', '-')}" if command_line else name
            problems.append(f"{shown}={value}: {option.rule}")
    if problems:
        raise ConfigError("; ".join(problems))
