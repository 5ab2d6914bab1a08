"""Conversion of a tree of text to typed values by the schema, with every problem collected."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any

from bigtx.config.nodes import Node, Problem
from bigtx.config.settings import Setting, example_list, examples, find, members, show_number, similar_keys
from bigtx.utils import shell, units
from bigtx.utils.secrets import HIDDEN, is_secret_key, scrub_text

INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
FLOAT = re.compile(r"[-+]?((0|[1-9][0-9]*(_[0-9]+)*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"[-+]?\.?(inf|infinity)|\.?nan", re.IGNORECASE)
ENTRY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")
BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
YAML_BOOLEANS = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
SEXAGESIMAL = re.compile(r"[-+]?[0-9]+(:[0-5]?[0-9])+(\.[0-9]*)?")
LEADING_ZERO = re.compile(r"[-+]?0[0-9_]+")


class Converter:
    """Reads one tree against one schema.

    Attributes:
        problems: everything found wrong, in the order of the tree.
        origins: the file and line of each key that was given.
    """

    def __init__(self, schema: type) -> None:
        self.schema = schema
        self.problems: list[Problem] = []
        self.origins: dict[str, str] = {}

    def convert(self, tree: Node) -> dict[str, Any]:
        """Return the tree's values; values with a problem are left out."""
        return self._section(self.schema, tree, "")

    def _section(self, schema: type, node: Node, prefix: str) -> dict[str, Any]:
        if node.is_empty:
            return {}
        if not isinstance(node.content, dict):
            self._report(
                prefix[:-1], node, "is a section; write its keys, e.g. " + prefix + next(iter(members(schema)))
            )
            return {}
        known = members(schema, prefix)
        values = {}
        for name, member in node.content.items():
            key = prefix + name
            if self._is_secret(key, member):
                continue
            if name not in known:
                self._unknown(key, member)
                continue
            self.origins[key] = member.where
            try:
                values[name] = self._value(known[name], member)
            except ValueError as error:
                # A section reports its own members; the doc line says what the value is for.
                doc = f" ({' '.join(known[name].doc.split()).rstrip('.')})" if known[name].doc else ""
                self._report(key, member, f"{error}{doc}")
        return values

    def _value(self, setting: Setting, node: Node) -> Any:
        if setting.section:
            return self._section(setting.section, node, setting.key + ".")
        if setting.named_section:
            return self._entries(setting, setting.named_section, node)
        if setting.type == dict[str, Any]:
            _mapping(node, f"has keys and values; write e.g. {setting.key}.NAME=VALUE")
            return {} if node.is_null else self._raw(setting.key, node)
        if setting.type == dict[str, float]:
            return self._numbers(setting, node)
        if node.is_null and setting.optional:
            return None
        return self._list(setting, node) if typing.get_origin(setting.type) is list else _scalar(setting, node)

    def _entries(self, setting: Setting, schema: type, node: Node) -> dict[str, Any]:
        advice = f"has entries by name; write e.g. {setting.key}.mine.{next(iter(members(schema)))}=..."
        entries = {}
        for name, member in _mapping(node, advice).items():
            key = f"{setting.key}.{name}"
            if not ENTRY_NAME.fullmatch(name):
                self._report(key, member, f"{name!r} cannot be a name; use letters, digits, - and _")
            # null removes an entry of an earlier file.
            elif member.is_empty or not member.is_null:
                self.origins[key] = member.where
                entries[name] = self._section(schema, member, f"{key}.")
        return entries

    def _list(self, setting: Setting, node: Node) -> list[Any]:
        key, number = setting.key, setting.number
        if number and not isinstance(node.content, list):
            raise ValueError(f"is a list of numbers; write e.g. {shell.setting(key, example_list(setting))}")
        if isinstance(node.content, dict) or node.is_null:
            raise ValueError(f"is a list; write {key}=TEXT, or {shell.setting(key, ['TEXT', 'TEXT'])}")
        read = functools.partial(_scalar, dataclasses.replace(setting, type=number)) if number else _member_text
        if setting.kind == "path":
            read = _member_path
        # One text is a list of one: brackets are a pattern for some shells and would need quotes.
        nodes = node.content if isinstance(node.content, list) else [node]
        given = {f"{key}[{index}]" if member is not node else key: member for index, member in enumerate(nodes)}
        return [value for _, value in self._read(given, read)]

    def _numbers(self, setting: Setting, node: Node) -> dict[str, float]:
        advice, prefix = f"has numbers by name; write e.g. {setting.key}.mine=1", f"{setting.key}."
        given = {prefix + name: member for name, member in _mapping(node, advice).items()}
        self.origins |= {key: member.where for key, member in given.items()}
        # null removes a number of an earlier file.
        present = {key: member for key, member in given.items() if not member.is_null}
        read = functools.partial(_scalar, dataclasses.replace(setting, type=float))
        return {key.removeprefix(prefix): number for key, number in self._read(present, read)}

    def _read(self, given: dict[str, Node], read: Callable[[Node], Any]) -> Iterator[tuple[str, Any]]:
        """Yield the values of several keys, without those that have a problem."""
        for key, node in given.items():
            if not self._is_secret(key, node):
                try:
                    yield key, read(node)
                except ValueError as error:
                    self._report(key, node, str(error))

    def _raw(self, key: str, node: Node) -> Any:
        """Return a value that no schema describes, by YAML 1.2's plain rules."""
        self.origins[key] = node.where
        if isinstance(node.content, dict):
            return {
                name: self._raw(f"{key}.{name}", member)
                for name, member in node.content.items()
                if not self._is_secret(f"{key}.{name}", member)
            }
        if isinstance(node.content, list):
            return [self._raw(f"{key}[{index}]", member) for index, member in enumerate(node.content)]
        try:
            return _untyped(node)
        except ValueError as error:
            self._report(key, node, str(error))
            return None

    def _unknown(self, key: str, node: Node) -> None:
        what = "no such setting"
        if "." in key.rpartition(".")[2] or ("." in key and find(self.schema, key)):
            parent, _, name = key.rpartition(".")
            what += f"; in a file, {name} is on a line of its own below {parent}:"
        else:
            similar = " or ".join(similar_keys(self.schema, key))
            what += f"; did you mean {similar}?" if similar else "; `bigtx configs explain` shows them all"
        self._report(key, node, what)

    def _is_secret(self, key: str, node: Node) -> bool:
        text = node.content if isinstance(node.content, str) else ""
        # A key of the schema never holds a secret, even if its name looks so.
        if (is_secret_key(key.rpartition(".")[2]) and not find(self.schema, key)) or scrub_text(text) != text:
            what = "looks like a secret, and a run writes its config into its folder"
            self.problems.append(Problem(key, HIDDEN, f"{what}; pass it as an environment variable", node.where))
            return True
        return False

    def _report(self, key: str, node: Node, what: str) -> None:
        is_hidden = isinstance(node.content, str) and is_secret_key(key.rpartition(".")[2])
        self.problems.append(Problem(key, HIDDEN if is_hidden else node.text, what, node.where))


