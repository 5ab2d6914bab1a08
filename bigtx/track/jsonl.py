"""Write a file of JSON objects, one per line, that is safe at a kill, at a resume and on a full disk."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bigtx.utils.errors import LaunchError, writes
from bigtx.utils.files import json_value, write_atomic
from bigtx.utils.units import counted

Record = dict[str, Any]
MODEL_EVENT = "model"
"""The kind of event that names a run's checkpoint for other runs."""
EVENTS = "events.jsonl"
RECORD_FILES = ("metrics.jsonl", "samples.jsonl", "predictions.jsonl", EVENTS)
"""The files of a run's records."""
TASK_FILE = "wandb_task.json"
"""The file with what W&B needs besides the records: the config, the names, and which values of metrics are better."""


class JsonLines:
    """A file to which records are appended. A record has reached the operating system when the call returns.

    Floats are read back exactly. JSON has no NaN and no infinity: they are written as the texts "NaN", "Infinity" and
    "-Infinity", which `float()` reads.

    When the disk is full, records are kept in memory, `warn` is called once, and every later call tries again.

    Attributes:
        num_lines: the number of lines, including those in memory.
    """

    def __init__(self, path: Path, *, warn: Callable[[str], None], up_to_step: float = math.inf) -> None:
        """Open or create the file. Remove a line that a crash left incomplete, and steps that will be repeated.

        Args:
            path: the file.
            warn: prints a warning.
            up_to_step: the last step to keep.

        Raises:
            LaunchError: The file cannot be written.
        """
        self._path = path
        self._warn = warn
        self._warned = False
        self._unwritten = b""
        self._open(up_to_step)

    def _open(self, up_to_step: float) -> None:
        path = self._path
        with writes(path, "; make the folder and its files writable, or name another run_dir"):
            kept = _keep_whole_lines(path, up_to_step)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        last_line = kept[-1] if kept else b""
        self._end = sum(map(len, kept))
        self._last_start = self._end - len(last_line)
        self._last: Record = parse_line(last_line) or {}
        self.num_lines = len(kept)

    def append(self, record: Record) -> None:
        """Write one record as a new line."""
        self.extend([record])

    def extend(self, records: list[Record]) -> None:
        """Write records as new lines, all at once."""
        lines = [_line(record) for record in records]
        self._unwritten += b"".join(lines)
        self._flush(len(lines[-1]))
        self._last = records[-1]
        self.num_lines += len(lines)

    def merge(self, record: Record) -> None:
        """Write a record. If the last line has the same step, it is extended by the record."""
        if self._last.get("step") == record["step"]:
            record = {**self._last, **record, "time": self._last.get("time", record["time"])}
            if self._unwritten:
                self._unwritten = self._unwritten[: -len(_line(self._last))]
            else:
                self._end = self._last_start
            self.num_lines -= 1
        self.append(record)

    def unwritten(self) -> list[Record]:
        """Return the records that are only in memory, because the disk is full."""
        return [record for line in self._unwritten.splitlines(keepends=True) if (record := parse_line(line))]

    def place(self) -> str:
        """Return the path of the open file, which may have been moved; "" if it was deleted, or if that is unknown."""
        with contextlib.suppress(OSError):
            path = os.readlink(f"/proc/self/fd/{self._file}")
            return path if os.path.exists(path) else ""
        return ""

    def rewind(self, step: int) -> None:
        """Remove the records of later steps. The file becomes another one of the same name, as readers can see.

        Raises:
            LaunchError: The file cannot be written.
        """
        unwritten = _whole_lines(self._unwritten, step)
        os.close(self._file)
        with contextlib.suppress(OSError):  # On a full disk the file is only cut.
            write_atomic(self._path, b"".join(_whole_lines(self._path.read_bytes(), step)))
        self._open(step)
        self._unwritten = b"".join(unwritten)
        self.num_lines += len(unwritten)
        if unwritten:
            self._last = parse_line(unwritten[-1]) or {}

    def close(self) -> None:
        """Try again to write what is in memory, and close the file."""
        if self._unwritten:
            self._flush(len(_line(self._last)))
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
                self._warn(f"cannot write {self._path}: {error.strerror}")
            return
        self._end += len(text)
        self._last_start = self._end - last_length
        self._unwritten = b""


def parse_line(line: bytes) -> Record | None:
    """Return the record of one line; None if the line is incomplete or is not a JSON object."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json_value(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_records(path: Path) -> list[Record]:
    """Return the records of a file. Damaged lines are left out; without the file there is no record."""
    try:
        text = path.read_bytes()
    except OSError:
        return []
    return [record for line in text.splitlines(keepends=True) if (record := parse_line(line)) is not None]


def append_missing(path: Path, records: list[Record]) -> None:
    """Append the records that the file lacks, because its disk was full when they were made.

    Raises:
        LaunchError: the file still cannot be written.
    """

    def refuse(text: str) -> None:
        raise LaunchError(
            f"{path} lacks {counted(len(missing), 'line')}, which a checkpoint holds: {text}. Free space on its disk, "
            "and resume the run again"
        )

    # A line may have been extended since, but its time is the same.
    known = {(str(record.get("step")), str(record.get("time"))) for record in read_records(path)}
    missing = [record for record in records if (str(record["step"]), str(record["time"])) not in known]
    if missing:
        file = JsonLines(path, warn=refuse)
        file.extend(missing)
        file.close()


def step_of(record: Record) -> float:
    """Return the step of a record; infinity for a record without a step."""
    step = record.get("step")
    return step if isinstance(step, int) else math.inf


def is_stamped(record: Record) -> bool:
    """Return whether a record has a step, tokens and a time, as every record of metrics, samples and predictions."""
    return type(record.get("step")) is int and all(
        type(record.get(name)) in (int, float) for name in ("tokens", "time")
    )


def _keep_whole_lines(path: Path, up_to_step: float) -> list[bytes]:
    """Remove incomplete lines and those of later steps from the file. Returns the remaining lines."""
    text = path.read_bytes() if path.exists() else b""
    kept = _whole_lines(text, up_to_step)
    wanted = b"".join(kept)
    if text.startswith(wanted):
        if wanted != text:
            os.truncate(path, len(wanted))
    else:
        write_atomic(path, wanted)
    return kept


def _whole_lines(text: bytes, up_to_step: float) -> list[bytes]:
    """Return the lines that are records, up to a step."""
    records = ((line, parse_line(line)) for line in text.splitlines(keepends=True))
    return [line for line, record in records if record is not None and step_of(record) <= up_to_step]


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
