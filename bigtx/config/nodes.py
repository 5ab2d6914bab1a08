"""Configuration as it was written: trees of text in which each node has its file and line.

YAML's own guesses about types (12:30 is 750, 010 is 8, on is true) are never made: a scalar remains the text that was
written, and the schema decides later how to read it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from bigtx.utils.arguments import ASSIGNMENT
from bigtx.utils.errors import ConfigError
from bigtx.utils.secrets import HIDDEN, is_secret_key, scrub_text
from bigtx.utils.shell import at_home, setting, written

COMMAND_LINE = "command line"
DEEPEST = 100
NULLS = ("", "~", "null", "Null", "NULL")
PLAIN_TAGS = {
    f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "timestamp", "seq", "map", "value")
}


class ShallowLoader(yaml.SafeLoader):
    """A reader of plain YAML that is not nested so deeply that code that walks through it would fail."""

    _level = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node, as the base class.

        Raises:
            yaml.MarkedYAMLError: it is nested too deeply.
        """
        if self._level == DEEPEST:
            where = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem=f"it is nested more than {DEEPEST} levels deep", problem_mark=where)
        self._level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._level -= 1


class SavedLoader(ShallowLoader):
    """A reader of YAML that bigtx wrote: aliases, which could make a small file a huge value, are refused."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Return the next node, as the base class.

        Raises:
            yaml.MarkedYAMLError: it is an alias, or nested too deeply.
        """
        if self.check_event(yaml.AliasEvent):
            where = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="it has an alias (*), which bigtx never writes", problem_mark=where)
        return super().compose_node(parent, index)


@dataclass(frozen=True)
class Problem:
    """A problem in a configuration.

    Attributes:
        key: dotted key, or "" for a whole file.
        value: as written; "" if the value does not matter.
        what: the fault, and what to write instead.
        where: file and line, or the command line; "" for a default.
        related: other keys that cause the problem.
    """

    key: str
    value: str
    what: str
    where: str = ""
    related: tuple[str, ...] = ()

    def __str__(self) -> str:
        subject = f"{self.key}={self.value}" if self.value else self.key
        if self.where:
            subject = f"{subject} ({self.where})" if subject else self.where
        return f"{subject}: {self.what}" if subject else self.what


def idle(key: str, value: Any, default: Any, why: str) -> Problem:
    """Return the problem of a setting that has no effect.

    Args:
        default: the value to write where the line cannot be left out because it is in a recipe.
        why: the end of the sentence, e.g. "without model.lora.rank=N".
    """
    return Problem(key, written(value), f"has no effect {why}; leave it out, or write {setting(key, default)}")


def idle_settings(section: Any, key: str, why: str, names: Iterable[str] = ()) -> Iterator[Problem]:
    """Yield `idle` for each setting of a section that has another value than its default.

    Args:
        section: the section, a dataclass.
        key: its key, e.g. "model.lora".
        why: as for `idle`.
        names: the settings to check; all if empty.
    """
    plain = type(section)()
    for name in names or [field.name for field in dataclasses.fields(section)]:
        value, default = getattr(section, name), getattr(plain, name)
        if value != default:
            yield idle(f"{key}.{name}", value, default, why)


MOST_PROBLEMS = 20
"""The number of problems that a message lists."""


def raise_problems(problems: Iterable[Problem]) -> None:
    """Raise an error if there are problems.

    Raises:
        ConfigError: there are problems; the message lists the first of them, and says how many there are.
    """
    lines = list(dict.fromkeys(str(problem) for problem in problems))
    if len(lines) == 1:
        raise ConfigError(lines[0])
    if lines:
        shown = [f"{len(lines)} problems in the configuration:", *lines[:MOST_PROBLEMS]]
        if len(lines) > MOST_PROBLEMS:
            shown.append(f"and {len(lines) - MOST_PROBLEMS} more")
        raise ConfigError("\n  ".join(shown))


class ProblemError(Exception):
    """A problem that ends the reading of a file or argument."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


@dataclass(frozen=True)
class Node:
    """A piece of a configuration.

    Attributes:
        content: a scalar's text, a list, or a mapping.
        where: file and line, or the command line.
        plain: for a scalar: written without quotes.
    """

    content: str | list[Node] | dict[str, Node]
    where: str
    plain: bool = True

    @property
    def is_null(self) -> bool:
        """Return whether the value is YAML's null."""
        return self.plain and isinstance(self.content, str) and self.content in NULLS

    @property
    def is_empty(self) -> bool:
        """Return whether nothing was written after the key."""
        return self.plain and self.content == ""

    @property
    def text(self) -> str:
        """Return the value for a message, on one line and not too long, without secrets."""
        if isinstance(self.content, dict):
            members = {key: HIDDEN if is_secret_key(key) else node.text for key, node in self.content.items()}
            text = "{" + ", ".join(f"{key}: {member}" for key, member in members.items()) + "}"
        elif isinstance(self.content, list):
            text = "[" + ", ".join(node.text for node in self.content) + "]"
        else:
            text = self.content if self.plain else repr(self.content)
        text = " ".join(scrub_text(text).split())
        return text if len(text) <= 60 else text[:57] + "..."


def merge(below: Node, above: Node) -> Node:
    """Merge `above` over `below`: mappings key by key, anything else as a whole; an empty section changes nothing."""
    if isinstance(below.content, dict) and above.is_empty:
        return below
    if not isinstance(below.content, dict) or not isinstance(above.content, dict):
        return above
    content = dict(below.content)
    for key, node in above.content.items():
        content[key] = merge(content[key], node) if key in content else node
    return Node(content, above.where)


