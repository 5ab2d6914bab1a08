"""A record: named values, and their place; and the choice of records to hold out.

The choice depends only on the records, so that all machines agree.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import xxhash

from bigtx.data.raw.documents import Reject, Rejects
from bigtx.data.raw.formats import suffix_inside
from bigtx.data.raw.read import kind_of, value_of
from bigtx.utils.errors import DataError
from bigtx.utils.terminal import visible
from bigtx.utils.units import counted

MAX_LISTED = 5
"""The number of broken records that an error lists."""
MAX_FIELDS = 8
"""The number of fields of a record that an error lists."""
MAX_NAME = 40
"""Characters of the name of a field that an error shows."""
TABLES = (".csv", ".tsv")
WHOLE_FILE = 0
"""The line of a record that is a whole file, or members of an archive."""


@dataclass(frozen=True, slots=True)
class Record:
    """The content of one record.

    Attributes:
        fields: values by name; a name with dots that is not a field itself leads through nested ones.
        file: its file; a member of an archive is `<archive>/<member>`.
        line: the line, from 1, at which it starts in the file; or WHOLE_FILE.
    """

    fields: Mapping[str, Any]
    file: str
    line: int = 1

    @property
    def where(self) -> str:
        """Return the name of the record for error messages."""
        return f"{self.file}, line {self.line}" if self.line else self.file

    def value(self, name: str) -> Any:
        """Return the value of a field, or None if the record lacks it."""
        return value_of(self.fields, name)

    def text(self, name: str, *, setting: str) -> str:
        """Return a field that is a non-empty text.

        Args:
            setting: the config key that names the field, for the error.

        Raises:
            BadRecordError: it is missing, empty, or not a text.
        """
        value = self.value(name)
        if isinstance(value, str) and self.has_text(name):
            return value
        if value is None:
            raise self.missing(name, setting=setting)
        if isinstance(value, str):
            raise BadRecordError(f"the field {name!r} is empty")
        raise BadRecordError(f"the field {name!r} is {kind_of(value)}, not a text; see {setting}")

    def has_text(self, name: str) -> bool:
        """Return whether a field is a non-empty text."""
        value = self.value(name)
        return isinstance(value, str) and bool(value.strip())

    def missing(self, name: str, *, setting: str) -> BadRecordError:
        """Return the error for a field without a value, with the existing fields and the likely mistake.

        Args:
            setting: the config key that names the field.
        """
        if name in self.fields:
            return BadRecordError(f"the field {name!r} is null; see {setting}")
        names = [str(each) for each in self.fields]
        shown = ", ".join(_shortened(each) for each in names[:MAX_FIELDS]) or "none"
        similar = next((each for each in names if each.strip().casefold() == name.strip().casefold()), None)
        if similar is not None:
            advice = f"write {shlex.quote(f'{setting}={json.dumps(similar, ensure_ascii=False)}')}"
        elif suffix_inside(self.file) in TABLES:
            separator = next((sign for sign in ";|\t," if len(names) == 1 and sign in names[0]), None)
            advice = (
                "the first line of a table has to name its columns"
                if separator is None
                else f"it seems to have {separator!r} between its columns, and a .csv has commas and a .tsv has tabs"
            ) + f"; see {setting}"
        else:
            advice = f"see {setting}"
        return BadRecordError(f"no field {name!r} (its fields: {shown}); {advice}")


def _shortened(name: str) -> str:
    """Return the name of a field, in quotation marks if its ends would not be visible."""
    name = name if len(name) <= MAX_NAME else name[:MAX_NAME] + "..."
    return name if name.replace("_", "").replace(".", "").isalnum() else repr(name)


class BadRecordError(Exception):
    """A record that cannot be used; the message is the reason."""


class LeftOut:
    """Records that are left out by name: the name of a record (`Record.where`), or of a file, archive or folder with
    all records in it.

    Attributes:
        met: the names that matched something so far.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = frozenset(name.rstrip("/") for name in names)
        self.met: set[str] = set()

    def __contains__(self, where: object) -> bool:
        name = str(where)
        parts = [name, name.rpartition(", line ")[0]] if ", line " in name else [name]
        parts += [name[:at] for at, sign in enumerate(name) if sign == "/"]
        found = self.names.intersection(parts)
        self.met |= found
        return bool(found)


