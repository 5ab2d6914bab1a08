"""Predictions as JSON lines, in a file that an interrupted command can continue; or as a table on a terminal: the
answer, its probability, and the beginning of the text.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from bigtx.data.records.read import read_jsonl, read_records
from bigtx.data.records.record import WHOLE_FILE, Broken, Record
from bigtx.utils.errors import ConfigError, DataError, LaunchError, writes
from bigtx.utils.files import read_object, write_json
from bigtx.utils.locks import try_lock
from bigtx.utils.terminal import fitted, visible, width

if TYPE_CHECKING:
    from bigtx.finetuning.tasks.task import RecordTask

ADDED = ("prediction", "error", "num_cut")
"""Keys of an output line besides the record's own fields."""
ANSWERS = ("label", "response", "translation", "text")
"""Keys of predictions that hold an answer; other predictions have only numbers."""
MAX_READ = 1000
"""Only so many characters of a text are read."""
GAP = "  "


@dataclass(frozen=True)
class Unread:
    """A record that could not be read."""

    error: str


Item = Record | Unread


def read_items(paths: Sequence[str]) -> Iterator[Item]:
    """Yield the records of files and folders, with `Unread` in the place of unreadable ones."""
    return _with_unread(lambda unread: read_records(paths, unread))


def read_stdin() -> Iterator[Item]:
    """Yield the JSON lines of standard input."""
    return _with_unread(_stdin)


def arriving(most: int) -> Iterator[list[Item]]:
    """Yield the JSON lines of standard input in chunks of those that have arrived: the process at the other end of a
    pipe may wait for the answer to a line.

    Args:
        most: the maximum number of lines in a chunk.
    """
    arrived: queue.Queue[Item | Exception | None] = queue.Queue(most)

    def read() -> None:
        try:
            for record in _stdin(_Unreadable(arrived.put)):
                arrived.put(record)
            arrived.put(None)
        except Exception as error:
            arrived.put(error)

    threading.Thread(target=read, daemon=True).start()
    last: Exception | None = None
    has_ended = False
    while not has_ended:
        chunk: list[Item] = []
        while len(chunk) < most and not has_ended and (not chunk or not arrived.empty()):
            item = arrived.get()
            if isinstance(item, Record | Unread):
                chunk.append(item)
            else:
                last, has_ended = item, True
        if chunk:
            yield chunk
    if last is not None:
        raise last


def _stdin(unread: Broken) -> Iterator[Record]:
    if sys.stdin is None:  # Closed from the start.
        return
    # This does not read sys.stdin: Python cannot exit while a thread waits for it.
    with open(sys.stdin.fileno(), "rb", closefd=False) as stream:
        yield from read_jsonl(stream, "standard input", unread)


def _with_unread(read: Callable[[Broken], Iterator[Record]]) -> Iterator[Item]:
    """Yield records, with `Unread` in the place of unreadable ones."""
    found: list[Unread] = []
    for record in read(_Unreadable(found.append)):
        yield from found
        found.clear()
        yield record
    yield from found


class _Unreadable(Broken):
    """A list of unreadable records that passes each one on, in its place."""

    def __init__(self, take: Callable[[Unread], None]) -> None:
        super().__init__()
        self._take = take

    def add(self, file: str, line: int, reason: str) -> None:
        """Pass on an unreadable record; line 0 is the whole file."""
        self._take(Unread(f"{file}, line {line}: {reason}" if line else f"{file}: {reason}"))
        self.count += 1


