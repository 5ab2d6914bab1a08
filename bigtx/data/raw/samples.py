"""Archives -> rows: members are read as files are, and neighbouring members of one name are one sample.

    a/000.json  a/000.txt                      one row: the text, with the fields of its record
    a/000.en.txt  a/000.de.txt  a/000.json     two rows, one for each text; the record is for both
    2101.00001.json  2101.00002.json           two rows: a record alone is a row, with any dots in its name

A name has a *stem* (without its last suffix, and that of a compression) and a *key* (up to the first dot, as in
webdataset). Neighbours of one key are a *run*. In it a record belongs to members with its stem, or with a stem that
continues its own after a dot. Members with other suffixes (pickles among them) are skipped and counted, and their bytes
are never read.
"""

from __future__ import annotations

import io
import posixpath
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import xxhash

from bigtx.data.raw import documents, formats
from bigtx.data.raw.archives import DamagedArchiveError, Member, read_members
from bigtx.data.raw.documents import EMPTY, Reject, Rejects
from bigtx.data.raw.files import counts_by_suffix, is_left_out
from bigtx.data.raw.formats import BadRowError, Format
from bigtx.data.raw.readers import STREAM_READERS
from bigtx.data.raw.rows import Options, Origin, Row, read_json, read_whole

_APART = "it is separate from the other members of its sample; write the members of a sample one after the other"


def read_archive(archive: BinaryIO, origin: Origin, options: Options, rejects: Rejects) -> Iterator[Row]:
    """Yield the rows of an archive."""
    yield from _Archive(origin, options, rejects).read(archive)


@dataclass
class _Part:
    """The part of a sample that comes from one member: the value of a field.

    Attributes:
        place: a row without fields.
    """

    stem: str
    field: str
    value: Any
    place: Row


@dataclass
class _Run:
    """The content of neighbouring members with one key.

    Attributes:
        stems: the stems of members that are not records, so that records belong to them.
        broken: the stems with a member that was rejected.
        parts: kept until the records of the sample are known.
        records: the stem, the place and the bytes of each `.json`.
        held_bytes: the bytes of parts and records.
        others: the suffixes of members that are skipped.
        is_empty: no member of it is read.
    """

    key: str
    stems: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    parts: list[_Part] = field(default_factory=list)
    records: list[tuple[str, Origin, bytes]] = field(default_factory=list)
    held_bytes: int = 0
    others: list[str] = field(default_factory=list)
    is_empty: bool = True


