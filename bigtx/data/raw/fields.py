"""Rows -> documents, by the fields that the configuration names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from bigtx.config.schema import InputConfig
from bigtx.data.raw import documents
from bigtx.data.raw.decode import BadRowError, decode, refuse_nuls, refuse_surrogates
from bigtx.data.raw.documents import EMPTY, Document, Reject, Rejects
from bigtx.data.raw.rows import Options, Row, too_long

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
            raise BadRowError(f"the field {self.text!r} is {_kind_of(value)}, not a text")
        identity, source, language = (_label(row.fields, name) for name in self._metadata)
        if not text:
            raise BadRowError(EMPTY)
        if len(text) > documents.MAX_DOCUMENT_BYTES:
            raise BadRowError(too_long())
        refuse_surrogates(text)
        refuse_nuls(text)
        return Document(text, row.file, row.line, identity or row.id, source, language, row.number)


def value_of(fields: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; None if there is none."""
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
        refuse_surrogates(text)
        return text
    if isinstance(value, _NUMBERS) and not isinstance(value, bool):
        return str(value)
    raise BadRowError(f"the field {name!r} is {_kind_of(value)}, not a text or a number")


def _text_in(value: Any) -> str | None:
    """Return a value as text; None if it is not text. Many writers of parquet mark texts in UTF-8 as binary.

    Raises:
        BadRowError: bytes that are not UTF-8.
    """
    return decode(value) if isinstance(value, bytes) else value if isinstance(value, str) else None


def _kind_of(value: Any) -> str:
    """Return the kind of a value, in the words of its format."""
    kinds = dict.fromkeys(_NUMBERS, "a number") | {bool: "true or false", list: "a list", dict: "an object"}
    return kinds.get(type(value), f"of the type {type(value).__name__}")
