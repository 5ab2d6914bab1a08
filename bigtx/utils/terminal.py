"""Untrusted texts for a terminal: they cannot control it, and they fit into its width."""

from __future__ import annotations

import os
import unicodedata
from typing import TextIO

ERASE_LINE = "\r\x1b[K"
"""Erases a terminal's current line."""


def visible(text: str, *, keep: str = "") -> str:
    """Return the text with escapes for characters that are not visible, such as the codes that move a cursor.

    Args:
        keep: characters that stay as they are.
    """
    return "".join(sign if sign.isprintable() or sign in keep else repr(sign)[1:-1] for sign in text)


def width(text: str) -> int:
    """Return the number of columns that a printable text takes: Chinese characters and the like take two, combining
    marks none.
    """
    return sum(0 if unicodedata.combining(sign) else 1 + (unicodedata.east_asian_width(sign) in "WF") for sign in text)


def fitted(text: str, columns: int) -> str:
    """Return the text, or its beginning and an ellipsis, padded with spaces to exactly so many columns."""
    if width(text) > columns:
        while text and width(text) > columns - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (columns - width(text))


def obeys(stream: TextIO) -> bool:
    """Return whether a stream is a terminal that interprets control characters."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"
