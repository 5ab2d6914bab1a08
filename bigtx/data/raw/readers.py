"""The reader of each format; files and members of archives are read in the same way.

Comma- and tab-separated values are read strictly (RFC 4180); the first line names the columns. Parquet is read by
columns, batch by batch, in ranges of row groups (the extra `parquet`).
"""

from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, BinaryIO

from bigtx.data.raw import documents, formats
from bigtx.data.raw.documents import Reject, Rejects
from bigtx.data.raw.formats import BadRowError, Format
from bigtx.data.raw.rows import Options, Origin, Reader, Row, read_json, read_json_lines, read_text
from bigtx.data.storage.access import CHUNK_BYTES, InputFile, open_binary
from bigtx.utils.errors import DataError
from bigtx.utils.shell import setting

MAX_FIELD_CHARACTERS = 1 << 26
"""A longer field is rejected: reading it needs four bytes per character, more than once."""


def read_table(stream: BinaryIO, origin: Origin, options: Options, rejects: Rejects, delimiter: str) -> Iterator[Row]:
    """Yield a row for each record."""
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
        formats.check_texts(header)
    except BadRowError as error:
        return f"the first line cannot be read: {error}"
    if options.columns is not None and options.text_field not in header:
        return f"no column {options.text_field!r} (its columns: {', '.join(header[:8])}){options.see('text_field')}"
    twice = sorted({name for name in wanted if header.count(name) > 1})
    return f"the first line has duplicate columns: {', '.join(map(repr, twice[:8]))}" if twice else ""


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
        except formats.READ_ERRORS as error:
            rejects.add(Reject(origin.file, lines.number + 1, formats.unreadable(error), lost=None))
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
            if encoding := formats.other_encoding(raw):
                raise OSError(encoding)
            raw = formats.without_signature(raw)
        return raw.decode(errors="surrogateescape")

    def leave_quotation(self) -> None:
        """Skip to the end of a quotation that was given up; otherwise the rest of its lines would be read as rows."""
        # If reading fails, the next line fails again.
        with contextlib.suppress(*formats.READ_ERRORS):
            while self.num_marks % 2 and (raw := self._stream.readline(CHUNK_BYTES)):
                self.number += raw.endswith(b"\n")
                self.num_marks += raw.count(b'"')


STREAM_READERS: dict[Format, Reader] = {
    Format.TEXT: read_text,
    Format.JSON: read_json,
    Format.JSON_LINES: read_json_lines,
    Format.CSV: functools.partial(read_table, delimiter=","),
    Format.TSV: functools.partial(read_table, delimiter="\t"),
}
"""Readers of streams from start to end; parquet and archives need more (`read_parquet`, samples.py)."""


_BATCH_ROWS = 128


def check_package(path: str, exclude: Sequence[str] | None = None) -> None:
    """Check that parquet can be read.

    Args:
        exclude: the value of `input.exclude`; None if there is no such setting.

    Raises:
        DataError: the package is missing.
    """
    if importlib.util.find_spec("pyarrow") is None:
        without = "" if exclude is None else setting("input.exclude", [*exclude, "*.parquet"])
        raise DataError(
            f"Reading {path} needs pyarrow, which is not installed: pip install 'bigtx[parquet]'."
            + (without and f" To leave such files out of folders and globs: {without}.")
        )


def row_group_ranges(file: InputFile, part_bytes: int) -> list[InputFile]:
    """Cut a file into ranges of row groups of about `part_bytes`; one that cannot be opened is returned as it is."""
    try:
        with _opened(file) as parquet:
            groups = [parquet.metadata.row_group(number) for number in range(parquet.num_row_groups)]
            sizes = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
            rows = [group.num_rows for group in groups]
    except Exception:
        return [file]  # Reading it says what is wrong with it.
    parts: list[InputFile] = []
    start, first_row = 0, 1
    for end in range(1, len(groups) + 1):
        size = sum(sizes[start:end])
        if size >= part_bytes or end == len(groups):
            parts.append(replace(file, size=size, start=start, end=end, first_line=first_row))
            start, first_row = end, first_row + sum(rows[start:end])
    if len(parts) < 2:
        return [file]
    # The sizes of the parts add up to the file's.
    rest = file.size - sum(part.size for part in parts)
    return [*parts[:-1], replace(parts[-1], size=max(1, parts[-1].size + rest))]


