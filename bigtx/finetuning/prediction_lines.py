"""Records and their predictions as JSON lines, in a file that can be gone on with."""

from __future__ import annotations

import fcntl
import json
import os
import queue
import shlex
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from bigtx.data.records.read import read_jsonl, read_records
from bigtx.data.records.record import WHOLE_FILE, Broken, Record
from bigtx.utils.errors import ConfigError, DataError, LaunchError
from bigtx.utils.files import read_object, write_json

ADDED = ("prediction", "error", "num_cut")
"""What an output line has beside the record's own fields."""


@dataclass(frozen=True)
class Unread:
    """What could not even be read, in the place of a record."""

    error: str


Item = Record | Unread
"""In the order of the input."""


def read_items(paths: Sequence[str]) -> Iterator[Item]:
    """The records of files and folders, and in their places what could not be read."""
    return _with_unread(lambda unread: read_records(paths, unread))


def read_stdin() -> Iterator[Item]:
    """The JSON lines of standard input."""
    return _with_unread(_stdin)


def arriving(most: int) -> Iterator[list[Item]]:
    """The JSON lines of standard input, each time those that have arrived: somebody may wait at the other end of a pipe
    for the answer to a line.

    Args:
        most: at one time.
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
    # Not sys.stdin: Python cannot end while a thread of it waits there.
    with open(sys.stdin.fileno(), "rb", closefd=False) as stream:
        yield from read_jsonl(stream, "standard input", unread)


def _with_unread(read: Callable[[Broken], Iterator[Record]]) -> Iterator[Item]:
    """Records, and in their places what could not be read."""
    found: list[Unread] = []
    for record in read(_Unreadable(found.append)):
        yield from found
        found.clear()
        yield record
    yield from found


class _Unreadable(Broken):
    """Hands on what could not be read, in its place."""

    def __init__(self, take: Callable[[Unread], None]) -> None:
        super().__init__()
        self._take = take

    def add(self, file: str, line: int, reason: str) -> None:
        """One more; line 0 is the file as a whole."""
        self._take(Unread(f"{file}, line {line}: {reason}" if line else f"{file}: {reason}"))
        self.count += 1


def fields_of(item: Item) -> dict[str, Any]:
    """The fields of a record that JSON can hold; of a record that is a file also its name."""
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
    """An object as a JSON line."""
    # A lone surrogate in a text becomes its JSON escape.
    return json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"


class Output:
    """A file of JSON lines that a call with the same weights and input goes on with.

    Lines are known as those of records by the records' fields in them. A chunk that was not written to its end is done
    again, so that the file ends as if nothing had happened.
    """

    MUST_AGREE = ("manifest_sha256", "weights", "too_long", "set")

    def __init__(self, path: Path, facts: Mapping[str, Any]) -> None:
        self.path, self.about = path, path.with_name(path.name + ".about.json")
        self._facts = dict(facts)
        self._is_behind, self._number = True, 0
        self._file: Any = None

    def __enter__(self) -> Output:
        """Open or make the file, and hold it alone.

        Raises:
            LaunchError: it cannot be written, or another process writes it.
            DataError: something else stands in it.
            ConfigError: it was begun with other weights or settings.
        """
        try:
            self._file = open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b")
        except OSError as error:
            raise LaunchError(f"output={self.path} cannot be written: {error.strerror}") from None
        try:
            self._hold()
            self._check()
        except BaseException:
            self._file.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError as unwritten:  # What could not be written before is tried once more.
            if error is None:
                raise self._unwritable(unwritten) from None

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LaunchError(
                f"another process writes {self.path}; wait for it, or write output=FILE to name another file"
            ) from None
        except OSError:
            return  # A file system without locks.

    def _check(self) -> None:
        """Compare with what the file was begun with, or write that down."""
        if not os.fstat(self._file.fileno()).st_size:
            try:
                write_json(self.about, self._facts)
            except OSError as error:
                raise LaunchError(f"{self.about} cannot be written: {error.strerror}") from None
            return
        begun = read_object(self.about)
        if not begun:
            raise DataError(
                f"{self.path} is not empty, and no {self.about.name} says that it is the output of a bigtx predict; "
                "write output=FILE to name another file"
            )
        different = [key for key in self.MUST_AGREE if begun.get(key) != self._facts[key]]
        if "manifest_sha256" in different:
            raise ConfigError(
                f"{self.path} was begun with the checkpoint {begun.get('checkpoint')}, and this is "
                f"{self._facts['checkpoint']}; name that one to continue it, or write output=FILE to name another file"
            )
        if different:
            shown = ", ".join(_shown(key, begun.get(key)) for key in different)
            raise ConfigError(
                f"{self.path} was begun with {shown}; write the same to continue it, or "
                "output=FILE to name another file"
            )

    def known(self, chunk: Sequence[Item]) -> list[dict[str, Any]] | None:
        """The lines of a chunk, if all of them stand in the file; else what stands there of it is taken away.

        Raises:
            DataError: other records stand there.
        """
        if not self._is_behind:
            return None
        start, lines = self._file.tell(), []
        for item in chunk:
            raw = self._file.readline()
            if not raw.endswith(b"\n"):
                self._file.seek(start)
                self._file.truncate()
                self._is_behind = False
                return None
            self._number += 1
            line = _parsed(raw)
            if line is None or not _belongs(line, item):
                what = item.where if isinstance(item, Record) else item.error
                raise DataError(
                    f"{self.path}, line {self._number} is not what bigtx predict makes of {what}; name the same "
                    "input again to continue it, or write output=FILE to name another file"
                )
            lines.append(line)
        return lines

    def write(self, lines: bytes) -> None:
        """Append.

        Raises:
            LaunchError: the disk is full, or something like it.
        """
        try:
            self._file.write(lines)
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from None

    def _unwritable(self, error: OSError) -> LaunchError:
        return LaunchError(
            f"{self.path} cannot be written: {error.strerror}; the same command continues when that is repaired"
        )

    def flush(self) -> None:
        """Nothing is held back."""

    def finish(self) -> None:
        """All records have their lines.

        Raises:
            DataError: the file has more.
            LaunchError: the disk is full, or something like it.
        """
        if self._is_behind and self._file.read(1):
            raise DataError(f"{self.path} has more lines than the input has records; it is the output for another one")
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from None


def _shown(key: str, value: Any) -> str:
    """A setting of the command as it is written; `set` is a list of settings."""
    if isinstance(value, list):
        return " ".join(shlex.quote(each) for each in value) or "no settings"
    return f"{key}={value}"


def _parsed(raw: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(raw)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _belongs(line: Mapping[str, Any], item: Item) -> bool:
    """Whether an output line is that of a record."""
    if isinstance(item, Unread):
        return line.get("error") == item.error
    fields = {key: value for key, value in line.items() if key not in ADDED}
    return json.dumps(fields, sort_keys=True) == json.dumps(fields_of(item), sort_keys=True)