def fields_of(item: Item) -> dict[str, Any]:
    """Return the fields of a record that JSON can hold; for a record that is a file, also its name."""
    if isinstance(item, Unread):
        return {}
    place = {"file": item.file} if item.line == WHOLE_FILE else {}
    return place | {str(key): value for key, value in item.fields.items() if key not in ADDED and _is_json(value)}


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(map(_is_json, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int | float)


def as_line(value: Mapping[str, Any]) -> bytes:
    """Return an object as a JSON line."""
    # A lone surrogate in a text becomes its JSON escape.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


def write_lines(values: Iterable[Mapping[str, Any]]) -> None:
    """Write objects to standard output as JSON lines in UTF-8, for any encoding of the terminal."""
    sys.stdout.flush()
    sys.stdout.buffer.write(b"".join(map(as_line, values)))
    sys.stdout.buffer.flush()


class Output:
    """A file of JSON lines that a command with the same weights and input continues.

    The records' fields in the lines show which records the lines belong to. A chunk that was not written completely is
    predicted again, so that the file ends as without an interruption.
    """

    MUST_AGREE = ("manifest_sha256", "weights", "too_long", "set")

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.about = path, path.with_name(path.name + ".about.json")
        self._facts = dict(facts)
        self._has_old_lines, self._number = True, 0
        self._file: Any = None

    def __enter__(self) -> Output:
        """Open or create the file, and lock it.

        Raises:
            LaunchError: the file cannot be written, or another process writes it.
            DataError: the file has other content.
            ConfigError: the file was started with other weights or settings.
        """
        with writes(f"output={self.path}"):
            self._file = open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        try:
            self._lock()
            self._check()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Closing writes remaining data, which can fail.
        with contextlib.suppress(OSError) if kind else self._writes():
            self._file.close()

    def _lock(self) -> None:
        if try_lock(self._file.fileno()) is False:
            raise LaunchError(
                f"another process writes {self.path}; wait for it, or write output=FILE to name another file"
            )

    def _check(self) -> None:
        """Compare with the weights and settings that the file was started with, or write them for a new file."""
        if not os.fstat(self._file.fileno()).st_size:
            with writes(self.about):
                write_json(self.about, self._facts)
            return
        begun = read_object(self.about)
        if not begun:
            raise DataError(
                f"{self.path} is not empty, and there is no {self.about.name} that marks it as an output of "
                "bigtx predict; write output=FILE to name another file"
            )
        different = [key for key in self.MUST_AGREE if begun.get(key) != self._facts[key]]
        if "manifest_sha256" in different:
            raise ConfigError(
                f"{self.path} was started with the checkpoint {begun.get('checkpoint')}, and this is "
                f"{self._facts['checkpoint']}; name the former to continue it, or write output=FILE to name another "
                "file"
            )
        if different:
            shown = ", ".join(_shown(key, begun.get(key)) for key in different)
            raise ConfigError(
                f"{self.path} was started with {shown}; write the same to continue it, or "
                "output=FILE to name another file"
            )

    def known(self, chunk: Sequence[Item]) -> list[dict[str, Any]] | None:
        """Return the lines of a chunk if the file has all of them; otherwise remove the chunk's lines from the file.

        Raises:
            DataError: the lines belong to other records.
        """
        if not self._has_old_lines:
            return None
        start, lines = self._file.tell(), []
        for item in chunk:
            raw = self._file.readline()
            if not raw.endswith(b"\n"):
                self._file.seek(start)
                self._file.truncate()
                self._has_old_lines = False
                return None
            self._number += 1
            line = _parsed(raw)
            if line is None or not _belongs(line, item):
                what = item.where if isinstance(item, Record) else item.error
                raise DataError(
                    f"{self.path}, line {self._number} is not the prediction for {what}; name the same input again to "
                    "continue it, or write output=FILE to name another file"
                )
            lines.append(line)
        return lines

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append objects as lines.

        Raises:
            LaunchError: the file cannot be written, e.g. because the disk is full.
        """
        with self._writes():
            self._file.write(b"".join(map(as_line, lines)))
            self._file.flush()

    def _writes(self) -> AbstractContextManager[None]:
        return writes(self.path, "; the same command continues when that is repaired")

    def finish(self) -> None:
        """Check that the file has no more lines than there are records, and sync it to the disk.

        Raises:
            DataError: the file has more lines.
            LaunchError: the file cannot be written, e.g. because the disk is full.
        """
        if self._has_old_lines and self._file.read(1):
            raise DataError(f"{self.path} has more lines than the input has records; it belongs to another input")
        with self._writes():
            os.fsync(self._file.fileno())


def _shown(key: str, value: Any) -> str:
    """Return a setting of the command as a user writes it; `set` is a list of settings."""
    if isinstance(value, list):
        return " ".join(shlex.quote(each) for each in value) or "no settings"
    return f"{key}={value}"


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _belongs(line: Mapping[str, Any], item: Item) -> bool:
    """Return whether an output line belongs to a record."""
    if isinstance(item, Unread):
        return line.get("error") == item.error
    fields = {key: value for key, value in line.items() if key not in ADDED}
    return json.dumps(fields, sort_keys=True) == json.dumps(fields_of(item), sort_keys=True)


@dataclass
class PredictionTable:
    """A table whose rows are written one after the other. The first rows determine the widths of the columns.

    Attributes:
        columns: the width of the terminal.
    """

    task: RecordTask
    stream: TextIO
    columns: int
    _widths: list[int] = field(default_factory=list)

    def add(self, items: Sequence[Item], lines: Sequence[Mapping[str, Any]]) -> None:
        """Write a row for each record.

        Args:
            lines: the output lines of the items.
        """
        rows = [self._row(item, line) for item, line in zip(items, lines, strict=True)]
        if not self._widths:
            headers = ["answer", "confidence", "text"]
            self._widths = self._fit([headers, *rows], has_confidence=any(row[1] for row in rows))
            self._write(headers)
        for row in rows:
            self._write(row)
        self.stream.flush()

    def _row(self, item: Item, line: Mapping[str, Any]) -> list[str]:
        if "prediction" not in line:
            return ["(error)", "", _one_line(str(line.get("error")))]
        assert isinstance(item, Record)
        answer, confidence = answer_of(line["prediction"])
        shown = "" if confidence is None else f"{confidence:.1%}"
        return [_one_line(answer), shown, _one_line(self.task.shown(item))]

    def _fit(self, rows: Sequence[Sequence[str]], *, has_confidence: bool) -> list[int]:
        """Return the widths of the columns: at most half of the terminal for the answer, and the rest for the text."""
        first = min(max(width(row[0]) for row in rows), max(8, self.columns // 2))
        second = len("confidence") if has_confidence else 0
        taken = first + len(GAP) + (second + len(GAP) if second else 0)
        return [first, second, max(8, self.columns - taken)]

    def _write(self, cells: Sequence[str]) -> None:
        answer, confidence, text = self._widths
        parts = [fitted(cells[0], answer)]
        if confidence:
            parts.append(cells[1].rjust(confidence))
        parts.append(fitted(cells[2], text).rstrip())
        print(GAP.join(parts).rstrip(), file=self.stream)


def answer_of(prediction: Mapping[str, Any]) -> tuple[str, float | None]:
    """Return the answer of a prediction, and its probability if it is known."""
    for key in ANSWERS:
        if key in prediction:
            answer = prediction[key]
            return str(answer), prediction.get("probabilities", {}).get(answer)
    return ", ".join(f"{key} {value:.4g}" for key, value in prediction.items()), None


def _one_line(text: str) -> str:
    return visible(" ".join(text[:MAX_READ].split()))
