"""Streams of text -> documents: a whole stream, its lines, or the JSON in its lines."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import BinaryIO

from bigtx.config.schema import InputConfig
from bigtx.data.raw import documents
from bigtx.data.raw.documents import EMPTY, Document, Origin, Reject, Rejects
from bigtx.data.raw.formats import READ_ERRORS, read_up_to
from bigtx.data.raw.records import BadRecordError, Fields, not_utf8, parse_json, refuse_surrogates, unreadable
from bigtx.data.storage.access import CHUNK_BYTES

_BLANK_JSON = b" \t\r\n"


def read_text(stream: BinaryIO, origin: Origin, config: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """A text file: one document, or one a line with `document_per_line`."""
    if config.document_per_line:
        yield from _read_text_lines(stream, origin, rejects)
        return
    try:
        raw = read_up_to(stream, documents.MAX_DOCUMENT_BYTES + 1)
    except READ_ERRORS as error:
        rejects.add(Reject(origin.file, 0, unreadable(error)))
        return
    if len(raw) > documents.MAX_DOCUMENT_BYTES:
        reason = f"{too_long()}; input.document_per_line=true reads each line as a document"
        rejects.add(Reject(origin.file, 1, reason))
        return
    if text := _decoded(raw.removeprefix(codecs.BOM_UTF8), origin, 1, rejects):
        yield Document(text, origin.file, 1, origin.name, number=origin.number + 1)


def read_json_lines(stream: BinaryIO, origin: Origin, config: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """A record in each line."""
    fields = Fields(config)
    for line, raw in _lines(stream, origin, rejects):
        try:
            document = fields.document(parse_json(raw), origin, line)
            if b"\\u" in raw:
                refuse_surrogates(document.text)
        except UnicodeDecodeError as error:
            rejects.add(Reject(origin.file, line, not_utf8(raw, error)))
        except BadRecordError as error:
            if raw.strip(_BLANK_JSON):  # An empty line between documents is none.
                rejects.add(Reject(origin.file, line, str(error)))
        else:
            yield document


def too_long() -> str:
    """Why a document is rejected that does not fit into memory."""
    return f"longer than {documents.MAX_DOCUMENT_BYTES >> 20} MiB"


def _read_text_lines(stream: BinaryIO, origin: Origin, rejects: Rejects) -> Iterator[Document]:
    for line, raw in _lines(stream, origin, rejects):
        raw = raw.removesuffix(b"\n").removesuffix(b"\r")
        if raw.strip(b"\r") and (text := _decoded(raw, origin, line, rejects)):
            yield Document(text, origin.file, line, f"{origin.name}:{line}", number=origin.number + line)


def _decoded(raw: bytes, origin: Origin, line: int, rejects: Rejects) -> str:
    """The text in some bytes; "" if it is none, which is told to the rejects."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        rejects.add(Reject(origin.file, line, not_utf8(raw, error)))
        return ""
    if not text:
        rejects.add(Reject(origin.file, line, EMPTY))
    return text


def _lines(stream: BinaryIO, origin: Origin, rejects: Rejects) -> Iterator[tuple[int, bytes]]:
    """The lines with their numbers and ends; those that are too long are rejected and skipped."""
    limit = documents.MAX_DOCUMENT_BYTES
    line, position = origin.first_line - 1, 0
    try:
        while origin.num_bytes is None or position < origin.num_bytes:
            raw = stream.readline(limit + 1)
            if not raw:
                return
            line, position = line + 1, position + len(raw)
            if len(raw) <= limit:
                yield line, raw.removeprefix(codecs.BOM_UTF8) if line == 1 else raw
                continue
            rejects.add(Reject(origin.file, line, too_long()))
            while not raw.endswith(b"\n") and (raw := stream.readline(CHUNK_BYTES)):
                position += len(raw)
    except READ_ERRORS as error:
        rejects.add(Reject(origin.file, line + 1, unreadable(error)))
