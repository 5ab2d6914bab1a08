"""Counts, sizes and durations as people write them: `10B`, `512 MiB`, `500 steps`, `30 min`, `5 %`.

A parser raises ValueError with a phrase that says what is wrong and what to write instead.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["steps", "tokens", "seconds", "fraction"]

COUNT_SUFFIXES = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30}
SIZE_SUFFIXES = {
    **{"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12},
    **{"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40},
}
SECONDS = {
    **dict.fromkeys(("s", "sec", "second", "seconds"), 1),
    **dict.fromkeys(("min", "minute", "minutes"), 60),
    **dict.fromkeys(("h", "hour", "hours"), 3600),
    **dict.fromkeys(("d", "day", "days"), 86400),
}

_TIMES = (("d", 86400), ("h", 3600), ("min", 60))
_COUNTED: dict[str, Unit] = {"step": "steps", "steps": "steps", "token": "tokens", "tokens": "tokens"}
COUNTS = ("500", "64k", "1.5M", "10B")
SIZES = ("512 MiB", "1.5 GB")
DURATIONS: dict[Unit, str] = {"steps": "500 steps", "tokens": "2B tokens", "seconds": "30 min", "fraction": "5 %"}
"""Examples, as people write them."""
INTERVALS: tuple[Unit, ...] = ("steps", "tokens", "seconds")
COUNT_EXAMPLE = "a whole number such as 500, 64k, 1.5M or 10B"
SIZE_EXAMPLE = "a size such as 512 MiB, 1.5 GB or a number of bytes"
LARGEST = 2**63 - 1
"""The largest quantity: what 64 bits hold."""
DURATION_EXAMPLE = "a duration such as 500 steps, 2B tokens, 30 min or 5 %"
RANGE_EXAMPLE = "a range START-END such as 120k-121k"

# A number, then the rest as the suffix. Underscores group digits; some read a leading zero as octal.
NUMBER = r"(?P<number>(?:0|[1-9][0-9]*(?:_[0-9]+)*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]{1,2})?)"
QUANTITY = re.compile(rf"{NUMBER}\s*(?P<suffix>.*)", re.DOTALL)


@dataclass(frozen=True)
class Duration:
    """A length of a run.

    Attributes:
        value: steps, tokens, seconds, or the share of the run between 0 and 1; never negative.
    """

    value: float
    unit: Unit

    def share_of(self, num_steps: int | None, tokens_per_step: int | None) -> float | None:
        """Return the share of a run that steps, tokens or a share are; None if the run's length is not known."""
        if self.unit == "fraction":
            return self.value
        if not num_steps:
            return None
        if self.unit == "steps":
            return self.value / num_steps
        return self.value / (num_steps * tokens_per_step) if tokens_per_step else None


def parse_count(text: str, example: str = COUNT_EXAMPLE) -> int:
    """Read `500`, `64k`, `1.5M`, `10B`, `2T` (powers of 1000) or `64Ki`, `1Mi` (powers of 1024) as a whole number.

    Args:
        example: what the message of an error says to write; in the functions below too.

    Raises:
        ValueError: the text is not a count, or the count is negative or fractional.
    """
    return _whole(text, COUNT_SUFFIXES, example)


def parse_size(text: str, example: str = SIZE_EXAMPLE) -> int:
    """Read `512 MiB`, `1.5 GB` or a plain number as bytes.

    Raises:
        ValueError: the text is not a size.
    """
    return _whole(text, SIZE_SUFFIXES, example)


def parse_duration(text: str, example: str = DURATION_EXAMPLE) -> Duration:
    """Read `500 steps`, `2B tokens`, `30 min`, `1.5 h`, `5 %` as a Duration.

    Raises:
        ValueError: the text is not a duration, has no known unit, or is more than 100 %.
    """
    words = text.strip()
    if words.endswith("%"):
        percent = _quantity(words[:-1].strip(), {"": 1}, example)
        if percent > 100:
            raise ValueError(f"is more than the run; write {example}")
        return Duration(float(percent / 100), "fraction")
    match = re.fullmatch(r"(.*?)\s*([A-Za-z]+)", words, re.DOTALL)
    if match is None:
        raise ValueError(f"has no unit; write {example}")
    amount, unit = match[1], match[2].lower()
    if unit in _COUNTED:
        return Duration(float(_whole(amount, COUNT_SUFFIXES, example)), _COUNTED[unit])
    if unit in SECONDS:
        return Duration(float(_quantity(amount, {"": 1}, example) * SECONDS[unit]), "seconds")
    raise ValueError(f"has no unit that bigtx knows; write {example}")


