"""Scripts that are written without spaces between words."""

from __future__ import annotations

UNSPACED = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x2FDF),  # radicals
    (0x3005, 0x3007),
    (0x3040, 0x30FF),  # kana
    (0x31F0, 0x31FF),
    (0x3400, 0x4DBF),
    (0x4E00, 0x9FFF),  # Han
    (0xF900, 0xFAFF),
)
"""Their code points, first and last, below `IDEOGRAPHS`."""
IDEOGRAPHS = 0x20000
"""From this code point on, almost all are ideographs."""


def is_unspaced(character: str) -> bool:
    """Return whether a character belongs to such a script."""
    code = ord(character)
    return code >= IDEOGRAPHS or any(first <= code <= last for first, last in UNSPACED)
