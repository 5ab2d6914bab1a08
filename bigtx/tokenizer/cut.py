"""Long texts in pieces of bounded length, cut at the ends of words and lines."""

from __future__ import annotations

from collections.abc import Iterator


def cut(text: str, limit: int) -> Iterator[str]:
    """Yield the text in pieces of at most `limit` characters; together they are the text.

    A piece ends with a line's end if there is one, otherwise before a space, otherwise at the limit.
    """
    start = 0
    while len(text) - start > limit:
        end = start + limit
        at = text.rfind("\n", start, end) + 1
        if at <= start:
            at = text.rfind(" ", start + 1, end)
        if at <= start:
            at = end
        yield text[start:at]
        start = at
    if start < len(text):
        yield text[start:]


def utf8_length(text: str) -> int:
    """Return the number of bytes of a text in UTF-8."""
    return len(text) if text.isascii() else len(text.encode(errors="surrogatepass"))
