"""Options that a user gives to a command or to its counterpart in Python, and their allowed values."""

from __future__ import annotations

import argparse
import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

from bigtx.utils.errors import ConfigError


class Option(NamedTuple):
    """The rule for a number that a user gives.

    Attributes:
        rule: the rule in words.
        optional: whether None is a value.
        default: the value where the user gives none.
    """

    kind: type
    fits: Callable[[Any], bool]
    rule: str
    optional: bool = False
    default: float | None = None


SAMPLING = {
    "max_new_tokens": Option(Integral, lambda value: value >= 1, "a whole number, at least 1", default=256),
    "temperature": Option(Real, lambda value: 0.0 <= value < math.inf, "a number, 0 or more", default=0.8),
    "top_k": Option(Integral, lambda value: value >= 1, "a whole number, at least 1", optional=True),
    "top_p": Option(Real, lambda value: 0.0 < value <= 1.0, "a number above 0, at most 1", optional=True),
    "seed": Option(Integral, lambda value: True, "a whole number", default=1),
}
OPTIONS = SAMPLING | {
    "batch_size": Option(Integral, lambda value: value >= 1, "a whole number, at least 1", optional=True)
}


def check_options(given: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of range, from Python or the command line.

    Args:
        given: values by the names of `OPTIONS`.

    Raises:
        ConfigError: a number is out of range; the message names all of them.
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
            problems.append(f"{name}={value}: {option.rule}")
    if problems:
        raise ConfigError("; ".join(problems))


def writing_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return how a text is written: `SAMPLING` and the stop texts, with defaults where nothing is given.

    Args:
        given: options by name; `stop` is a text or a list of them.

    Returns:
        A value for each of `SAMPLING`, and `stop`, a list of texts.

    Raises:
        ConfigError: an option that is not known, or out of range.
    """
    known = [*SAMPLING, "stop"]
    for name in given:
        if name not in known:
            similar = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {similar[0]}?" if similar else f"the options are {', '.join(known)}"
            raise ConfigError(f"{name} is not an option of writing; {hint}")
    options = {name: option.default for name, option in SAMPLING.items()} | dict(given)
    check_options(options)
    stop = options.get("stop", [])
    stop = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stop, Sequence) or not all(isinstance(text, str) and text for text in stop):
        raise ConfigError(f"stop={stop!r:.80}: a text of at least one character, or a list of such texts")
    return options | {"stop": list(stop)}


def add_writing_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `writing_options` reads to a command."""
    for name, kind, metavar, meaning in (
        ("max-new-tokens", int, "N", "most tokens of a text"),
        ("temperature", float, "X", "0: the likeliest token"),
        ("top-k", int, "N", "draw from the N likeliest tokens only"),
        ("top-p", float, "X", "draw from the likeliest that reach X together"),
        ("seed", int, "N", "another seed, another text"),
    ):
        default = SAMPLING[name.replace("-", "_")].default
        shown = "all" if default is None else f"{default:g}"
        parser.add_argument(f"--{name}", metavar=metavar, type=kind, default=default, help=f"{meaning} ({shown})")
    parser.add_argument(
        "--stop", metavar="TEXT", action="append", default=[], help="end before this text; may be repeated (none)"
    )


def given_writing_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the options of `add_writing_options` that a command was given.

    Raises:
        ConfigError: as `writing_options`.
    """
    return writing_options({name: getattr(arguments, name) for name in [*SAMPLING, "stop"]})


def add_loading_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the weights of a run and for the device to a command."""
    parser.add_argument(
        "--weights", choices=["master", "ema"], default="master", help="ema: the averaged copy (master)"
    )
    parser.add_argument(
        "--device", type=_device, default="auto", help="auto, cpu, cuda, cuda:1, ... (auto: a GPU if there is one)"
    )


def _device(name: str) -> str:
    if not re.fullmatch(r"(?!gpu)[a-z]+(:\d+)?", name):
        raise argparse.ArgumentTypeError("is not a device; the devices are auto, cpu, cuda, cuda:1, ...")
    return name


def add_predicting_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of prediction to a command."""
    parser.add_argument(
        "--set", metavar="KEY=VALUE", nargs="+", default=[], help="how a task predicts, e.g. translate.num_beams=1"
    )
    parser.add_argument("--batch-size", metavar="N", type=int, help="records in a batch (32)")
