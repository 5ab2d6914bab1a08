"""The reader of each format; files and members of archives are read in the same way.

Comma- and tab-separated values are read strictly (RFC 4180); the first line names the columns.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Iterator
from typing import BinaryIO

from bigtx.data.raw import documents
from bigtx.data.raw.documents import Reject, Rejects
from bigtx.data.raw.formats import (
    READ_ERRORS,
    BadRowError,
    Format,
    check_texts,
    other_encoding,
    unreadable,
    without_signature,
)
from bigtx.data.raw.rows import Options, Origin, Reader, Row, read_json, read_json_lines, read_text
from bigtx.data.storage.access import CHUNK_BYTES

MAX_FIELD_CHARACTERS = 1 << 26
"""A longer field is rejected: reading it needs four bytes per character, more than once."""


def read_csv(stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield a row for each record, with the columns separated by commas."""
    return _read_table(stream, origin, options, rejects, ",")


def read_tsv(stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield a row for each record, with the columns separated by tabs."""
    return _read_table(stream, origin, options, rejects, "\t")


def _read_table(stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects, delimiter: str) -> Iterator[Row]:
    records = _records(stream, origin, options, rejects, delimiter)
    _, header, _ = next(records, (0, None, 0))
    if header is None:
        return
    wanted = header if options.columns is None else [name for name in options.columns if name in header]
    if problem := _header_problem(header, wanted, options):
        rejects.add(Reject(origin.file, 1, problem, lost=None))
        return
    columns = {name: header.index(name) for name in wanted}
    for line, record, num_lines in records:
        if len(record) == len(header):
            fields = {name: record[column] for name, column in columns.items()}
            yield Row(fields, origin.file, line, origin.number + line)
            del fields
        else:
            reason = f"{len(record)} fields where the first line names {len(header)} columns"
            rejects.add(Reject(origin.file, line, reason, lost=num_lines))
        del record  # It may be long, and the next one is read now.


def _header_problem(header: list[str], wanted: list[str], options: Options) -> str:
    """Return why no row can be read by this first line; "" if nothing is wrong with it."""
    try:
        check_texts(header)
    except BadRowError as error:
        return f"the first line cannot be read: {error}"
    if options.columns is not None and options.text_field not in header:
        return f"no column {options.text_field!r} (its columns: {', '.join(header[:8])}){options.see('text_field')}"
    twice = sorted({name for name in wanted if header.count(name) > 1})
    if twice:
        return f"the first line has duplicate columns: {', '.join(map(repr, twice[:8]))}"
    return ""


def _records(
    stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects, delimiter: str
) -> Iterator[tuple[int, list[str], int]]:
    """Yield the records: the line where each begins, its fields, its number of lines.

    Broken ones are rejected with all lines that they include, and reading continues with the next line.
    """
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    lines, is_quoted = _Lines(stream), options.quoted_fields
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE, strict=True
    )
    while True:
        line, lines.num_marks = lines.number + 1, 0
        try:
            record = next(reader)
        except StopIteration:
            return
        except (csv.Error, BadRowError) as error:
            if is_quoted and "limit" in str(error):
                lines.leave_quotation()
            num_lines = max(1, lines.number - line + 1)
            is_open = is_quoted and num_lines > 1
            advice = options.see("quoted_fields", "=false", "; if quotation marks are text: ") if is_open else ""
            rejects.add(Reject(origin.file, line, f"{error}{advice}", lost=num_lines))
        except READ_ERRORS as error:
            rejects.add(Reject(origin.file, lines.number + 1, unreadable(error), lost=None))
            return
        else:
            if record:  # An empty line between records is not a record.
                yield line, record, lines.number - line + 1
            del record


class _Lines:
    """Lines of a stream as text, with a count. Bytes that are not UTF-8 become surrogates, which are refused later."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.number = 0
        self.num_marks = 0
        """The number of quotation marks since it was set to 0."""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        limit = min(4 * MAX_FIELD_CHARACTERS, documents.MAX_DOCUMENT_BYTES)
        raw = self._stream.readline(limit + 1)
        if not raw:
            raise StopIteration
        self.number += 1
        self.num_marks += raw.count(b'"')
        if len(raw) > limit:
            while not raw.endswith(b"\n") and (raw := self._stream.readline(CHUNK_BYTES)):
                self.num_marks += raw.count(b'"')
            raise BadRowError(f"a line above the limit of {limit >> 20} MiB")
        if self.number == 1:
            if encoding := other_encoding(raw):
                raise OSError(encoding)
            raw = without_signature(raw)
        return raw.decode(errors="surrogateescape")

    def leave_quotation(self) -> None:
        """Skip to the end of a quotation that was given up; otherwise the rest of its lines would be read as rows."""
        # If reading fails, the next line fails again.
        with contextlib.suppress(*READ_ERRORS):
            while self.num_marks % 2 and (raw := self._stream.readline(CHUNK_BYTES)):
                self.number += raw.endswith(b"\n")
                self.num_marks += raw.count(b'"')


STREAM_READERS: dict[Format, Reader] = {
    Format.TEXT: read_text,
    Format.JSON: read_json,
    Format.JSON_LINES: read_json_lines,
    Format.CSV: read_csv,
    Format.TSV: read_tsv,
}
"""Readers of streams from start to end; parquet and archives need more (parquet.py, samples.py)."""
