"""Archives -> documents: members are read as files are, and webdataset samples as documents with metadata.

A webdataset sample is a run of neighbouring members with one key: the path up to the first dot of the last name.
`000.json` beside `000.txt` is the text's metadata; on its own it is a record. Members with other suffixes (pickles
among them) are passed over and counted, and their bytes are never looked at.
"""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from bigtx.config.schema import InputConfig
from bigtx.data.raw import documents
from bigtx.data.raw.archives import DamagedArchiveError, Member, read_members
from bigtx.data.raw.documents import EMPTY, Document, Origin, Reject, Rejects
from bigtx.data.raw.files import counts_by_suffix, is_left_out
from bigtx.data.raw.formats import (
    READ_ERRORS,
    Format,
    decompressed,
    format_of,
    read_up_to,
    suffix_inside,
    suffix_of,
)
from bigtx.data.raw.lines import too_long
from bigtx.data.raw.readers import STREAM_READERS
from bigtx.data.raw.records import BadRecordError, Fields, not_utf8, parse_json, refuse_surrogates, unreadable


def read_archive(archive: BinaryIO, origin: Origin, config: InputConfig, rejects: Rejects) -> Iterator[Document]:
    """The documents of an archive."""
    yield from _Archive(origin, config, rejects).read(archive)


@dataclass
class _Sample:
    """What has been read of a sample.

    Attributes:
        has_text: a member of it holds documents, so its `.json` is none.
        texts: held back until the metadata is known.
        record: the bytes of the `.json` member and where it is.
    """

    key: str
    has_text: bool = False
    texts: list[Document] = field(default_factory=list)
    record: tuple[Origin, bytes] | None = None


class _Archive:
    """Reads one archive."""

    def __init__(self, origin: Origin, config: InputConfig, rejects: Rejects) -> None:
        self._origin, self._config, self._rejects = origin, config, rejects
        self._fields = Fields(config)
        self._passed_over: Counter[str] = Counter()

    def read(self, archive: BinaryIO) -> Iterator[Document]:
        """The documents, sample by sample."""
        num_read, is_whole = 0, True
        sample = _Sample("")
        try:
            for member in read_members(archive, self._origin.file, self._rejects):
                name = posixpath.normpath(member.name)
                if is_left_out(name, self._config):
                    continue
                kind = format_of(name, self._config)
                if kind not in STREAM_READERS and suffix_inside(name) != ".json":
                    self._passed_over[suffix_of(name)] += 1
                    continue
                num_read += 1
                if _key(name) != sample.key:
                    yield from self._finished(sample)
                    sample = _Sample(_key(name))
                yield from self._read_member(member, name, kind, sample)
        except DamagedArchiveError as error:
            is_whole = False
            if not error.is_told:
                self._rejects.add(Reject(self._origin.file, 0, str(error)))
        if is_whole or sample.has_text:  # A record whose text may lie behind the cut is none.
            yield from self._finished(sample)
        self._rejects.passed_over.update(self._passed_over)
        if num_read == 0 and is_whole:
            inside = f"no member of it is text; it has {counts_by_suffix(self._passed_over)}"
            self._rejects.add(Reject(self._origin.file, 0, inside if self._passed_over else EMPTY))

    def _read_member(self, member: Member, name: str, kind: Format | None, sample: _Sample) -> Iterator[Document]:
        # No two lines of an archive have one number, unless a member has more than 2^32 of them.
        number = (member.offset // 512) << 32
        origin = Origin(f"{self._origin.file}/{name}", name, number=number)
        stream = decompressed(member.stream, name)
        if kind is None:
            self._read_record(stream, origin, sample)
            return
        sample.has_text = True
        found = STREAM_READERS[kind](stream, origin, self._config, self._rejects)
        if kind is not Format.TEXT or self._config.document_per_line or not self._fields.has_metadata:
            yield from found
            return
        for document in found:
            held = sum(len(text.text) for text in sample.texts)
            if held + len(document.text) > documents.MAX_DOCUMENT_BYTES:
                self._rejects.add(Reject(document.file, 1, f"the sample {sample.key!r} is {too_long()}"))
            else:
                sample.texts.append(document)

    def _read_record(self, stream: BinaryIO, origin: Origin, sample: _Sample) -> None:
        try:
            raw = read_up_to(stream, documents.MAX_DOCUMENT_BYTES + 1)
        except READ_ERRORS as error:
            self._rejects.add(Reject(origin.file, 0, unreadable(error)))
            return
        if len(raw) > documents.MAX_DOCUMENT_BYTES:
            self._rejects.add(Reject(origin.file, 1, too_long()))
        else:
            sample.record = origin, raw

    def _finished(self, sample: _Sample) -> Iterator[Document]:
        """The documents of a sample that were held back."""
        if sample.record is None:
            yield from sample.texts
            return
        origin, raw = sample.record
        if sample.has_text and not sample.texts:
            return
        try:
            record = parse_json(raw)
            if sample.has_text:
                found = [self._with_metadata(text, record) for text in sample.texts]
            else:
                found = [self._fields.document(record, origin, 1)]
                refuse_surrogates(found[0].text)
        except UnicodeDecodeError as error:
            self._rejects.add(Reject(origin.file, 1, not_utf8(raw, error)))
        except BadRecordError as error:
            self._rejects.add(Reject(origin.file, 1, str(error)))
        else:
            yield from found

    def _with_metadata(self, text: Document, record: dict[str, object]) -> Document:
        identity, source, language = self._fields.metadata(record)
        return text._replace(id=identity or text.id, source=source, language=language)


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"
