from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bigtx.utils.units import (
    Duration,
    format_count,
    format_size,
    parse_count,
    parse_duration,
    parse_size,
)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("0", 0),
        ("500", 500),
        ("1_000", 1000),
        ("64k", 64_000),
        ("64K", 64_000),
        ("64Ki", 65_536),
        ("1.5M", 1_500_000),
        ("10B", 10_000_000_000),
        ("10 B", 10_000_000_000),
        ("2T", 2 * 10**12),
        ("1e9", 10**9),
        ("0.001M", 1000),
    ],
)
def test_counts(text: str, count: int) -> None:
    assert parse_count(text) == count


@pytest.mark.parametrize(
    "text", ["", "k", "-1", "1.5", "010", "12:30", "ten", "1 GB", "0x10", "1__0", "1e400", "nan", "inf", "1,000", "٣"]
)
def test_refused_counts(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as|below 0"):
        parse_count(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [("17", 17), ("17 B", 17), ("1 kB", 1000), ("512 MiB", 2**29), ("1.5GB", 1_500_000_000), ("2 TiB", 2**41)],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["1 M", "0.3 B", "MiB", "1 MiB/s"])
def test_refused_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="such as"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("1 step", Duration(1, "steps")),
        ("500 steps", Duration(500, "steps")),
        ("2k steps", Duration(2000, "steps")),
        ("2B tokens", Duration(2e9, "tokens")),
        ("90 s", Duration(90, "seconds")),
        ("30 min", Duration(1800, "seconds")),
        ("1.5h", Duration(5400, "seconds")),
        ("2 days", Duration(172_800, "seconds")),
        ("5 %", Duration(0.05, "fraction")),
        ("0.1%", Duration(0.001, "fraction")),
        ("100 %", Duration(1.0, "fraction")),
        ("0 steps", Duration(0, "steps")),
    ],
)
def test_durations(text: str, duration: Duration) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text", ["", "500", "12:30", "101 %", "-5 steps", "1.5 steps", "3 epochs", "steps", "% 5", "5 k"]
)
def test_refused_durations(text: str) -> None:
    with pytest.raises(ValueError, match=r"such as|below 0"):
        parse_duration(text)


@given(st.integers(0, 999), st.sampled_from([1, 10**3, 10**6, 10**9, 10**12]))
def test_a_round_count_comes_back(number: int, factor: int) -> None:
    assert parse_count(format_count(number * factor)) == number * factor


@given(st.integers(0, 999), st.sampled_from([1, 2**10, 2**20, 2**30, 2**40]))
def test_a_round_size_comes_back(number: int, factor: int) -> None:
    assert parse_size(format_size(number * factor)) == number * factor


@given(st.floats(1, 1e15))
def test_a_shown_count_is_right_to_three_digits(value: float) -> None:
    shown = format_count(value)
    number = float(shown.rstrip("kMBT")) * {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(shown[-1], 1)
    assert number == pytest.approx(value, rel=0.006)
    assert len(shown.rstrip("kMBT").replace(".", "")) <= 4


@given(st.text(max_size=20))
def test_any_text_is_a_quantity_or_a_value_error(text: str) -> None:
    for parse in (parse_count, parse_size, parse_duration):
        try:
            parse(text)
        except ValueError as error:
            assert str(error)
