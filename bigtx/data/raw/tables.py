"""Comma- and tab-separated values -> documents (RFC 4180, read strictly; the first line names the columns)."""

from __future__ import annotations

import codecs
import contextlib
import csv
from collections.abc import Iterator
from typing import BinaryIO

from bigtx.config.schema import InputConfig
from bigtx.data.raw import documents
from bigtx.data.raw.documents import Document, Origin, Reject, Rejects
from bigtx.data.raw.formats import READ_ERRORS
from bigtx.data.raw.records import BadRecordError, Fields, unreadable
from bigtx.data.storage.access import CHUNK_BYTES

MAX_FIELD_CHARACTERS = 1 << 26
"""A longer field is rejected: while it is read it takes four bytes a character, more than once."""


def read_csv(stream: BinaryIO, origin: Origin, config: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """A document in each row, the columns separated by commas."""
    return _read_table(stream, origin, config, rejects, ",")


def read_tsv(stream: BinaryIO, origin: Origin, config: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """A document in each row, the columns separated by tabs."""
    return _read_table(stream, origin, config, rejects, "\t")


def _read_table(
    stream: BinaryIO, origin: Origin, config: InputConfig, rejects: Rejects, delimiter: str
) -> Iterator[Document]:
    rows = _rows(stream, origin, rejects, delimiter, is_quoted=config.quoted_fields)
    _, header = next(rows, (0, None))
    if header is None:
        return
    fields = Fields(config)
    columns = {name: header.index(name) for name in fields.names if name in header}
    if header.count(fields.text) != 1:
        how = "no column" if fields.text not in columns else "more than one column"
        shown = ", ".join(header[:8])
        rejects.add(Reject(origin.file, 1, f"{how} {fields.text!r} (its columns: {shown}); see input.text_field"))
        return
    for line, row in rows:
        if len(row) != len(header):
            reason = f"{len(row)} fields where the first line names {len(header)} columns"
            rejects.add(Reject(origin.file, line, reason))
            continue
        try:
            document = fields.document({name: row[column] for name, column in columns.items()}, origin, line)
            document.text.encode()
        except BadRecordError as error:
            rejects.add(Reject(origin.file, line, str(error)))
        except UnicodeEncodeError as error:
            rejects.add(Reject(origin.file, line, f"not UTF-8, at character {error.start + 1} of the text"))
        else:
            yield document


def _rows(
    stream: BinaryIO, origin: Origin, rejects: Rejects, delimiter: str, *, is_quoted: bool
) -> Iterator[tuple[int, list[str]]]:
    """The rows, and the lines where they begin; broken ones are rejected, and reading goes on with the next line."""
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    lines = _Lines(stream)
    reader = csv.reader(
        lines, delimiter=delimiter, quoting=csv.QUOTE_MINIMAL if is_quoted else csv.QUOTE_NONE, strict=True
    )
    while True:
        line, lines.num_marks = lines.number + 1, 0
        try:
            row = next(reader)
        except StopIteration:
            return
        except (csv.Error, BadRecordError) as error:
            rejects.add(Reject(origin.file, line, str(error)))
            if is_quoted and "limit" in str(error):
                lines.leave_quotation()
        except READ_ERRORS as error:
            rejects.add(Reject(origin.file, lines.number + 1, unreadable(error)))
            return
        else:
            if row:  # An empty line between rows is none.
                yield line, row


class _Lines:
    """Lines of a stream as text, counted. Bytes that are no UTF-8 become surrogates, which no text may keep."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.number = 0
        self.num_marks = 0
        """Quotation marks since it was set to 0."""

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
            raise BadRecordError(f"a line above the limit of {limit >> 20} MiB")
        if self.number == 1:
            if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                raise OSError("UTF-16 text; convert it to UTF-8")
            raw = raw.removeprefix(codecs.BOM_UTF8)
        return raw.decode(errors="surrogateescape")

    def leave_quotation(self) -> None:
        """Go on to the end of a quotation that was given up, or the lines left of it would be taken for rows."""
        # Where reading fails, the next line meets it again.
        with contextlib.suppress(*READ_ERRORS):
            while self.num_marks % 2 and (raw := self._stream.readline(CHUNK_BYTES)):
                self.number += raw.endswith(b"\n")
                self.num_marks += raw.count(b'"')
