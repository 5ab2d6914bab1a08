"""The format of a file by its name, and the decompression of its content."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import posixpath
import zlib
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any, BinaryIO

import zstandard

from bigtx.data.storage.access import CHUNK_BYTES
from bigtx.utils.shell import setting

COMPRESSION_SUFFIXES = (".gz", ".zst", ".zstd", ".bz2", ".xz")
NO_SUFFIX = "without a suffix"

READ_ERRORS = (OSError, EOFError, zlib.error, zstandard.ZstdError, lzma.LZMAError)
"""The errors of a stream whose file is damaged, truncated or not reachable."""

# A compressed chunk of 16 KiB can expand to 512 MiB at most, so memory stays bounded for any input.
_CHUNK_BYTES = 16 << 10
# The window of `zstd --long=31`, which is more than `xz -9` needs.
_MAX_WINDOW_BYTES = 1 << 31


class Format(Enum):
    """The arrangement of documents in a file."""

    TEXT = "text"
    JSON = "JSON"
    JSON_LINES = "JSON lines"
    CSV = "csv"
    TSV = "tsv"
    PARQUET = "parquet"
    TAR = "tar"


_SUFFIXES = {
    ".json": Format.JSON,
    ".jsonl": Format.JSON_LINES,
    ".ndjson": Format.JSON_LINES,
    ".csv": Format.CSV,
    ".tsv": Format.TSV,
    ".parquet": Format.PARQUET,
    ".tar": Format.TAR,
}
SUFFIXES = tuple(_SUFFIXES)
"""Suffixes that are known besides those of text files."""

_SHORT_FOR = {
    ".tgz": ".tar.gz",
    ".tbz": ".tar.bz2",
    ".tbz2": ".tar.bz2",
    ".txz": ".tar.xz",
    ".tzst": ".tar.zst",
}
_PACKED = (".zip", ".7z", ".rar", ".lz4", ".lzma", ".lzo", ".br", ".z", ".sz", ".snappy")
_NO_TEXT = {
    *(".pdf", ".doc", ".docx", ".odt", ".xls", ".xlsx", ".arrow", ".feather", ".npy", ".npz", ".bin", ".idx", ".pkl"),
    *(".pickle", ".pt", ".pth", ".db", ".sqlite", ".avro", ".orc", ".tfrecord", ".mds"),
}


def format_of(path: str, text_suffixes: Sequence[str]) -> Format | None:
    """Return the format of the file by its suffix (without that of a compression); None: a format that is not read."""
    suffix = suffix_inside(path)
    if suffix in _SUFFIXES:
        # Parquet is compressed inside, and is read from its end.
        return None if suffix == ".parquet" and is_compressed(path) else _SUFFIXES[suffix]
    return Format.TEXT if any(suffix == text.lower() for text in text_suffixes) else None


def why_unknown(path: str, text_suffixes: Sequence[str] | None = None) -> str:
    """Return the advice for a file whose suffix no reader accepts.

    Args:
        text_suffixes: the value of `input.text_suffixes`; None if there is no such setting.
    """
    suffix = suffix_inside(path)
    if suffix == ".parquet":
        return "decompress it: parquet is compressed inside, and is read from its end"
    if suffix in _PACKED:
        return f"unpack it first; {', '.join(COMPRESSION_SUFFIXES)} are read as they are"
    if suffix in _NO_TEXT:
        return "convert it to text or JSON lines first"
    if suffix and text_suffixes is not None:
        return f"if it is plain text, add its suffix: {setting('input.text_suffixes', [*text_suffixes, suffix])}"
    return "if it is plain text, give it a name that ends in .txt"


def is_compressed(path: str) -> bool:
    """Return whether the file is compressed as a whole, by its name."""
    return _full(path).endswith(COMPRESSION_SUFFIXES)


def suffix_inside(path: str) -> str:
    """Return the suffix in lower case, without that of a compression."""
    return posixpath.splitext(without_compression(path).lower())[1]


def without_compression(path: str) -> str:
    """Return the path without the suffix of a compression."""
    full = _full(path)
    ending = next((suffix for suffix in COMPRESSION_SUFFIXES if full.endswith(suffix)), "")
    if posixpath.splitext(path.lower())[1] in _SHORT_FOR:
        return full.removesuffix(ending)
    return path[: len(path) - len(ending)]


def suffix_of(path: str) -> str:
    """Return the suffix under which a file that is not read is counted."""
    return posixpath.splitext(path)[1] or NO_SUFFIX


def decompressed(raw: BinaryIO, path: str) -> BinaryIO:
    """Return the content of a file's bytes, by its name; `raw` itself if it is not compressed.

    Reading from the result raises the errors in `READ_ERRORS`, also when the compressed bytes end too early.
    """
    suffix = posixpath.splitext(_full(path))[1]
    if suffix == ".gz":
        return io.BufferedReader(_GzReader(raw), CHUNK_BYTES)
    decompressor = {".zst": _zst, ".zstd": _zst, ".bz2": bz2.BZ2Decompressor, ".xz": _xz}.get(suffix)
    return io.BufferedReader(_FramesReader(raw, decompressor), CHUNK_BYTES) if decompressor else raw


def _full(path: str) -> str:
    """Return the path in lower case, with short suffixes such as .tgz written out."""
    stem, suffix = posixpath.splitext(path.lower())
    return stem + _SHORT_FOR.get(suffix, suffix)


def _zst() -> Any:
    return zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_BYTES).decompressobj()


def _xz() -> Any:
    return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MAX_WINDOW_BYTES)


def read_up_to(stream: BinaryIO, num_bytes: int) -> bytes:
    """Return the next `num_bytes`, or the rest; memory grows with the bytes that arrive, not with `num_bytes`."""
    parts: list[bytes] = []
    while num_bytes > 0 and (part := stream.read(min(num_bytes, CHUNK_BYTES))):
        parts.append(part)
        num_bytes -= len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


class _GzReader(io.RawIOBase):
    """A reader of successive gzip members; it returns all valid bytes before it raises, unlike `GzipFile.read`."""

    def __init__(self, source: BinaryIO) -> None:
        self._file = gzip.GzipFile(fileobj=source, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        content = self._file.read1(len(buffer))
        buffer[: len(content)] = content
        return len(content)


class _FramesReader(io.RawIOBase):
    """A reader of successive compressed frames; unlike the libraries' own readers, it always detects a truncated last
    one.

    Args:
        make: a function that creates a decompressor of one frame, as in bz2, lzma and zstandard.
    """

    def __init__(self, source: BinaryIO, make: Callable[[], Any]) -> None:
        self._source, self._make = source, make
        self._frame: Any = None
        self._num_frames = 0
        self._compressed = b""
        self._plain = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        while not self._plain:
            self._compressed = self._compressed or self._source.read(_CHUNK_BYTES)
            if not self._compressed:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its end-of-stream marker")
                return 0
            if self._frame is None and self._num_frames:
                self._compressed = self._compressed.lstrip(b"\0")  # Padding between frames.
                if not self._compressed:
                    continue
            if self._frame is None:
                self._frame, self._num_frames = self._make(), self._num_frames + 1
            self._plain = memoryview(self._frame.decompress(self._compressed))
            self._compressed = b""
            if self._frame.eof:
                self._compressed, self._frame = self._frame.unused_data, None
        taken = min(len(buffer), len(self._plain))
        buffer[:taken] = self._plain[:taken]
        self._plain = self._plain[taken:]
        return taken