def duration_of(text: str) -> Duration | None:
    """Return a duration, or None for a text that is not one."""
    try:
        return parse_duration(text)
    except ValueError:
        return None


def parse_range(text: str) -> tuple[int, int]:
    """Read `1000-2000`, `1.5M-1.6M` as two counts, the first and the one after the last.

    Raises:
        ValueError: the text is not a range, or the range is empty.
    """
    parts = text.split("-")
    if len(parts) != 2:
        raise ValueError(f"is not {RANGE_EXAMPLE}")
    start, end = (_whole(part, COUNT_SUFFIXES, RANGE_EXAMPLE) for part in parts)
    if start >= end:
        raise ValueError(f"ends before it begins; write {RANGE_EXAMPLE}, without the last one")
    return start, end


def format_count(value: float) -> str:
    """Return a count in at most three significant digits: 10B, 1.23M, 512; `parse_count` reads whole ones back."""
    return _short(value, (("T", 10**12), ("B", 10**9), ("M", 10**6), ("k", 10**3)))


def format_size(num_bytes: float) -> str:
    """Write bytes in at most three significant digits: 512 MiB, 1.5 GiB, 17 B; `parse_size` reads whole ones back."""
    text = _short(num_bytes, ((" TiB", 2**40), (" GiB", 2**30), (" MiB", 2**20), (" KiB", 2**10)))
    return text if text.endswith("iB") else f"{text} B"


def format_time(seconds: float) -> str:
    """Return a time in at most three significant digits: 45 s, 3.5 h."""
    unit, length = next(((unit, length) for unit, length in _TIMES if seconds >= length), ("s", 1))
    return f"{_three_digits(seconds / length)} {unit}"


def counted(count: int, thing: str) -> str:
    """Return a number of things in words: 1 file, 2,000 files."""
    return f"{count:,} {thing}{'s' * (count != 1)}"


def format_names(names: Sequence[str], most: int = 8) -> str:
    """Format the first of some names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def _quantity(text: str, suffixes: dict[str, int], example: str) -> Decimal:
    match = QUANTITY.fullmatch(text.strip())
    if match is None and QUANTITY.fullmatch(text.strip().removeprefix("-")):
        raise ValueError("is too small: it is below 0")
    if match is None:
        raise ValueError(f"is not {example}")
    factor = suffixes.get(match["suffix"].lower())
    if factor is None:
        raise ValueError(f"ends in {match['suffix']!r}, which is not a unit here; write {example}")
    quantity = Decimal(match["number"].replace("_", "")) * factor
    if quantity > LARGEST:
        raise ValueError(f"is too large; write {example}")
    return quantity


def _whole(text: str, suffixes: dict[str, int], example: str) -> int:
    value = _quantity(text, suffixes, example)
    if value != value.to_integral_value():
        raise ValueError(f"is not a whole number; write {example}")
    return int(value)


def _short(value: float, suffixes: tuple[tuple[str, int], ...]) -> str:
    for suffix, factor in suffixes:
        # 999.5 of a unit would round up to 1000 of it: that is 1 of the next.
        if abs(value) >= 0.9995 * factor:
            return f"{_three_digits(value / factor)}{suffix}"
    return _three_digits(value)


def _three_digits(value: float) -> str:
    """Write a number without an exponent and without trailing zeros."""
    text = f"{Decimal(f'{value:.3g}'):f}" if abs(value) < 1000 else f"{value:.0f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def clock(seconds: float) -> str:
    """Return a duration as 4:05, 1:02:11 or 3d 04:10."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
