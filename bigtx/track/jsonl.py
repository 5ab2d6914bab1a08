"""Write a file of JSON objects, one per line, that is safe at a kill, at a resume and on a full disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtx.utils.errors import LaunchError
from bigtx.utils.files import write_atomic

Record = dict[str, Any]
MODEL_EVENT = "model"
"""The kind of event that names a run's checkpoint for other runs."""


class JsonLines:
    """A file to which records are appended. A record has reached the operating system when the call returns.

    Floats are read back exactly. JSON has no NaN and no infinity: they are written as the texts "NaN", "Infinity" and
    "-Infinity", which `float()` reads.

    When the disk is full, records are kept in memory, `warn` is called once, and every later call tries again.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None], up_to_step: int | None = None) -> None:
        """Open or create the file. Remove a line that a crash left incomplete, and steps that will be repeated.

        Args:
            path: the file.
            warn: prints a warning.
            up_to_step: the last step to keep; None keeps all.

        Raises:
            LaunchError: The file cannot be written.
        """
        self._path = path
        self._warn = warn
        self._warned = False
        self._unwritten = b""
        try:
            kept = _keep_whole_lines(path, up_to_step)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise LaunchError(f"cannot write {path}: {error.strerror}. Repair the folder or choose another.") from None
        last_line = kept[-1] if kept else b""
        self._end = sum(map(len, kept))
        self._last_start = self._end - len(last_line)
        self._last: Record = parse_line(last_line) or {}

    def append(self, record: Record) -> None:
        """Write one record as a new line."""
        self.extend([record])

    def extend(self, records: list[Record]) -> None:
        """Write records as new lines, all at once."""
        lines = [_line(record) for record in records]
        self._unwritten += b"".join(lines)
        self._flush(len(lines[-1]))
        self._last = records[-1]

    def merge(self, record: Record) -> None:
        """Write a record. If the last line has the same step, it is extended by the record."""
        if self._last.get("step") == record["step"]:
            record = {**self._last, **record, "time": self._last.get("time", record["time"])}
            if self._unwritten:
                self._unwritten = self._unwritten[: -len(_line(self._last))]
            else:
                self._end = self._last_start
        self.append(record)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _flush(self, last_length: int) -> None:
        text = self._unwritten
        try:
            done = 0
            while done < len(text):
                done += os.pwrite(self._file, text[done:], self._end + done)
            # A joined line overwrites the old one in place, so that the step is never missing for a reader.
            os.ftruncate(self._file, self._end + len(text))
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self._end)
            if not self._warned:
                self._warned = True
                self._warn(f"cannot write {self._path}: {error.strerror}; the run continues and tries again later")
            return
        self._end += len(text)
        self._last_start = self._end - last_length
        self._unwritten = b""


def parse_line(line: bytes) -> Record | None:
    """Return the record of one line; None if the line is incomplete or is not a JSON object."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def step_of(record: Record) -> float:
    """Return the step of a record; infinity for a record without a step."""
    step = record.get("step")
    return step if isinstance(step, int) else math.inf


def _keep_whole_lines(path: Path, up_to_step: int | None) -> list[bytes]:
    """Remove incomplete lines and those of later steps from the file. Returns the remaining lines."""
    text = path.read_bytes() if path.exists() else b""
    kept = []
    for line in text.splitlines(keepends=True):
        record = parse_line(line)
        if record is not None and (up_to_step is None or step_of(record) <= up_to_step):
            kept.append(line)
    wanted = b"".join(kept)
    if text.startswith(wanted):
        if wanted != text:
            os.truncate(path, len(wanted))
    else:
        write_atomic(path, wanted)
    return kept


def _line(record: Record) -> bytes:
    # A lone surrogate in a text becomes its JSON escape.
    return json.dumps(plain(record), allow_nan=False, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def plain(value: Any) -> Any:
    """Return a value in JSON's types: scalars of numpy and torch become numbers, other objects become text."""
    if isinstance(value, dict):
        return {str(key): plain(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(member) for member in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item"):
        return plain(value.item())
    if not isinstance(value, float):
        return str(value)
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
