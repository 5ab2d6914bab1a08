"""Tar archives, member by member from a stream: members are bytes with a name, and nothing is ever extracted.

The standard library's own reader accepts an archive that is truncated at a member's border, or has a damaged header, as
one that ends there, and reads a name of any length that a header gives; so only its parser of single headers is used.
The format: POSIX.1-2001, pax; GNU tar's long names.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO, cast

from bigtx.data.raw.documents import Reject, Rejects
from bigtx.data.raw.formats import READ_ERRORS, read_up_to, unreadable
from bigtx.data.storage.access import CHUNK_BYTES

_UNIT = tarfile.BLOCKSIZE
_ZEROS = bytes(_UNIT)
_MAX_HEADER_BYTES = 1 << 20
"""Longest extended header that is read."""

_PAX_HEADERS = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE)

_LEADS_OUT = re.compile(r"(.*[/\\])?\.\.([/\\].*)?\Z", re.DOTALL)


@dataclass(frozen=True)
class Member:
    """A named entry of an archive that is not a folder.

    Attributes:
        name: its path within the archive; leading slashes are removed, because nothing is extracted.
        refusal: why it must not be read, e.g. because it is a link; "" if it may be read.
        offset: the position of its header in the archive, in bytes.
        stream: its bytes, which must be read before the next member is requested.
        content_offset: the position of its first byte in the archive.
        size: its number of bytes, as in the header.
    """

    name: str
    refusal: str
    offset: int
    stream: BinaryIO
    content_offset: int
    size: int


class DamagedArchiveError(Exception):
    """The rest of the archive cannot be read; the message is the reason. Reading a member raises it too."""


class _MemberBytes(io.RawIOBase):
    """A limited number of bytes of the archive's stream."""

    def __init__(self, archive: BinaryIO, size: int, name: str) -> None:
        self._archive, self._name = archive, name
        self.left = size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), self.left)
        try:
            content = self._archive.read(wanted)
        except READ_ERRORS as error:
            raise DamagedArchiveError(f"{unreadable(error)}, inside of {self._name}") from None
        if wanted and not content:
            raise DamagedArchiveError(f"truncated inside of {self._name}")
        buffer[: len(content)] = content
        self.left -= len(content)
        return len(content)


def read_members(archive: BinaryIO, file: str, rejects: Rejects) -> Iterator[Member]:
    """Yield the members of an archive except folders, in its order; those that must not be read have the reason.

    Args:
        file: the name of the archive in rejects.

    Raises:
        DamagedArchiveError: it is damaged or cut short, or lacks its end-of-archive marker, so that any number of
            members may be missing. The members before are yielded.
    """
    try:
        yield from _read_members(archive, file, rejects)
    except READ_ERRORS as error:
        raise DamagedArchiveError(unreadable(error)) from None


def _read_members(archive: BinaryIO, file: str, rejects: Rejects) -> Iterator[Member]:
    offset = 0
    common: dict[str, str] = {}
    while header := _next_header(archive, offset, common):
        has_content = not (header.islnk() or header.issym() or header.isdev() or header.isdir())
        size = header.size if has_content else 0
        content = _MemberBytes(archive, size, header.name)
        if not header.isdir():
            reader = cast(BinaryIO, io.BufferedReader(content, min(CHUNK_BYTES, size + 1)))
            yield Member(header.name.lstrip("/"), _refusal(header), offset, reader, header.offset_data, size)
        _skip(archive, content.left + -size % _UNIT, header.name)
        offset = header.offset_data + size + -size % _UNIT
    while rest := archive.read(CHUNK_BYTES):
        if rest.strip(b"\0"):
            reason = "bytes after its end are not read; are there several archives in one file?"
            rejects.add(Reject(file, 0, reason, lost=None))
            return


