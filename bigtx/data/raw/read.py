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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from decimal import Decimal
from typing import Any

from bigtx.config.schema import InputConfig
from bigtx.data.raw import documents, formats
from bigtx.data.raw.documents import EMPTY, Document, Reject, Rejects
from bigtx.data.raw.files import list_files
from bigtx.data.raw.formats import BadRowError, Format
from bigtx.data.raw.readers import STREAM_READERS, read_parquet
from bigtx.data.raw.rows import Options, Origin, Row, too_long
from bigtx.data.raw.samples import read_archive
from bigtx.data.storage.access import InputFile, open_binary
from bigtx.data.storage.remote import name_of


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
    kind = formats.format_of(path, options.text_suffixes)
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
    except formats.READ_ERRORS as error:
        rejects.add(Reject(origin.file, 0, formats.unreadable(error), lost))
        return
    with closing(stored):
        if file.size == 0:
            is_cut = formats.is_compressed(path) or kind in (Format.PARQUET, Format.TAR)
            reject = Reject(origin.file, 0, "truncated: no bytes", lost) if is_cut else Reject(origin.file, 0, EMPTY)
            rejects.add(reject)
            return
        stored.seek(file.start)
        with closing(formats.decompressed(stored, path)) as stream:
            if kind is Format.TAR:
                yield from read_archive(stream, origin, options, rejects)
            elif kind is not None:
                yield from STREAM_READERS[kind](stream, origin, options, rejects)


_NUMBERS = (int, float, Decimal)


class Fields:
    """The place of the text and its metadata in a row.

    A name with dots that is not a field itself leads through nested records: `meta.language`.
    """

    def __init__(
        self,
        config: InputConfig,
        section: str = "input",
        settings: Sequence[str] = ("text_field", "quoted_fields", "document_per_line"),
    ) -> None:
        """Args:
        section: of the configuration that the settings are in, for messages.
        settings: those that are there.
        """
        self.text = config.text_field
        self._metadata = (config.id_field, config.source_field, config.language_field)
        self.options = Options(
            text_field=config.text_field,
            text_suffixes=config.text_suffixes,
            document_per_line=config.document_per_line,
            quoted_fields=config.quoted_fields,
            columns=[name for name in (self.text, *self._metadata) if name],
            exclude=config.exclude,
            settings={name: f"{section}.{name}" for name in settings},
        )

    def documents(self, rows: Iterable[Row], rejects: Rejects) -> Iterator[Document]:
        """Yield the documents of rows; rows without one are rejected. None is kept while the next one is read."""
        for row in rows:
            try:
                document = self._document(row)
            except BadRowError as error:
                rejects.add(Reject(row.file, row.line, str(error)))
            else:
                del row
                yield document
                del document

    def _document(self, row: Row) -> Document:
        value = value_of(row.fields, self.text)
        if value is None and self.text in row.fields:
            raise BadRowError(f"the field {self.text!r} is null, not a text")
        if value is None:
            keys = ", ".join(list(row.fields)[:8]) or "none"
            raise BadRowError(f"no field {self.text!r} (its fields: {keys}){self.options.see('text_field')}")
        text = _text_in(value)
        if text is None:
            raise BadRowError(f"the field {self.text!r} is {kind_of(value)}, not a text")
        identity, source, language = (_label(row.fields, name) for name in self._metadata)
        if not text:
            raise BadRowError(EMPTY)
        if len(text) > documents.MAX_DOCUMENT_BYTES:
            raise BadRowError(too_long())
        formats.refuse_surrogates(text)
        formats.refuse_nuls(text)
        return Document(text, row.file, row.line, identity or row.id, source, language, row.number)


def value_of(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field, or None if the document lacks it."""
    if name in fields or "." not in name:
        return fields.get(name)
    value: Any = fields
    for part in name.split("."):
        if not isinstance(value, Mapping):
            return None
        value = value.get(part)
    return value


def _label(fields: Mapping[str, Any], name: str) -> str | None:
    """Return a field of the metadata as text."""
    value = value_of(fields, name) if name else None
    if value is None:
        return None
    text = _text_in(value)
    if text is not None:
        formats.refuse_surrogates(text)
        return text
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        return str(value)
    raise BadRowError(f"the field {name!r} is {kind_of(value)}, not a text or a number")


def _text_in(value: Any) -> str | None:
    """Return a value as text; None if it is not text. Many writers of parquet mark texts in UTF-8 as binary.

    Raises:
        BadRowError: bytes that are not UTF-8.
    """
    return formats.decode(value) if isinstance(value, bytes) else value if isinstance(value, str) else None


def kind_of(value: Any) -> str:
    """Return the kind of a value, in the words of its format."""
    kinds = dict.fromkeys(_NUMBERS, "a number") | {bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")
