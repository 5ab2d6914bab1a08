"""Records (of JSON, a table, a webdataset sample) -> documents, by the fields that the configuration names."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from typing import Any

from bigtx.config.schema import InputConfig
from bigtx.data.raw.documents import EMPTY, Document, Origin

_MISSING = object()


class BadRecordError(Exception):
    """A record that holds no text; the message is the reason."""


class Fields:
    """Where in a record the text is, and what is known about it.

    A name with dots that is no field itself leads through nested records: `meta.language`.
    """

    def __init__(self, config: InputConfig) -> None:
        self.text = config.text_field
        self._metadata = (config.id_field, config.source_field, config.language_field)
        self.has_metadata = any(self._metadata)
        self.names = [name for name in (self.text, *self._metadata) if name]

    def document(self, record: Mapping[str, Any], origin: Origin, line: int) -> Document:
        """The record's document.

        Raises:
            BadRecordError: its text is missing or empty, or is none.
        """
        text = _value(record, self.text)
        if not isinstance(text, str):
            if text is _MISSING:
                keys = ", ".join(list(record)[:8]) or "none"
                raise BadRecordError(f"no field {self.text!r} (its fields: {keys}); see input.text_field")
            raise BadRecordError(f"the field {self.text!r} is a {type(text).__name__}, not a text")
        number = origin.number + line
        metadata = self.metadata(record) if self.has_metadata else (None, None, None)
        if not text:
            raise BadRecordError(EMPTY)
        return Document(text, origin.file, line, *metadata, number)

    def metadata(self, record: Mapping[str, Any]) -> tuple[str | None, str | None, str | None]:
        """Id, source and language of a record; None where it has none.

        Raises:
            BadRecordError: one of them is neither a text nor a number.
        """
        identity, source, language = (_label(record, name) for name in self._metadata)
        return identity, source, language


def parse_json(raw: bytes) -> dict[str, Any]:
    """The JSON object in some bytes.

    Raises:
        UnicodeDecodeError: they are no UTF-8.
        BadRecordError: they are no JSON object.
    """
    try:
        record = json.loads(raw.decode())
    except UnicodeDecodeError:
        raise
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not JSON: {error.msg}, at character {error.pos + 1}") from None
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"a JSON {type(record).__name__} instead of an object")
    return record


def refuse_surrogates(text: str) -> None:
    """Refuse a text with half a surrogate pair, which is no character; JSON can escape one.

    Raises:
        BadRecordError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRecordError(f"an unpaired surrogate at character {error.start + 1} of the text") from None


def not_utf8(raw: bytes, error: UnicodeDecodeError) -> str:
    """Why bytes are no text."""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16 text; convert it to UTF-8"
    return f"not UTF-8: {error.reason} at byte {error.start + 1} of the document"


def unreadable(error: Exception) -> str:
    """Why a stream could not be read on."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {reason}"


def _value(record: Mapping[str, Any], name: str) -> Any:
    value = record.get(name, _MISSING)
    if value is _MISSING and "." in name:
        value = record
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                return _MISSING
            value = value[part]
    return value


def _label(record: Mapping[str, Any], name: str) -> str | None:
    value = _value(record, name) if name else None
    if value is None or value is _MISSING:
        return None
    if isinstance(value, str):
        refuse_surrogates(value)
        return value
    if isinstance(value, (int, float)):
        return str(value)
    raise BadRecordError(f"the field {name!r} is a {type(value).__name__}, neither a text nor a number")