def read_parquet(file: InputFile, origin: Origin, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield a row of the wanted columns for each row of a file or range of row groups.

    A damaged row group is one reject, and the next one is read.
    """
    wanted = list(options.columns or ())
    with contextlib.ExitStack() as stack:
        try:
            parquet = stack.enter_context(_opened(file))
            names = parquet.schema_arrow.names
        except Exception as error:
            rejects.add(Reject(origin.file, 0, _damaged(error), lost=None))
            return
        if reason := _column_problem(names, wanted, options):
            rejects.add(Reject(origin.file, 0, reason, lost=None))
            return
        text = options.text_field
        groups = range(file.start, parquet.num_row_groups if file.end is None else file.end)
        if not _is_text(kind := _kind_of(parquet.schema_arrow, text)):
            lost = sum(parquet.metadata.row_group(group).num_rows for group in groups)
            reason = f"the column {text!r} is of the type {kind}, not a text{options.see('text_field')}"
            rejects.add(Reject(origin.file, 0, reason, lost))
            return
        first_row = file.first_line
        for group in groups:
            yield from _read_group(parquet, group, first_row, wanted, origin, rejects)
            first_row += parquet.metadata.row_group(group).num_rows


def _column_problem(names: list[str], wanted: list[str], options: Options) -> str:
    """Return why no row can be read from these columns; "" if nothing is wrong with them."""
    text = options.text_field
    if not {text, text.partition(".")[0]} & set(names):
        return f"no column {text!r} (its columns: {', '.join(sorted(names)[:8])}){options.see('text_field')}"
    tops = {name if name in names else name.partition(".")[0] for name in wanted}
    twice = sorted(name for name in tops if names.count(name) > 1)
    return f"it has columns of the same name: {', '.join(map(repr, twice))}" if twice else ""


def _kind_of(schema: Any, name: str) -> Any:
    """Return the type of a column, or of a field in nested records, or None if it is missing."""
    if name in schema.names:
        return schema.field(name).type
    top, *inner = name.split(".")
    kind = schema.field(top).type
    for part in inner:
        index = kind.get_field_index(part) if _types().is_struct(kind) else -1
        if index < 0:
            return None
        kind = kind.field(index).type
    return kind


def _is_text(kind: Any) -> bool:
    """Return whether values of a type are texts, or bytes that may be texts; missing values are reported by row."""
    types = _types()
    if kind is not None and types.is_dictionary(kind):
        kind = kind.value_type
    kind = getattr(kind, "storage_type", kind)
    are_texts = (types.is_string, types.is_large_string, types.is_string_view)
    are_bytes = (types.is_binary, types.is_large_binary, types.is_binary_view, types.is_fixed_size_binary)
    return kind is None or any(fits(kind) for fits in (*are_texts, *are_bytes, types.is_null))


def _types() -> Any:
    from pyarrow import types

    return types


def _read_group(
    parquet: Any, group: int, first_row: int, wanted: list[str], origin: Origin, rejects: Rejects
) -> Iterator[Row]:
    row = first_row
    batches = parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=wanted, use_threads=False)
    while True:
        try:
            batch = next(batches, None)
        except Exception as error:
            lost = max(1, parquet.metadata.row_group(group).num_rows - (row - first_row))
            rejects.add(Reject(origin.file, row, f"{_damaged(error)} (row group {group})", lost=lost))
            return
        if batch is None:
            return
        for index in range(batch.num_rows):
            try:
                fields = _fields(batch, index)
            except UnicodeDecodeError as error:
                rejects.add(Reject(origin.file, row, f"not UTF-8: {error.reason} at byte {error.start + 1} of a field"))
            else:
                yield Row(fields, origin.file, row, origin.number + row)
            row += 1


def _fields(batch: Any, index: int) -> dict[str, Any]:
    return {name: column[index].as_py() for name, column in zip(batch.schema.names, batch.columns, strict=True)}


@contextlib.contextmanager
def _opened(file: InputFile) -> Iterator[Any]:
    """Open the file with pyarrow, with one thread and a buffer instead of whole columns in memory."""
    from pyarrow.parquet import ParquetFile

    with (
        contextlib.closing(open_binary(file, seeks=True)) as stream,
        ParquetFile(stream, buffer_size=CHUNK_BYTES, pre_buffer=False, page_checksum_verification=True) as parquet,
    ):
        yield parquet


def _damaged(error: Exception) -> str:
    """Return why pyarrow failed; its errors have many classes, and are long."""
    return f"cannot be read: {(str(error) or type(error).__name__).splitlines()[0][:200]}"
