"""The format of a file by its name, the decompression of its content, and the strict conversion to text and JSON.

Bytes that are not text are reported with their likely encoding.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import posixpath
import zlib
from collections.abc import Callable, Mapping, Sequence
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
        return io.BufferedReader(_GzReader(fileobj=raw, mode="rb"), CHUNK_BYTES)
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


class _GzReader(gzip.GzipFile):
    """A reader of successive gzip members; it returns all valid bytes before it raises, unlike `GzipFile.read`."""

    readinto = gzip.GzipFile.readinto1


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


_MIN_NULS = 16
"""The largest share of NULs in a valid text."""
_MIN_NULS_OF_ENCODING = 4
"""The least share of NULs that gives evidence of another encoding."""
_NUL_SHARE = 0.25
"""The share of NULs from which bytes are halves of wider characters, not text."""
_SAMPLE = 1 << 16

_SIGNATURES = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)


class BadRowError(Exception):
    """A row without a valid text or record; the message is the reason."""


def decode(raw: bytes) -> str:
    """Return the text in UTF-8 bytes; a byte order mark is treated as a character here.

    Raises:
        BadRowError: they are not UTF-8, or not text.
    """
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise BadRowError(other_encoding(raw) or _not_utf8(error)) from None
    refuse_nuls(text)
    return text


def parse_json(raw: bytes) -> dict[str, Any]:
    """Return the JSON object in some bytes.

    Raises:
        BadRowError: they are not UTF-8, not a JSON object, or an object in them has a duplicate key.
    """
    try:
        record = _DECODER.decode(raw.decode())
    except UnicodeDecodeError as error:
        raise BadRowError(other_encoding(raw) or _not_utf8(error)) from None
    except json.JSONDecodeError as error:
        reason = f"not JSON: {error.msg}, at character {error.pos + 1}"
        raise BadRowError(other_encoding(raw) or reason) from None
    except (ValueError, RecursionError) as error:
        raise BadRowError(f"not JSON that can be read: {error}") from None
    if not isinstance(record, dict):
        raise BadRowError(f"a JSON {type(record).__name__} instead of an object")
    return record


def refuse_nuls(text: str) -> None:
    """Refuse a text with many NULs: it was read as UTF-8 but has another encoding, or it is not text.

    Raises:
        BadRowError: the text has them; the message has the likely encoding.
    """
    if "\0" not in text:
        return
    num_nuls = text.count("\0")
    if num_nuls >= _MIN_NULS and num_nuls >= _NUL_SHARE * len(text):
        reason = _encoding_by_nuls(text.encode("utf-8", "surrogateescape")[:_SAMPLE])
        raise BadRowError(reason or f"{num_nuls:,} of its {len(text):,} characters are NUL; it is not text")


def refuse_surrogates(text: str) -> None:
    """Refuse a text with half a surrogate pair, which is not a character: JSON can escape one, and invalid bytes of a
    table become one.

    Raises:
        BadRowError: it has one.
    """
    if text.isascii():
        return
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        what = "not UTF-8" if 0xDC80 <= code <= 0xDCFF else "an unpaired surrogate"
        raise BadRowError(f"{what}, at character {error.start + 1} of the text") from None


def check_texts(value: Any) -> None:
    """Refuse a value of a record that contains an invalid text at any depth.

    Raises:
        BadRowError: as `refuse_surrogates` and `refuse_nuls`.
    """
    if isinstance(value, str):
        refuse_surrogates(value)
        refuse_nuls(value)
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_texts(key)
            check_texts(inner)
    elif isinstance(value, list):
        for inner in value:
            check_texts(inner)


def without_signature(raw: bytes) -> bytes:
    """Return the bytes without UTF-8's byte order mark at their start (Unicode 16.0, 23.8)."""
    return raw.removeprefix(codecs.BOM_UTF8)


def unreadable(error: Exception) -> str:
    """Return why reading a stream failed."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be read: {reason}"


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise BadRowError(f"the key {twice[:80]!r} is a duplicate in an object")
    return record


# One decoder for all: json.loads would create one for each call.
_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _not_utf8(error: UnicodeDecodeError) -> str:
    return f"not UTF-8: {error.reason} at byte {error.start + 1} of the document"


def other_encoding(raw: bytes) -> str:
    """Return a reason with the likely encoding of bytes that are not UTF-8; "" if there is no likely one."""
    name = next((name for signature, name in _SIGNATURES if raw.startswith(signature)), None)
    return f"{name} text; {_convert(name)}" if name else _encoding_by_nuls(raw[:_SAMPLE])


def _encoding_by_nuls(raw: bytes) -> str:
    """Return such a reason by the places of NULs: UTF-16 and UTF-32 have them at fixed places of usual characters."""
    if raw.count(0) < max(_MIN_NULS_OF_ENCODING, _NUL_SHARE * len(raw)):
        return ""
    if not raw.strip(b"\0"):
        return "only NULs, as in a file after a crash; it is not text"
    nuls = tuple(raw[place::4].count(0) > len(raw) / 8 for place in range(4))
    name = {
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
    }.get(nuls)  # type: ignore[arg-type]
    return "" if name is None else f"{name[:6]} text without a byte order mark; {_convert(name)}"


def _convert(name: str) -> str:
    return f"convert it to UTF-8: iconv -f {name} -t UTF-8 FILE > NEW"