class _Archive:
    """The reader of one archive."""

    def __init__(self, origin: Origin, options: Options, rejects: Rejects) -> None:
        self._origin, self._options, self._rejects = origin, options, rejects
        self._passed_over: Counter[str] = Counter()
        self._run = _Run("")
        # Hashes of names, keys and stems: an archive may have millions.
        self._names: set[int] = set()
        self._keys: set[int] = set()
        self._stems: set[int] = set()
        self._lone_records: set[int] = set()

    def read(self, archive: BinaryIO) -> Iterator[Row]:
        """Yield the rows, run by run."""
        is_whole = True
        try:
            for member in read_members(archive, self._origin.file, self._rejects):
                yield from self._take(member)
        except DamagedArchiveError as error:
            is_whole = False
            self._rejects.add(Reject(self._origin.file, 0, str(error), lost=None))
        yield from self._finish_run(is_whole)
        self._rejects.passed_over.update(self._passed_over)
        if is_whole and not self._names:
            self._reject_as_empty()

    def _take(self, member: Member) -> Iterator[Row]:
        """Read a member; yield the rows that are complete."""
        options, name = self._options, posixpath.normpath(member.name)
        if is_left_out(name, options.exclude):
            return
        last = posixpath.basename(name)
        if options.strict and ("." not in last or last.startswith("__")):
            return  # Not a sample by webdataset's convention: without a suffix, or about the shard itself.
        if formats.suffix_inside(name).removeprefix(".") in options.forbidden:
            reason = "files that may run code when loaded are refused"
            self._rejects.add(Reject(f"{self._origin.file}/{name}", 0, reason))
            return
        if _key(name) != self._run.key:
            yield from self._finish_run(is_whole=True)
            self._begin_run(name)
        kind = self._kind(name)
        if kind is None and formats.suffix_inside(name) not in options.members:
            self._passed_over[formats.suffix_of(name)] += 1
            self._run.others.append(last.removeprefix(posixpath.basename(self._run.key)))
            return
        self._run.is_empty = False
        is_new = _add(self._names, name)
        if reason := member.refusal or ("" if is_new else "a second member of this name"):
            self._rejects.add(Reject(f"{self._origin.file}/{member.name}", 0, reason))
            if kind is not Format.JSON:
                self._run.broken.add(_stem(name))
            return
        yield from self._read_member(member, name, kind)
        if self._run.held_bytes > documents.MAX_DOCUMENT_BYTES and not options.is_joined:
            yield from self._settle(is_whole=True)
            self._run = _Run(self._run.key, is_empty=False)

    def _reject_as_empty(self) -> None:
        """Refuse an archive of which nothing is read; in a strict one each sample has been rejected."""
        if self._passed_over and not self._options.strict:
            inside = f"none of its members is read; it has {counts_by_suffix(self._passed_over)}"
            self._rejects.add(Reject(self._origin.file, 0, inside, lost=None))
        elif self._options.strict and not self._keys:
            self._rejects.add(Reject(self._origin.file, 0, "no members"))
        elif not self._options.strict:
            self._rejects.add(Reject(self._origin.file, 0, EMPTY))

    def _kind(self, name: str) -> Format | None:
        """Return the format of a member, if it is read."""
        only = self._options.only
        if only is None:
            kind = formats.format_of(name, self._options.text_suffixes)
            return kind if kind in STREAM_READERS else None
        if not formats.without_compression(name).lower().endswith(f".{only}"):
            return None
        return Format.JSON if formats.suffix_inside(name) == ".json" else Format.TEXT

    def _begin_run(self, name: str) -> None:
        self._run = _Run(_key(name))
        if not _add(self._keys, self._run.key) and self._options.strict:
            reason = f"the key {self._run.key!r} appears again after others; {_APART}, with a key of its own"
            self._rejects.add(Reject(f"{self._origin.file}/{name}", 0, reason))

    def _read_member(self, member: Member, name: str, kind: Format | None) -> Iterator[Row]:
        options, rejects, run, stem = self._options, self._rejects, self._run, _stem(name)
        # No two lines of an archive have one number, unless a member has more than 2^32 of them.
        origin = Origin(f"{self._origin.file}/{name}", name, number=(member.offset // 512) << 32)
        stream = formats.decompressed(member.stream, name)
        if kind is Format.JSON:
            raw = read_whole(stream, origin, rejects, lost=None)
            if raw is None:
                run.broken.add(stem)
            else:
                run.records.append((stem, origin, raw))
                run.held_bytes += len(raw)
            return
        if kind in (None, Format.TEXT):
            run.stems.add(stem)
            if _hash(stem) in self._lone_records:
                rejects.add(Reject(origin.file, 0, _APART))
                return
        if kind is None:
            target, make = options.members[formats.suffix_inside(name)]
            try:
                value = make(member, stream)
            except BadRowError as error:
                rejects.add(Reject(origin.file, 0, str(error)))
                run.broken.add(stem)
            else:
                run.parts.append(_Part(stem, target, value, Row({}, origin.file, 1, origin.number + 1, name)))
            return
        is_part = kind is Format.TEXT and not options.document_per_line and options.has_metadata
        is_rejected = True
        for row in STREAM_READERS[kind](stream, origin, options, rejects):
            is_rejected = False
            if is_part:
                text = row.fields[options.text_field]
                run.parts.append(_Part(stem, options.text_field, text, row))
                run.held_bytes += len(text)
            else:
                yield row
        if is_rejected and is_part:
            run.broken.add(stem)

    def _finish_run(self, is_whole: bool) -> Iterator[Row]:
        """Yield the rows that were kept.

        Args:
            is_whole: whether the archive is complete, so that missing members of a sample do not follow.
        """
        run = self._run
        if not run.key:
            return
        if is_whole or not self._options.is_joined:
            yield from self._settle(is_whole)
        if run.is_empty and self._options.strict and is_whole:
            there, see = ", ".join(run.others), self._options.see("member")
            reason = f"the sample {run.key!r} has no member {self._options.describe()}, but {there}{see}"
            self._rejects.add(Reject(self._origin.file, 0, reason))

    def _settle(self, is_whole: bool) -> Iterator[Row]:
        run, found = self._run, dict[str, dict[str, Any] | None]()
        owners = {owner for stem in run.stems for owner in _owners(stem, run.key)}
        for stem, origin, raw in run.records:
            if _hash(stem) in self._stems:
                self._rejects.add(Reject(origin.file, 0, _APART))
            elif stem in owners:
                if self._options.has_metadata:
                    self._add_metadata(found, stem, origin, raw)
            elif stem in run.broken:
                pass  # The member of its name was rejected.
            elif is_whole:  # Otherwise its text may be after the truncation.
                self._lone_records.add(_hash(stem))
                yield from read_json(io.BytesIO(raw), origin, self._options, self._rejects)
        self._stems.update(map(_hash, (run.key, *run.stems) if run.stems else ()))
        yield from self._joined(found) if self._options.is_joined else self._texts(found)

    def _texts(self, found: dict[str, dict[str, Any] | None]) -> Iterator[Row]:
        """Yield a row for each text, with the fields of its record."""
        for part in self._run.parts:
            metadata = _nearest(found, part.stem, self._run.key)
            if metadata is not None:
                yield part.place._replace(fields={**metadata, part.field: part.value})

    def _add_metadata(self, found: dict[str, dict[str, Any] | None], stem: str, origin: Origin, raw: bytes) -> None:
        """Read the record of a stem; None is stored for a broken one."""
        try:
            if stem in found:
                raise BadRowError(f"a second record of the sample {stem!r}")
            found[stem] = None
            found[stem] = formats.parse_json(raw)
        except BadRowError as error:
            self._rejects.add(Reject(origin.file, 1, str(error)))

    def _joined(self, found: dict[str, dict[str, Any] | None]) -> Iterator[Row]:
        """Yield a row for each stem, from all its parts."""
        by_stem: dict[str, list[_Part]] = {}
        for part in self._run.parts:
            by_stem.setdefault(part.stem, []).append(part)
        for stem, parts in by_stem.items():
            metadata = _nearest(found, stem, self._run.key)
            if metadata is None or stem in self._run.broken:
                continue
            fields = dict(metadata)
            try:
                for part in parts:
                    if part.field in fields and fields[part.field] != part.value:
                        raise BadRowError(f"another member of the sample {stem!r} gives {part.field!r} too")
                    fields[part.field] = part.value
            except BadRowError as error:
                self._rejects.add(Reject(part.place.file, 0, str(error)))
            else:
                yield parts[0].place._replace(fields=fields)


def _nearest(found: dict[str, dict[str, Any] | None], stem: str, key: str) -> dict[str, Any] | None:
    """Return the record of a stem, or of the longest one that it continues; empty if no record fits, None if the
    record is broken.
    """
    return next((found[owner] for owner in _owners(stem, key) if owner in found), {})


def _owners(stem: str, key: str) -> Iterator[str]:
    """Yield the stems whose record belongs to this stem: itself, and those that it continues after a dot."""
    yield stem
    while len(stem) > len(key):
        stem = stem.rpartition(".")[0]
        yield stem


def _stem(name: str) -> str:
    return posixpath.splitext(formats.without_compression(name))[0]


def _key(name: str) -> str:
    folder, slash, last = name.rpartition("/")
    return f"{folder}{slash}{last.partition('.')[0]}"


def _hash(text: str) -> int:
    return xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogateescape"))


def _add(hashes: set[int], text: str) -> bool:
    """Store a text; return whether it is new."""
    size = len(hashes)
    hashes.add(_hash(text))
    return len(hashes) > size
