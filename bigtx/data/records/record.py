"""A record: named values, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bigtx.data.raw.documents import Reject, Rejects, visible
from bigtx.data.raw.fields import value_of
from bigtx.utils.errors import DataError

MAX_TOLD = 5
"""Broken records that an error names."""
WHOLE_FILE = 0
"""In place of a line: of a record that is a file, or members of an archive."""


@dataclass(frozen=True, slots=True)
class Record:
    """What was read of one record.

    Attributes:
        fields: values by name; a name with dots that is no field itself leads through nested ones.
        file: where it stands; a member of an archive is `<archive>/<member>`.
        line: from 1, where it begins in the file; or WHOLE_FILE.
    """

    fields: Mapping[str, Any]
    file: str
    line: int = 1

    @property
    def where(self) -> str:
        """For error messages."""
        return f"{self.file}, line {self.line}" if self.line else self.file

    def value(self, name: str) -> Any:
        """The value of a field; None where there is none."""
        return value_of(self.fields, name)

    def text(self, name: str, *, setting: str) -> str:
        """A field that is a text with something in it.

        Args:
            setting: the config key that names the field, for the error.

        Raises:
            BadRecordError: it is missing, empty, or no text.
        """
        value = self.value(name)
        if isinstance(value, str) and value.strip():
            return value
        if value is None:
            known = ", ".join(list(self.fields)[:8]) or "none"
            raise BadRecordError(f"no field {name!r} (its fields: {known}); see {setting}")
        if isinstance(value, str):
            raise BadRecordError(f"the field {name!r} is empty")
        raise BadRecordError(f"the field {name!r} is a {type(value).__name__}, not a text; see {setting}")


class BadRecordError(Exception):
    """A record that cannot be used; the message is the reason."""


class LeftOut:
    """Records that are left out by name: that of a record (`Record.where`), or of a file, archive or folder with all
    records in it.

    Attributes:
        met: names that stood for something so far.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = frozenset(name.rstrip("/") for name in names)
        self.met: set[str] = set()

    def __contains__(self, where: object) -> bool:
        name = str(where)
        parts = [name, name.rpartition(", line ")[0]] if ", line " in name else [name]
        for at, sign in enumerate(name):
            if sign == "/":
                parts.append(name[:at])
        found = self.names.intersection(parts)
        self.met |= found
        return bool(found)


class Broken:
    """Collects the records that cannot be used, so that one error names several of them.

    Attributes:
        count: of all.
        first: place and reason of the first of them.
    """

    def __init__(self, left_out: LeftOut | None = None) -> None:
        """Args:
        left_out: those that nobody wants, and so do not count.
        """
        self.count = 0
        self.first: list[tuple[str, str]] = []
        self._left_out = left_out or LeftOut()

    def add(self, file: str, line: int, reason: str) -> None:
        """One more; line 0 is the file as a whole."""
        where = Record({}, file, line).where
        if where in self._left_out:
            return
        self.count += 1
        if len(self.first) < MAX_TOLD:
            self.first.append((where, reason))

    def reject(self, reject: Reject) -> None:
        """What the reader of rows gives: one more, or as many as were lost with it."""
        before = self.count
        self.add(reject.file, reject.line, reject.reason)
        if self.count > before:
            self.count = before + (reject.lost or 1)

    def rejects(self) -> Rejects:
        """What the reader of rows gives to this."""
        return Rejects(1.0, self.reject)

    def check(self, advice: str = "") -> None:
        """Do nothing if there are none.

        Args:
            advice: what else to do about them.

        Raises:
            DataError: names the first of them.
        """
        if self.count:
            raise DataError(f"{self.describe()}; repair or remove them:{self.listed()}" + (advice and f"\n{advice}"))

    def describe(self) -> str:
        """How many there are."""
        more = f", the first {MAX_TOLD} of them" if self.count > MAX_TOLD else ""
        return f"{self.count:,} record{'s' * (self.count > 1)} cannot be used{more}"

    def listed(self) -> str:
        """The first of them, a line each."""
        return "".join(f"\n  {visible(where)}: {visible(reason)}" for where, reason in self.first)