class Broken:
    """The records that cannot be used, collected so that one error names several of them.

    Attributes:
        count: the number of all of them.
        first: the place and the reason of the first of them.
    """

    def __init__(self, left_out: LeftOut | None = None) -> None:
        """Args:
        left_out: the records that the user leaves out, which are not counted.
        """
        self.count = 0
        self.first: list[tuple[str, str]] = []
        self._left_out = left_out or LeftOut()

    def add(self, file: str, line: int, reason: str) -> None:
        """Count one more; line 0 is the file as a whole."""
        where = Record({}, file, line).where
        if where in self._left_out:
            return
        self.count += 1
        if len(self.first) < MAX_LISTED:
            self.first.append((where, reason))

    def reject(self, reject: Reject) -> None:
        """Count what the reader of rows reports: one more, or as many as were lost with it."""
        before = self.count
        self.add(reject.file, reject.line, reject.reason)
        if self.count > before:
            self.count = before + (reject.lost or 1)

    def rejects(self) -> Rejects:
        """Return the sink for the reader of rows."""
        return Rejects(1.0, self.reject)

    def check(self, advice: str = "") -> None:
        """Raise an error if there are any.

        Args:
            advice: further advice.

        Raises:
            DataError: there are broken records; the message lists the first of them.
        """
        if self.count:
            raise DataError(f"{self.describe()}; repair or remove them:{self.listed()}" + (advice and f"\n{advice}"))

    def describe(self) -> str:
        """Return the count in words."""
        more = f", the first {MAX_LISTED} of them" if self.count > MAX_LISTED else ""
        return f"{counted(self.count, 'record')} cannot be used{more}"

    def listed(self) -> str:
        """Return the first of them, one per line; a reason is not repeated."""
        before = ["", *(reason for _, reason in self.first)]
        return "".join(
            f"\n  {visible(where)}: {'the same' if reason == previous else visible(reason)}"
            for (where, reason), previous in zip(self.first, before, strict=False)
        )


def split_records(
    records: Sequence[Record], groups: Sequence[Any], fraction: float, how: Literal["hash", "tail"], name: str
) -> tuple[list[int], list[int]]:
    """Divide records into those that stay and those that are held out.

    Args:
        groups: the class of each record, or any other group that is to be held out evenly.
        fraction: the share to hold out.
        how: "tail": the last ones of each group, in the order of `records`, rounded down; "hash": those of each group
            whose content has the lowest hashes. Equal records stay together, and some of each group stay. A group
            that is too small for its share passes the rest of it to the next one, so that for many small groups
            together the share is right.
        name: the name of the split: each has hashes of its own.

    Returns:
        The indices into `records` of both, in order.
    """
    assert len(records) == len(groups)
    places: dict[Any, list[int]] = {}
    for place, group in enumerate(groups):
        places.setdefault(group, []).append(place)
    held: set[int] = set()
    if how == "tail":
        for own in places.values():
            held.update(own[len(own) - int(len(own) * fraction + 1e-9) :])
    else:
        owed = 0.0
        for group in sorted(places, key=str):
            owed += len(places[group]) * fraction
            found = _lowest(records, places[group], int(owed + 0.5), name)
            owed -= len(found)
            held.update(found)
    return [place for place in range(len(records)) if place not in held], sorted(held)


def _lowest(records: Sequence[Record], places: Sequence[int], count: int, name: str) -> list[int]:
    """Return at most so many places, of the contents with the lowest hashes; all places of a content or none, and not
    all.
    """
    if count < 1:
        return []
    equal: dict[int, list[int]] = {}
    for place in places:
        equal.setdefault(_hash(records[place], name), []).append(place)
    found: list[int] = []
    for _, own in sorted(equal.items())[: len(equal) - 1]:
        if len(found) + len(own) <= count:
            found += own
    return found


def _hash(record: Record, name: str) -> int:
    content = name + json.dumps(record.fields, sort_keys=True, default=str)
    return xxhash.xxh3_64_intdigest(content.encode("utf-8", "surrogatepass"))
