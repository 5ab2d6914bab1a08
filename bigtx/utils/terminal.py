"""Standard output and error, which accept every text and notice lost output, and untrusted texts for a terminal."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
import textwrap
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

WIDTH = 80
"""The columns of a help."""
_MARGIN = 26
ERASE_LINE = "\r\x1b[K"
"""Erases a terminal's current line."""


def visible(text: str, *, keep: str = "") -> str:
    """Return the text with escapes for characters that are not visible, such as the codes that move a cursor.

    Args:
        keep: characters that stay as they are.
    """
    return "".join(sign if sign.isprintable() or sign in keep else repr(sign)[1:-1] for sign in text)


LONGEST_MESSAGE = 4000
"""Characters of a message. Longer ones quote a damaged or hostile file, or a compiler; they are cut in the middle."""
_END_OF_MESSAGE = 1000


def shortened(text: str) -> str:
    """Return a message, without its middle if it is longer than `LONGEST_MESSAGE`."""
    if len(text) <= LONGEST_MESSAGE:
        return text
    mark = f" [... {len(text):,} characters, shortened ...] "
    return f"{text[: LONGEST_MESSAGE - _END_OF_MESSAGE - len(mark)]}{mark}{text[-_END_OF_MESSAGE:]}"


def width(text: str) -> int:
    """Return the number of columns that a printable text takes: Chinese characters and the like take two, combining
    marks none.
    """
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def fitted(text: str, columns: int) -> str:
    """Return the text, or its beginning and an ellipsis, padded with spaces to exactly so many columns."""
    if width(text) > columns:
        while text and width(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - width(text))


def obeys(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that interprets control characters."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def wrapped(text: str, indent: str = "", first: str | None = None) -> str:
    """Return a text in lines of at most 80 columns.

    Args:
        first: the beginning of the first line, in place of the indent.
    """
    first = indent if first is None else first
    return textwrap.fill(
        text, WIDTH, initial_indent=first, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )


def columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return lines of names and their meanings, within 80 columns where words allow it."""
    rows = list(rows)
    margin = min(_MARGIN, max((len(name) for name, _ in rows), default=0) + 4)
    lines = []
    for name, meaning in rows:
        first = f"  {name}".ljust(margin)
        if not first.endswith("  "):
            lines.append(first)
            first = " " * margin
        lines.append(wrapped(meaning, " " * margin, first).rstrip())
    return lines


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> list[str]:
    """Return rows of cells as lines with aligned columns.

    Args:
        rows: the heads and the rows, each with as many cells.
        left: the number of columns that are aligned to the left; the others have numbers.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [str.ljust] * left + [str.rjust] * (len(widths) - left)
    return ["  ".join(side(cell, size) for side, cell, size in zip(sides, row, widths, strict=True)) for row in rows]


class Output(io.FileIO):
    """The bytes of a standard stream, which records whether output was lost.

    One that was closed accepts everything and drops it, so that no message ends a command before its work is done.

    Attributes:
        error: why something that was written is lost, if it is.
        is_closed: whether the command was started with the stream closed.
    """

    def __init__(self, descriptor: int, *, is_closed: bool) -> None:
        super().__init__(descriptor, "w", closefd=False)
        self.error: OSError | None = None
        self.is_closed = is_closed

    def write(self, data: Any, /) -> int:
        """Write, or raise the error and record it."""
        if self.is_closed:
            self.error = OSError(errno.EBADF, "it is closed")
        try:
            return super().write(data) or 0
        except OSError as error:
            self.error = error
            raise


def prepare() -> None:
    """Make standard output and error accept every text: characters that their encoding does not have become escapes."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:  # Python found the descriptor closed. Files that are opened later must not get its number.
            raw = Output(_nowhere(descriptor), is_closed=True)
            setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if sys.stdout is sys.__stdout__ and isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _watched(sys.stdout)


def lost() -> OSError | None:
    """Return why something that was written to standard output is lost, if it is."""
    raw = _raw(sys.stdout)
    return raw.error if raw else None


def is_closed(stream: TextIO) -> bool:
    """Return whether it is a standard stream that was closed from the start."""
    raw = _raw(stream)
    return raw is not None and raw.is_closed


def _raw(stream: TextIO) -> Output | None:
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)
    return raw if isinstance(raw, Output) else None


def _nowhere(descriptor: int) -> int:
    """Open a closed descriptor on the null device; return it, or another one if it is in use by now."""
    opened = os.open(os.devnull, os.O_WRONLY)
    if opened == descriptor:
        return opened
    with contextlib.suppress(OSError):
        os.fstat(descriptor)
        return opened
    os.dup2(opened, descriptor)
    os.close(opened)
    return descriptor


def _watched(stream: io.TextIOWrapper) -> io.TextIOWrapper:
    """Return the same standard output as a stream that records whether output was lost."""
    stream.flush()
    raw = Output(stream.fileno(), is_closed=False)
    # With PYTHONUNBUFFERED there is no buffer.
    buffer: Any = io.BufferedWriter(raw) if isinstance(stream.buffer, io.BufferedWriter) else raw
    return io.TextIOWrapper(
        buffer,
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
