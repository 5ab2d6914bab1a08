"""Access to files on this machine, web servers (web.py) and object stores (buckets.py). Everything is streamed."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from types import ModuleType
from typing import BinaryIO, cast

from bigtx.data.storage.remote import RefusedError, TransientError, scheme_of, shown
from bigtx.utils.files import open_file

CHUNK_BYTES = 1 << 20
"""The bytes of one read."""


@dataclass(frozen=True)
class InputFile:
    """A file of raw text, or a range of its lines or row groups.

    Attributes:
        path: local, or a URL; its query may have a signature, so only `shown` is written anywhere.
        size: bytes as stored, of the range if it is one.
        start, end: the range: byte offsets at which lines start, in parquet numbers of row groups; `end` None: to
            the end of the file.
        first_line: number, counted from 1, of the line (in parquet: row) at `start`.
        version: changes with the file: its modification time in nanoseconds, a server's ETag; "" if not known.
        name: its path within the folder or glob that was named.
    """

    path: str
    size: int
    start: int = 0
    end: int | None = None
    first_line: int = 1
    version: str = ""
    name: str = ""

    @property
    def shown(self) -> str:
        """Return the path without credentials."""
        return shown(self.path)

    @property
    def identity(self) -> tuple[str | int | None, ...]:
        """Return everything that identifies the bytes, without credentials; for local files with the absolute path."""
        path = self.shown if is_remote(self.path) else os.path.abspath(self.path)
        return path, self.size, self.start, self.end, self.first_line, self.version


def is_remote(path: str) -> bool:
    """Return whether the path is a URL."""
    return bool(scheme_of(path))


def stat(path: str) -> tuple[int, str]:
    """Return the size in bytes (-1 for a remote folder) and the version, which changes with the content.

    Raises:
        OSError: it does not exist, or cannot be reached.
    """
    scheme = scheme_of(path)
    if not scheme:
        found = os.stat(path)
        return found.st_size, str(found.st_mtime_ns)
    size_and_version: tuple[int, str] = _module_for(scheme).stat(path)
    return size_and_version


def read_range(url: str, start: int | None = None, end: int | None = None) -> bytes:
    """Return a remote file's bytes, or those from start to end (exclusive), in one request.

    Raises:
        FileNotFoundError: there is no such file.
        TransientError: a retry may help.
        OSError: a retry does not help.
    """
    content: bytes = _module_for(scheme_of(url)).read_range(url, start, end)
    if start is not None and end is not None and len(content) != end - start:
        raise TransientError(f"{len(content):,} bytes arrived instead of {end - start:,}")
    return content


def _module_for(scheme: str) -> ModuleType:
    """Import the module that reads URLs of a scheme."""
    if scheme in ("http", "https"):
        from bigtx.data.storage import web

        return web
    from bigtx.data.storage import buckets

    return buckets


def open_binary(file: InputFile, *, seeks: bool = False) -> BinaryIO:
    """Return a stream of a file's stored bytes from its start; remote files are never ranges.

    Args:
        seeks: whether the reader jumps in the file.

    Raises:
        OSError: it cannot be opened, or was changed since it was listed. Reading raises it too, e.g. if the file is
            truncated.
    """
    scheme = scheme_of(file.path)
    if scheme:
        remote = _module_for(scheme).StoredFile(file.path, file.size, file.version, seeks=seeks)
        return cast(BinaryIO, io.BufferedReader(remote, remote.chunk_bytes))
    stream = open_file(file.path, min(CHUNK_BYTES, max(file.size, 512)))
    if file.version and str(os.fstat(stream.fileno()).st_mtime_ns) != file.version:
        stream.close()
        raise RefusedError("it was changed since it was listed")
    return stream