def _mapping(node: Node, otherwise: str) -> dict[str, Node]:
    """Return the content of a mapping, nothing for null; or raise an error with the text `otherwise`."""
    if not node.is_null and not isinstance(node.content, dict):
        raise ValueError(otherwise)
    return node.content if isinstance(node.content, dict) else {}


def _member_text(node: Node) -> str:
    if not isinstance(node.content, str) or node.is_null:
        raise ValueError("is not text; put it into quotes")
    _refuse_filling_in(node.content)
    return node.content


def _member_path(node: Node) -> str:
    return shell.at_home(_member_text(node))


def _refuse_filling_in(text: str) -> None:
    """Refuse texts that OmegaConf, which builds the config in the end, would interpret."""
    if "${" in text:
        raise ValueError("contains ${...}, which bigtx never replaces by another value; write the value itself")
    if text == "???":
        raise ValueError("means a missing value; write the value")


def _scalar(setting: Setting, node: Node) -> Any:
    if not isinstance(node.content, str):
        raise ValueError(f"is {'a list' if isinstance(node.content, list) else 'a mapping'}; write one value")
    _refuse_filling_in(node.content)
    if setting.choices:
        return _choice(node.content, setting.choices)
    if setting.type is str:
        return _text(setting, node)
    if node.is_null:
        raise ValueError("has no value")
    if not node.plain:
        raise ValueError("is text in quotes; write it without them")
    if setting.type is bool:
        return _boolean(node.content)
    if setting.kind == "count":
        value: float = units.parse_count(node.content, f"a whole number such as {_either(setting)}")
    elif setting.kind == "size":
        value = units.parse_size(node.content, f"a size such as {_either(setting)}")
    else:
        value = _number(setting, node.content)
    _check_bounds(setting, value)
    return value


