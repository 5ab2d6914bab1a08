"""Strict conversion of bytes to text and JSON: bytes that are not text are reported with their likely encoding."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping
from typing import Any

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
    shares = [raw[place::4].count(0) / (len(raw) / 4) for place in range(4)]
    nuls = [share > 0.5 for share in shares]
    name = {
        (False, True, True, True): "UTF-32LE",
        (True, True, True, False): "UTF-32BE",
        (False, True, False, True): "UTF-16LE",
        (True, False, True, False): "UTF-16BE",
    }.get(tuple(nuls))  # type: ignore[arg-type]
    if name is None:
        return ""
    return f"{name[:6]} text without a byte order mark; {_convert(name)}"


def _convert(name: str) -> str:
    return f"convert it to UTF-8: iconv -f {name} -t UTF-8 FILE > NEW"
