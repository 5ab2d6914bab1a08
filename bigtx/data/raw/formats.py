"""What a file holds, by its name; and the way through its compression."""

from __future__ import annotations

import gzip
import io
import posixpath
import zlib
from enum import Enum
from typing import BinaryIO

import zstandard

from bigtx.config.schema import InputConfig
from bigtx.data.storage.access import CHUNK_BYTES

COMPRESSION_SUFFIXES = (".gz", ".zst")
NO_SUFFIX = "without a suffix"

READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError)
"""What a stream raises when its file is damaged, cut short or out of reach."""

# A compressed chunk of 16 KiB can unfold to 512 MiB at the very worst, so memory stays bounded whatever is fed to us.
_ZST_CHUNK_BYTES = 16 << 10
# What `zstd --long=31` writes.
_ZST_MAX_WINDOW_BYTES = 1 << 31


class Format(Enum):
    """How documents lie in a file."""

    TEXT = "text"
    JSON_LINES = "JSON lines"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    TAR = "tar"


_SUFFIXES = {
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
    ".tar": Format.TAR,
}
SUFFIXES = tuple(_SUFFIXES)
"""Suffixes that are known beside those of text files."""


def format_of(path: str, config: InputConfig) -> Format | None:
    """What the file holds, by its suffix (that of a compression taken off first); None: nothing that is read."""
    suffix = suffix_inside(path)
    if suffix in _SUFFIXES:
        # Parquet is compressed inside, and is read from its end.
        return None if suffix == ".parquet" and is_compressed(path) else _SUFFIXES[suffix]
    return Format.TEXT if any(suffix == text.lower() for text in config.text_suffixes) else None


def is_compressed(path: str) -> bool:
    """Whether the file is compressed as a whole, by its name."""
    return path.lower().endswith(COMPRESSION_SUFFIXES)


def suffix_inside(path: str) -> str:
    """The suffix in lower case, that of a compression taken off first."""
    stem, suffix = posixpath.splitext(path.lower())
    return posixpath.splitext(stem)[1] if suffix in COMPRESSION_SUFFIXES else suffix


def suffix_of(path: str) -> str:
    """The suffix under which a file that is not read is counted."""
    return posixpath.splitext(path)[1] or NO_SUFFIX


def decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    """The content of a file's bytes, by its name; `raw` itself if it is not compressed.

    Reading from the result raises what `READ_ERRORS` names, also when the compressed bytes end too early.
    """
    suffix = posixpath.splitext(path.lower())[1]
    if suffix == ".gz":
        return io.BufferedReader(_GzReader(raw), CHUNK_BYTES)
    if suffix == ".zst":
        return io.BufferedReader(_ZstReader(raw), CHUNK_BYTES)
    return raw


def read_up_to(stream: BinaryIO, num_bytes: int) -> bytes:
    """The next `num_bytes`, or what there is; memory is taken as bytes come, not for what could come."""
    parts: list[bytes] = []
    while num_bytes > 0 and (part := stream.read(min(num_bytes, CHUNK_BYTES))):
        parts.append(part)
        num_bytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _GzReader(io.RawIOBase):
    """Gzip members one after another; gives what there is before it raises, unlike `GzipFile.read`."""

    def __init__(self, source: BinaryIO) -> None:
        self._file = gzip.GzipFile(fileobj=source, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._file.read1(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _ZstReader(io.RawIOBase):
    """Zstandard frames one after another; unlike the library's own reader, it notices that the last is cut short."""

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZST_MAX_WINDOW_BYTES)
        self._frame: zstandard.ZstdDecompressionObj | None = None
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._plain:
            if not self._compressed:
                self._compressed = self._source.read(_ZST_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end-of-stream marker")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._plain = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        taken = min(len(buffer), len(self._plain))
        buffer[:taken] = self._plain[:taken]
        self._plain = self._plain[taken:]
        return taken
