"""Options in a command line of settings: the few switches that exist, and advice for any other option."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence

from bigtx.config.nodes import COMMAND_LINE, Problem
from bigtx.config.settings import find, same_name_keys, similar_keys
from bigtx.utils.arguments import ASSIGNMENT, JSON_HELP, is_option, may_be_value
from bigtx.utils.secrets import is_secret_key, scrub_text
from bigtx.utils.shell import setting

PRINT_CONFIG = {"--print-config": "print the resolved configuration and exit"}
RANKS = "--ranks"
FLAGS = PRINT_CONFIG | {
    "--dry-run": "build everything, do one step and exit",
    RANKS: "how many ranks to start (one for each GPU), e.g. --ranks 2",
}
JSON = {"--json": JSON_HELP}
_SHORT = {"o": "output"}
_CLOSING = {"[": "]", "{": "}"}


def with_values(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """Yield each word, and with an option its value: that of `--steps=5`, or that of `--steps 5`, whose second word is
    left out.

    No option takes a value, so both are refused, and the value may be a secret: `--api-key X`.
    """
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not is_option(word):
            yield word, None
        elif "=" in word:
            option, _, value = word.partition("=")
            yield option, value
        else:
            yield word, rest.pop(0) if rest and may_be_value(rest[0]) else None


def undivided(words: Sequence[str]) -> tuple[list[str], list[Problem]]:
    """Return the words without the lists that a shell has divided at their spaces, and a problem for each of those."""
    rest, whole, problems = list(words), list[str](), list[Problem]()
    while rest:
        word = rest.pop(0)
        match = ASSIGNMENT.fullmatch(word)
        closing = _CLOSING.get(match["value"][:1]) if match else None
        end = next((place for place, other in enumerate(rest) if closing and other.endswith(closing)), None)
        if match is None or closing is None or word.endswith(closing) or end is None:
            whole.append(word)
            continue
        value = " ".join([match["value"], *rest[: end + 1]])
        del rest[: end + 1]
        meant = setting(match["key"], value if _may_be_shown(match["key"], value) else "[VALUE, VALUE]")
        problems.append(Problem(match["key"], "", f"has spaces, at which a shell divides it; quote it: {meant}"))
    return whole, problems


def refusal(schema: type, option: str, value: str | None) -> Problem:
    """Return what to write in place of an option: a setting, with the value if it is certain which setting is meant.

    Args:
        option: the option with its dashes.
        value: its value, as in `with_values`.
    """
    name = option.lstrip("-").replace("-", "_")
    name = _SHORT.get(name, name)
    keys = [name] if find(schema, name) else same_name_keys(schema, name)
    if keys:
        shown = value if value is not None and _may_be_shown(name, value) else "VALUE"
        return Problem(option, "", f"settings are written KEY=VALUE: {_either(setting(key, shown) for key in keys)}")
    if flags := difflib.get_close_matches(option, FLAGS, 1, 0.8):
        return Problem(option, "", f"no such option; did you mean {flags[0]}?", COMMAND_LINE)
    keys = similar_keys(schema, name) if name else []
    meant = f"did you mean {_either(f'{key}=VALUE' for key in keys)}?" if keys else "--help shows all"
    return Problem(option, "", f"no such option; settings are written KEY=VALUE; {meant}", COMMAND_LINE)


def _may_be_shown(name: str, value: str) -> bool:
    return not is_secret_key(name) and scrub_text(f"{name}={value}") == f"{name}={value}"


def _either(settings: Iterable[str]) -> str:
    return " or ".join(settings)
