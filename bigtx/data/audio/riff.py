"""The lengths in the headers of wav (RIFF, RF64) and AIFF files."""

from __future__ import annotations

import struct

_KINDS = {b"RIFF": ("<", b"data"), b"RIFX": (">", b"data"), b"RF64": ("<", b"data"), b"FORM": (">", b"SSND")}
"""The byte order of numbers and the name of the chunk with the samples, by a file's first bytes."""
_HEAD, _CHUNK_HEAD = 12, 8
_IN_DS64 = 0xFFFFFFFF
_SIZE_IN_DS64 = 16
"""Bytes from the start of a ds64 chunk to the size of the samples (EBU Tech 3306)."""


class BadAudioError(Exception):
    """A recording that cannot be used; the message is the reason."""


def with_length(content: bytes) -> bytes:
    """Return the bytes of a recording with its length in the header, even if the program that recorded it wrote
    to a pipe and could not fill it in: sox and others leave a size of about 2 GiB, ffmpeg 0xFFFFFFFF, some 0.
    libsndfile reads these to the end of the file, except 0, which is replaced by the true size here.

    Raises:
        BadAudioError: the header gives more bytes than the file has.
    """
    order, wanted = _KINDS.get(content[:4], ("", b""))
    at, in_ds64 = _HEAD, None
    while order and at + _CHUNK_HEAD <= len(content):
        name, size = struct.unpack_from(f"{order}4sI", content, at)
        available = len(content) - at - _CHUNK_HEAD
        if name == b"ds64" and available >= 16:
            (in_ds64,) = struct.unpack_from("<Q", content, at + _SIZE_IN_DS64)
        if name != wanted:
            at += _CHUNK_HEAD + size + size % 2
            continue
        if size == _IN_DS64 and in_ds64 is not None:
            size = in_ds64
        if size == 0 and available and not _are_chunks(content, at + _CHUNK_HEAD, order):
            return content[: at + 4] + struct.pack(f"{order}I", min(available, _IN_DS64)) + content[at + 8 :]
        if size > available and not _is_open(size):
            raise BadAudioError(f"cut short: {available:,} bytes of sound of the {size:,} in its header")
        break
    return content


def _is_open(size: int) -> bool:
    return size >= (1 << 63) or size == _IN_DS64 or 0x7FFF_0000 <= size <= 0x8000_0000


def _are_chunks(content: bytes, at: int, order: str) -> bool:
    """Return whether other chunks, and nothing else, fill the rest of a file."""
    while at + _CHUNK_HEAD <= len(content):
        at += _CHUNK_HEAD + struct.unpack_from(f"{order}I", content, at + 4)[0]
        at += at % 2
    return at in (len(content), len(content) + 1)