def _next_header(archive: BinaryIO, offset: int, common: dict[str, str]) -> tarfile.TarInfo | None:
    """Return the next member's header, with the values of the extended headers before it; None at the end-of-archive
    marker.
    """
    own: dict[str, str] = {}
    while True:
        block = read_up_to(archive, _UNIT)
        if not block:
            raise DamagedArchiveError("truncated: it ends without an end-of-archive marker, so members may be missing")
        if len(block) < _UNIT:
            raise DamagedArchiveError("truncated inside a header" if offset else "not a tar archive")
        if block == _ZEROS:
            return None
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise DamagedArchiveError(
                f"damaged at byte {offset:,}: {error}; the rest is lost" if offset else f"not a tar archive: {error}"
            ) from None
        if info.size < 0:
            raise DamagedArchiveError(f"damaged at byte {offset:,}: a size below 0; the rest is lost")
        offset += _UNIT
        if info.type in (*_PAX_HEADERS, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK):
            content = _extended(archive, info)
            offset += len(content)
            content = content[: info.size]
            if info.type == tarfile.GNUTYPE_LONGNAME:
                own["path"] = content.rstrip(b"\0").decode(errors="surrogateescape")
            elif info.type != tarfile.GNUTYPE_LONGLINK:
                (common if info.type == tarfile.XGLTYPE else own).update(_pax_records(content, offset))
            continue
        if info.type == tarfile.GNUTYPE_SPARSE:
            offset += _skip_sparse_map(archive, block)
        headers = common | own
        size = headers.get("size", "")
        info.size = int(size) if size.isdecimal() else info.size
        info.name = headers.get("path", info.name).removesuffix("/")
        info.offset_data, info.pax_headers = offset, own
        return info


def _refusal(header: tarfile.TarInfo) -> str:
    """Return why a member is not read; "" if it is read."""
    if not header.name.strip("/") or _LEADS_OUT.match(header.name):
        return "a path that leads out of the archive"
    if header.islnk() or header.issym():
        return "a link, which is not followed"
    if header.isdev():
        return "a device or pipe"
    if header.type == tarfile.GNUTYPE_SPARSE or any(key.startswith("GNU.sparse") for key in header.pax_headers):
        return "a sparse file"
    if not header.isfile() and not header.isdir():
        return f"a member of unknown type {header.type.decode('latin-1')!r}"
    return ""


def _extended(archive: BinaryIO, info: tarfile.TarInfo) -> bytes:
    """Return the content of an extended header, padded as in the archive."""
    if info.size > _MAX_HEADER_BYTES:
        raise DamagedArchiveError(f"an extended header of {info.size:,} bytes; the rest is lost")
    return _exactly(archive, info.size + -info.size % _UNIT)


def _exactly(archive: BinaryIO, num_bytes: int) -> bytes:
    content = read_up_to(archive, num_bytes)
    if len(content) < num_bytes:
        raise DamagedArchiveError("truncated inside a header")
    return content


def _pax_records(content: bytes, offset: int) -> dict[str, str]:
    """Return the records `<length> <key>=<value>\\n` of a pax header."""
    records = {}
    while content.rstrip(b"\0"):
        length = content.partition(b" ")[0]
        record = content[: int(length)] if length.isdigit() and len(length) < 8 else b""
        key, equals, value = record[len(length) + 1 :].partition(b"=")
        if not equals or not value.endswith(b"\n"):
            raise DamagedArchiveError(f"damaged before byte {offset:,}: a pax header that cannot be read")
        records[key.decode(errors="surrogateescape")] = value[:-1].decode(errors="surrogateescape")
        content = content[len(record) :]
    return records


def _skip_sparse_map(archive: BinaryIO, header: bytes) -> int:
    """Skip GNU tar's further blocks of holes; return their bytes."""
    num_bytes, goes_on = 0, header[482]
    while goes_on:
        num_bytes, goes_on = num_bytes + _UNIT, _exactly(archive, _UNIT)[504]
    return num_bytes


def _skip(archive: BinaryIO, num_bytes: int, name: str) -> None:
    while num_bytes:
        skipped = len(archive.read(min(num_bytes, CHUNK_BYTES)))
        if not skipped:
            raise DamagedArchiveError(f"truncated inside of {name}")
        num_bytes -= skipped
