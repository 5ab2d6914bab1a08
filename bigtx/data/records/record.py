"""A record: named values, and where they stand."""

from __future__ import annotations

from collections.abc import Mapping
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


class Broken:
    """Collects the records that cannot be used, so that one error names several of them."""

    def __init__(self) -> None:
        self.count = 0
        self._first: list[str] = []

    def add(self, file: str, line: int, reason: str) -> None:
        """One more; line 0 is the file as a whole."""
        self.count += 1
        if len(self._first) < MAX_TOLD:
            self._first.append(f"\n  {visible(file)}{f', line {line}' if line else ''}: {visible(reason)}")

    def reject(self, reject: Reject) -> None:
        """What the reader of rows gives: one more, or as many as were lost with it."""
        self.add(reject.file, reject.line, reject.reason)
        self.count += (reject.lost or 1) - 1

    def rejects(self) -> Rejects:
        """What the reader of rows gives to this."""
        return Rejects(1.0, self.reject)

    def check(self) -> None:
        """Do nothing if there are none.

        Raises:
            DataError: names the first of them.
        """
        if self.count:
            more = f", the first {MAX_TOLD} of them" if self.count > MAX_TOLD else ""
            records = "record" + "s" * (self.count > 1)
            raise DataError(
                f"{self.count:,} {records} cannot be used{more}; mend or remove them:{''.join(self._first)}"
            )