def read_yaml(path: Path, problems: list[Problem]) -> Node:
    """Return a YAML file as a tree; a mapping at the top.

    Args:
        problems: a problem is appended for each duplicate key.

    Raises:
        ProblemError: the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ProblemError(Problem("", "", f"cannot be read: {reason}", str(path))) from error
    root = _compose(text, str(path))
    if root is None:
        return Node({}, str(path))
    tree = _Converter(str(path), problems).convert(root, "")
    if not isinstance(tree.content, dict):
        what = "has no keys at the top; write lines such as train.max_steps as\n    train:\n      max_steps: 1000"
        raise ProblemError(Problem("", "", what, str(path)))
    return tree


def read_argument(argument: str) -> Node:
    """Read `train.max_steps=100` as a tree. Lists, mappings and quotes are read as in YAML; anything else is plain
    text.

    Raises:
        ProblemError: it does not have this form.
    """
    match = ASSIGNMENT.fullmatch(argument)
    if match is None:
        raise ProblemError(Problem("", "", f"{argument!r} is not a YAML file and not key=value", COMMAND_LINE))
    key, text = match["key"], match["value"]
    names = key.split(".")
    visible = HIDDEN if any(map(is_secret_key, names)) else scrub_text(text)
    if not all(names):
        raise ProblemError(Problem(key, visible, "a part of the key is empty", COMMAND_LINE))
    node = Node(at_home(text.strip()), COMMAND_LINE)
    if text.lstrip().startswith(("[", "{", "'", '"')):
        problems: list[Problem] = []
        root = _compose(text, COMMAND_LINE, f"{key}={visible}")
        assert root is not None
        node = _Converter(COMMAND_LINE, problems).convert(root, key)
        if problems:
            raise ProblemError(problems[0])
    for name in reversed(names):
        node = Node({name: node}, COMMAND_LINE)
    return node


def from_values(value: Any, where: str) -> Node:
    """Convert Python values (a saved config) to a tree.

    Args:
        value: nested dicts, lists, texts, numbers, booleans and None.
    """
    if isinstance(value, dict):
        return Node({str(key): from_values(member, where) for key, member in value.items()}, where)
    if isinstance(value, Sequence) and not isinstance(value, str):
        return Node([from_values(member, where) for member in value], where)
    if value is None or isinstance(value, bool):
        return Node({None: "null", True: "true", False: "false"}[value], where)
    return Node(value if isinstance(value, str) else repr(value), where, plain=not isinstance(value, str))


def _compose(text: str, where: str, shown: str = "") -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=ShallowLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}" if mark and where != COMMAND_LINE else where
        what = f"is not YAML: {error.problem or error.context}"
        raise ProblemError(Problem("", "", f"{shown!r} {what}" if shown else what, place)) from error
    except yaml.YAMLError as error:
        raise ProblemError(Problem("", "", f"is not YAML: {' '.join(str(error).split())}", where)) from error


class _Converter:
    """The conversion of PyYAML's nodes, whose types are guesses, to `Node`."""

    def __init__(self, source: str, problems: list[Problem]) -> None:
        self.source = source
        self.problems = problems
        self.seen: set[int] = set()

    def convert(self, node: yaml.Node, key: str, place: str = "") -> Node:
        """Read one node and all below it; report and leave out what bigtx does not read.

        Args:
            place: where the node is used, if that differs from where it is written.
        """
        where = self._where(node)
        # An alias gives the same object again, and may even contain itself.
        if id(node) in self.seen:
            what = "uses a YAML alias (*), which bigtx does not read"
            self._report(key, f"{what}; write the value out, or build on a file with base:", place or where)
            return Node("", where)
        self.seen.add(id(node))
        if node.tag not in PLAIN_TAGS:
            self._report(key, f"has the YAML tag {node.tag}, which bigtx does not read; write the plain value", where)
            return Node("", where)
        if isinstance(node, yaml.ScalarNode):
            return Node(node.value, where, plain=node.style is None)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(member, f"{key}[{index}]") for index, member in enumerate(node.value)], where)
        assert isinstance(node, yaml.MappingNode)
        return Node(self._mapping(node, key), where)

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Node]:
        content: dict[str, Node] = {}
        for name_node, value_node in node.value:
            place = self._where(name_node)
            if not isinstance(name_node, yaml.ScalarNode):
                self._report(key, "has a key that is not a plain name", place)
                continue
            name = name_node.value
            full = f"{key}.{name}" if key else name
            if name == "<<" and name_node.style is None:
                self._report(full, "is a YAML merge, which bigtx does not read; build on a file with base:", place)
            elif name in content:
                self._report(full, f"is a duplicate; the first is at {content[name].where}. Keep one", place)
            else:
                reported = len(self.problems)
                value = self.convert(value_node, full, place)
                # A value that was left out would be reported again as empty.
                if len(self.problems) == reported or not value.is_empty:
                    content[name] = value
        return content

    def _where(self, node: yaml.Node) -> str:
        return self.source if self.source == COMMAND_LINE else f"{self.source}:{node.start_mark.line + 1}"

    def _report(self, key: str, what: str, where: str) -> None:
        self.problems.append(Problem(key, "", what, where))
