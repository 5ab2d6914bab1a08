"""The grammar of the command lines: `name=value` for what has a value, `--name` for a switch, plain words for the rest.

    bigtx generate RUN prompt='Once upon' temperature=0
    bigtx data stats CORPUS --json

`--name value`, `--name=value` and `-o value` mean the same as `name=value`; hyphens and underscores in a name are the
same. A word with `=` whose first part is not a name of the command is a path, if that exists; `./a=b` is always one.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import sys
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from bigtx.utils import shell
from bigtx.utils.errors import ConfigError
from bigtx.utils.secrets import scrub_text
from bigtx.utils.terminal import columns, wrapped

ASSIGNMENT = re.compile(r"(?P<key>[^\s=/]+)=(?P<value>.*)", re.DOTALL)
"""A word that gives a value to a name: `temperature=0`, `train.max_steps=500`."""
JSON_HELP = "print the result as JSON, alone on standard output"
_KINDS = {int: "a whole number", float: "a number"}
_OUTPUT = "output"
"""The name of what a command writes; `-o` is short for it in every command."""
_SETTINGS = "set"
"""The option that takes settings of a run, which are known by the dot in their keys: `translate.num_beams=1`."""
_KNOWN_ELSEWHERE = {
    "checkpoint": "run",
    "file": "input",
    "max_length": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "model": "run",
    "n": "max_new_tokens",
    "out": "output",
    "output_dir": "output",
    "temp": "temperature",
    "text": "prompt",
}
"""Names that other programs use for an option; too far from our names for a comparison of letters."""


def is_option(word: str) -> bool:
    """Return whether a word begins with a dash. A dash alone is the name of standard input."""
    return word.startswith("-") and word != "-"


def may_be_value(word: str) -> bool:
    """Return whether a word after an unknown option may be that option's value.

    It may be a secret (`--api-key X`): no message repeats it.
    """
    return not (is_option(word) or ASSIGNMENT.fullmatch(word) or os.path.exists(word))


def take(words: Iterable[str], name: str) -> tuple[str | None, list[str]]:
    """Return the value of one name among the words of a command that has a config.

    Returns:
        The last value that was given ("" where nothing follows the name, None without the name), and the other words.
    """
    value: str | None = None
    others: list[str] = []
    rest = iter(words)
    for word in rest:
        key, sign, written = word.partition("=")
        if sign and key in (name, f"--{name}"):
            value = written
        elif word == f"--{name}":
            value = next(rest, "")
        else:
            others.append(word)
    return value, others


class Arguments(argparse.ArgumentParser):
    """A parser of argparse that reads this grammar, explains it in its help, and raises `ConfigError` for mistakes.

    Options are added as for argparse: `add_argument("--top-k", type=int, help=...)` reads `top_k=5`.
    """

    def __init__(self, command: str, about: str = "", *, json: str = JSON_HELP, epilog: str = "") -> None:
        """Args:
        command: the command without `bigtx`.
        about: what it does.
        json: the help of `--json`; "" for a command that shows nothing as JSON.
        epilog: the end of its help.
        """
        super().__init__(f"bigtx {command}", description=about, epilog=epilog, allow_abbrev=False, add_help=False)
        if json:
            self.add_argument("--json", action="store_true", help=json)
        self.add_argument("-h", "--help", action="help", help="print this")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Read a command line; `--help` is answered here.

        Raises:
            ConfigError: something is wrong; the message names everything.
            SystemExit: after `--help`.
        """
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args(_Reader(self).read(words), namespace)

    def error(self, message: str) -> NoReturn:
        """Refuse a command line.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(f"{self.prog}: {message}")

    def alternatives(self) -> list[list[argparse.Action]]:
        """Return the groups of options of which exactly one is given."""
        return [group._group_actions for group in self._mutually_exclusive_groups if group.required]

    def exclusive(self) -> list[list[argparse.Action]]:
        """Return the groups of options of which at most one is given."""
        return [group._group_actions for group in self._mutually_exclusive_groups]

    def words(self) -> list[argparse.Action]:
        """Return what is given without a name, in its order."""
        return [action for action in self._actions if not action.option_strings]

    def options(self) -> list[argparse.Action]:
        """Return what is given with a name; the switches of every command come last."""
        options = [action for action in self._actions if action.option_strings]
        return sorted(options, key=lambda option: option.dest in ("json", "help"))

    def form(self) -> str:
        """Return the command with all that it needs."""
        either = [action for group in self.alternatives() for action in group]
        free = [option for option in self.options() if not option.required and option not in either]
        parts = [self.prog]
        parts += [f"[{shown(word)}]" if word.nargs in ("?", "*") else shown(word) for word in self.words()]
        parts += [shown(option) for option in self.options() if option.required]
        parts += [f"({' | '.join(shown(option) for option in group)})" for group in self.alternatives()]
        parts += ["[NAME=VALUE ...]"] * any(option.nargs != 0 for option in free)
        parts += [f"[{shown(option)}]" for option in free if option.nargs == 0 and option.dest != "help"]
        return " ".join(parts)

    def format_usage(self) -> str:
        """Return the command with all that it needs, as the first line of the help."""
        return wrapped(f"usage: {self.form()}", " " * 7, "") + "\n"

    def format_help(self) -> str:
        """Return the command, what it does, each name with its meaning within 80 columns, and the epilog as it is."""
        rows = []
        for action in [*self.words(), *self.options()]:
            short = [option for option in action.option_strings if not option.startswith("--")]
            name = ", ".join([*short, shown(action)]) if action.nargs == 0 else shown(action)
            meaning = (action.help or "") % (vars(action) | {"prog": self.prog})
            other_form = f"-o {_metavar(action)}" if action.option_strings else f"{_OUTPUT}={_metavar(action)}"
            also = f"; also {other_form}" if action.dest == _OUTPUT else ""
            rows.append((name, meaning + also))
        description = [wrapped(self.description), ""] if self.description else []
        more = ["", self.epilog] if self.epilog else []
        return "\n".join([self.format_usage(), *description, *columns(rows), *more]) + "\n"


def shown(action: argparse.Action) -> str:
    """Return an argument as a user writes it: RUN, output=FOLDER, --json."""
    if action.nargs == 0:
        return _long(action)
    return f"{_name(_long(action))}={_metavar(action)}" if action.option_strings else _metavar(action)


def _metavar(action: argparse.Action) -> str:
    if isinstance(action.metavar, str):
        return action.metavar
    return "|".join(map(str, action.choices)) if action.choices else action.dest.upper()


def _long(action: argparse.Action) -> str:
    return max(action.option_strings, key=len)


def _name(option: str) -> str:
    """Convert `--max-new-tokens` and `max-new-tokens` to max_new_tokens; a short option keeps its dash."""
    return option if re.fullmatch("-[^-]", option) else option.removeprefix("--").replace("-", "_")


class _Reader:
    """Puts a command line into the form that argparse reads one way only: `--name=value ... -- word ...`."""

    def __init__(self, parser: Arguments) -> None:
        self.parser = parser
        self.options = {_name(string): option for option in parser.options() for string in option.option_strings}
        self.named_words = {word.dest: word for word in parser.words()}
        self.names = self.named_words | self.options
        if _OUTPUT in self.names:
            self.names["-o"] = self.names[_OUTPUT]
        self.given: dict[argparse.Action, list[str]] = {}
        self.loose: list[str] = []
        self.problems: list[str] = []

    def read(self, words: Sequence[str]) -> list[str]:
        """Read all words.

        Raises:
            ConfigError: something is wrong; the message names everything.
        """
        rest = deque(words)
        while rest:
            word = rest.popleft()
            if word == "--":
                self.loose += rest
                break
            if is_option(word):
                self._read_option(word, rest)
            elif match := ASSIGNMENT.fullmatch(word):
                self._read_assignment(match["key"], match["value"], word)
            else:
                self.loose.append(word)
        self._place_words()
        self._check_whole()
        if self.problems:
            self.parser.error("; ".join(self.problems))
        return self._canonical()

    def _read_option(self, word: str, rest: deque[str]) -> None:
        written, sign, value = word.partition("=")
        option = self.names.get(_name(written))
        if option is None:
            self.problems.append(f"no option {written}{self._meant(written)}")
            if not sign and rest and may_be_value(rest[0]):
                rest.popleft()
        elif option.dest == "help":
            self.parser.print_help()
            raise SystemExit(0)
        elif option.nargs == 0 and sign:
            self.problems.append(f"{written} takes no value; write {shown(option)}")
        elif option.nargs == 0:
            self.given[option] = []
        elif sign:
            self._give(option, [value])
        elif values := self._values_after(option, rest):
            self._give(option, values)
        else:
            self.problems.append(f"{written} has no value; write {shown(option)}")

    def _values_after(self, option: argparse.Action, rest: deque[str]) -> list[str]:
        """Take the words that belong to an option which is followed by a space."""
        values: list[str] = []
        while rest and (not values or option.nargs in ("+", "*")):
            match = ASSIGNMENT.fullmatch(rest[0])
            is_own_name = match is not None and _name(match["key"]) in self.names
            is_known = is_option(rest[0]) and _name(rest[0]) in self.names
            if is_known or rest[0] == "--" or (values and (is_own_name or is_option(rest[0]))):
                break
            values.append(rest.popleft())
        return values

    def _read_assignment(self, key: str, value: str, word: str) -> None:
        name = _name(key)
        action = self.names.get(name)
        if action is None and "." in key and _SETTINGS in self.options:
            self._give(self.options[_SETTINGS], [word])
        elif action is None and os.path.exists(word):
            self.loose.append(word)
        elif action is None:
            path = f"; a path with = in it is written {shell.command('./PATH')}" if not self._similar(key) else ""
            self.problems.append(f"no option {key}{self._meant(key)}{path}")
        elif action.nargs == 0:
            self.problems.append(f"{key} is a switch and takes no value; write {shown(action)}")
        else:
            value = shell.at_home(value)
            self._give(action, _members(value) if action.nargs in ("+", "*") else [value])

    def _give(self, action: argparse.Action, values: list[str]) -> None:
        for value in values:
            if problem := _misfit(action, value):
                name = _name(_long(action)) if action.option_strings else action.dest
                self.problems.append(f"{scrub_text(shell.setting(name, value))}: {problem}")
        collects = action.nargs in ("+", "*") or isinstance(action, argparse._AppendAction)
        self.given[action] = [*self.given.get(action, []), *values] if collects else values

    def _place_words(self) -> None:
        """Give the words without a name to the arguments that are not given by name."""
        rest = deque(self.loose)
        for action in self.parser.words():
            if action in self.given:
                continue
            values = list(rest) if action.nargs in ("+", "*") else list(rest)[:1]
            for _ in values:
                rest.popleft()
            if values:
                self._give(action, values)
        if rest:
            self.problems.append(self._one_too_many(rest[0]))

    def _one_too_many(self, word: str) -> str:
        option = self.options.get(_name(word))
        if option is not None:
            return f"{word} has no value; write {shown(option)}" + ", without spaces" * (option.nargs != 0)
        needed = [group[0] for group in self._missing_options()]
        needed += [option for option in self.parser.options() if option.nargs != 0]
        example = f", e.g. {shown(needed[0])}" if needed else ""
        word = scrub_text(word) if len(word) <= 40 else scrub_text(word)[:37] + "..."
        return f"{word!r} is one word too many; an option is written NAME=VALUE{example}"

    def _missing_options(self) -> list[list[argparse.Action]]:
        """Return the groups of options of which one is needed and none is given."""
        required = [[option] for option in self.parser.options() if option.required]
        needed = [*required, *self.parser.alternatives()]
        return [group for group in needed if not any(option in self.given for option in group)]

    def _check_whole(self) -> None:
        """Find what is missing, unless something else is wrong, which it may follow from."""
        for group in self.parser.exclusive():
            both = [shown(option) for option in group if option in self.given]
            if len(both) > 1:
                self.problems.append(f"{' and '.join(both)} cannot be given together; leave one out")
        if self.problems:
            return
        missing = [shown(word) for word in self.parser.words() if word.required and word not in self.given]
        missing += [" or ".join(map(shown, group)) for group in self._missing_options()]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            self.problems.append(f"{' and '.join(missing)} {verb} missing; write {self.parser.form()}")

    def _meant(self, written: str) -> str:
        """Return the end of a sentence about an unknown name: the one that was meant, or where all are."""
        similar = self._similar(written)
        group, _, name = self.parser.prog.partition(" ")
        return f"; did you mean {' or '.join(similar)}?" if similar else f"; `{group} help {name}` shows all"

    def _similar(self, written: str) -> list[str]:
        name = _name(written).lower()
        known = {key: action for key, action in self.names.items() if not key.startswith("-")}
        alias = _KNOWN_ELSEWHERE.get(name)
        found = [alias] if alias in known else difflib.get_close_matches(name, known, 2, 0.65)
        return [shown(known[key]) if known[key].option_strings else f"{key}={shown(known[key])}" for key in found]

    def _canonical(self) -> list[str]:
        words: list[str] = []
        for option in self.parser.options():
            if option not in self.given:
                continue
            values, name = self.given[option], _long(option)
            if option.nargs == 0:
                words.append(name)
            elif option.nargs in ("+", "*"):
                words += [name, *values]
            else:
                words += [f"{name}={value}" for value in values]
        placed = [value for word in self.parser.words() for value in self.given.get(word, [])]
        return [*words, "--", *placed] if placed else words


def _members(value: str) -> list[str]:
    """Return the members of a list as a config writes it, `[a, b]`; any other text is one value."""
    if not (value.startswith("[") and value.endswith("]")) or os.path.exists(value):
        return [value]
    import yaml  # Few command lines hold a list.

    try:
        members = yaml.load(value, Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError):
        return [value]
    return members if members and all(isinstance(member, str) for member in members) else [value]


def _misfit(action: argparse.Action, value: str) -> str:
    """Return why a value does not suit an argument; empty if it does."""
    kind: Any = action.type or str
    try:
        converted = kind(value)
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        return f"is not {_KINDS[kind]}" if kind in _KINDS else str(error)
    if action.choices is not None and converted not in action.choices:
        return f"is not one of {', '.join(map(str, action.choices))}"
    return ""