def _either(setting: Setting) -> str:
    *others, last = examples(setting)
    return f"{', '.join(others)} or {last}" if others else last


def _choice(text: str, choices: tuple[str, ...]) -> str:
    if text in choices:
        return text
    similar = difflib.get_close_matches(text.lower(), choices, 1)
    hint = f"; did you mean {similar[0]}?" if similar else ""
    raise ValueError(f"is not one of {', '.join(choices)}{hint}")


def _text(setting: Setting, node: Node) -> str:
    assert isinstance(node.content, str)
    if node.is_null and not (node.is_empty and node.where == "command line"):
        raise ValueError("has no value; write '' for an empty text")
    if setting.kind == "duration":
        units.parse_duration(node.content, f"a duration such as {_either(setting)}")
    return shell.at_home(node.content) if setting.kind == "path" else node.content


def _boolean(text: str, advice: str = "") -> bool:
    if text in BOOLEANS:
        return BOOLEANS[text]
    if text.lower() in YAML_BOOLEANS:
        what = f"is read in different ways by different programs; write {YAML_BOOLEANS[text.lower()]}{advice}"
        raise ValueError(what)
    raise ValueError("is not true or false")


def _number(setting: Setting, text: str) -> float:
    if INTEGER.fullmatch(text) and setting.type is int:
        return int(text)
    if FLOAT.fullmatch(text) and setting.type is float and math.isfinite(value := float(text)):
        return value
    _refuse_base_60(text, f", e.g. {_either(setting)}")
    if LEADING_ZERO.fullmatch(text):
        _check_bounds(setting, int(_decimal(text)))
    _refuse_octal(text)
    what = "a whole number" if setting.type is int else "a number"
    raise ValueError(f"is not {what}; write it in digits, e.g. {_number_meant(setting, text) or _either(setting)}")


def _number_meant(setting: Setting, text: str) -> str:
    """Return the number that a share such as `5 %`, or a number with a decimal comma, means; "" for other texts."""
    number = text.removesuffix("%").rstrip().replace(",", ".")
    if setting.type is not float or number == text or not FLOAT.fullmatch(number):
        return ""
    value = float(number) / 100 if text.endswith("%") else float(number)
    with contextlib.suppress(ValueError):
        _check_bounds(setting, value)
        return f"{value:g}"
    return ""


def _decimal(text: str) -> str:
    return "-" * text.startswith("-") + (text.replace("_", "").lstrip("+-0") or "0")


def _refuse_octal(text: str) -> None:
    if LEADING_ZERO.fullmatch(text):
        raise ValueError(f"would be an octal number in YAML; write {_decimal(text)}")


def _refuse_base_60(text: str, advice: str) -> None:
    if SEXAGESIMAL.fullmatch(text):
        raise ValueError(f"would be a number to base 60 in YAML; write a plain number{advice}")


def _check_bounds(setting: Setting, value: float) -> None:
    if setting.minimum is not None and value < setting.minimum:
        raise ValueError(f"is too small; the least is {show_number(setting.minimum)}")
    if setting.maximum is not None and value > setting.maximum:
        raise ValueError(f"is too large; the most is {show_number(setting.maximum)}")


def needs_quotes(text: str) -> bool:
    """Return whether a text without quotes would be refused, or read as a number, where any type is allowed, though
    YAML reads it as a text (`0E0`).
    """
    return text.lower() in YAML_BOOLEANS or any(kind.fullmatch(text) for kind in (INTEGER, FLOAT, NOT_FINITE))


def _untyped(node: Node) -> Any:
    assert isinstance(node.content, str)
    text = node.content
    _refuse_filling_in(text)
    if not node.plain:
        return text
    if node.is_null:
        return None
    if text in BOOLEANS or text.lower() in YAML_BOOLEANS:
        return _boolean(text, ", or quotes")
    _refuse_octal(text)
    if INTEGER.fullmatch(text):
        return int(text)
    _refuse_base_60(text, ", or put a text into quotes")
    if NOT_FINITE.fullmatch(text) or (FLOAT.fullmatch(text) and math.isinf(float(text))):
        raise ValueError("is not a finite number; write one in digits, or put a text into quotes")
    return float(text) if FLOAT.fullmatch(text) else text
