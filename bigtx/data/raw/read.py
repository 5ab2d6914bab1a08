"""Raw text -> documents, one after another, in memory that does not grow with the input.

    list_files(config) ──▶ files ──split_file──▶ parts ──read_rows──▶ rows ──▶ Document(text, file, line, id, ...)
                                                             └─────────┴─────▶ Rejects: what could not be read

Text files are one document each, or one per line with `document_per_line`; JSON lines have one document in each line,
tables in each row, archives in their members. A document is read completely and unchanged, or not at all:

- Bytes that are not valid UTF-8 reject the document; nothing is replaced. Many NULs reject it too.
- A byte order mark at the start of a file is the file's signature, not text, and is left out (Unicode 16.0, 23.8);
  anywhere else U+FEFF is kept.
- Lines end at a line feed. A carriage return before it belongs to the line's end where lines are documents, and to the
  text everywhere else.
- Empty documents are left out and counted, but are not a fault of the input.
- If a file is truncated or damaged, the documents before that place are kept. If it is known how many are
  missing, each is counted, otherwise the place is counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import closing

from bigtx.config.schema import InputConfig
from bigtx.data.raw.decode import unreadable
from bigtx.data.raw.documents import EMPTY, MAX_DOCUMENT_BYTES, Document, Reject, Rejects
from bigtx.data.raw.fields import Fields
from bigtx.data.raw.files import list_files, split_file
from bigtx.data.raw.formats import READ_ERRORS, Format, decompressed, format_of, is_compressed
from bigtx.data.raw.parquet import read_parquet
from bigtx.data.raw.readers import STREAM_READERS
from bigtx.data.raw.rows import Options, Origin, Row
from bigtx.data.raw.samples import read_archive
from bigtx.data.storage.access import InputFile, open_binary
from bigtx.data.storage.remote import name_of

__all__ = [
    "EMPTY",
    "MAX_DOCUMENT_BYTES",
    "Document",
    "InputFile",
    "Reject",
    "Rejects",
    "documents_of",
    "list_files",
    "read_documents",
    "read_file",
    "read_rows",
    "split_file",
]


def read_documents(config: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """Yield all documents of the input, in the order of `list_files`.

    What cannot be read is added to `rejects`; the caller ends with `rejects.check`.

    Raises:
        DataError: as `list_files` does.
    """
    yield from documents_of(list_files(config), Fields(config), rejects)


def documents_of(files: Iterable[InputFile], fields: Fields, rejects: Rejects) -> Iterator[Document]:
    """Yield the documents of files; raises nothing that the input could cause."""
    for file in files:
        yield from fields.documents(read_rows(file, fields.options, rejects), rejects)


def read_file(file: InputFile, config: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """Yield the documents of one file or range; raises nothing that the input could cause."""
    yield from documents_of([file], Fields(config), rejects)


def read_rows(file: InputFile, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield the rows of one file or range; raises nothing that the input could cause."""
    path = name_of(file.path)
    kind = format_of(path, options.text_suffixes)
    if kind is Format.JSON and file.end is not None:
        kind = Format.JSON_LINES  # Other formats are not cut into ranges.
    num_bytes = None if file.end is None else file.size
    origin = Origin(file.shown, file.name or path.rpartition("/")[2], file.first_line, num_bytes)
    # A text file is one document; for other files the number of lost documents is not known.
    lost = 1 if kind is Format.TEXT and not options.document_per_line else None
    if kind is Format.PARQUET and file.size:
        yield from read_parquet(file, origin, options, rejects)
        return
    try:
        stored = open_binary(file)
    except READ_ERRORS as error:
        rejects.add(Reject(origin.file, 0, unreadable(error), lost))
        return
    with closing(stored):
        if file.size == 0:
            is_cut = is_compressed(path) or kind in (Format.PARQUET, Format.TAR)
            reject = Reject(origin.file, 0, "truncated: no bytes", lost) if is_cut else Reject(origin.file, 0, EMPTY)
            rejects.add(reject)
            return
        stored.seek(file.start)
        with closing(decompressed(stored, path)) as stream:
            if kind is Format.TAR:
                yield from read_archive(stream, origin, options, rejects)
            elif kind is not None:
                yield from STREAM_READERS[kind](stream, origin, options, rejects)
